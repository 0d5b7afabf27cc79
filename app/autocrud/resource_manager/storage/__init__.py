"""Storages: a MetaStore with a ResourceStore."""
