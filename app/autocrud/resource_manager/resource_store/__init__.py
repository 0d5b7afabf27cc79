"""ResourceStores: immutable bodies."""
