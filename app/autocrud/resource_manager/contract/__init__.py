"""What every store is held to, beside the ports in `basic`: limits, errors and the codec of metadata."""
