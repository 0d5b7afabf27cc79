"""What puts the app on AWS: the zip of its code, and what it runs on."""
