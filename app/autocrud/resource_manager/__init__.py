"""How resources are stored: the contracts are in `basic`, the rules of revisions in `core`."""
