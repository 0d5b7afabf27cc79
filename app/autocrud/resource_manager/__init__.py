"""How resources are stored: the contracts are in `basic`, what they carry in `records`, the rules of revisions in `core`."""
