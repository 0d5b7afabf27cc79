"""The server of `crudstack serve`, and its limits."""
