"""The zip in the real runtime client of AWS Lambda, against emulators on this machine."""
