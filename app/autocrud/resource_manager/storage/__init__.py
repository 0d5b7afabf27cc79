"""Storages: a MetaStore with a ResourceStore.

- `layout`: where each store keeps its data
- `former_layout`: refuses stores that earlier factories wrote elsewhere
- `stores_by_name`: makes the stores that a pair names
- `simple_storage`: SimpleStorage, which composes the other modules
- `opening`: opens a storage once for all callers, and rebuilds an index from records
- `reindexing`: makes index entries for other fields, or entries that were lost
- `commits`: two ways to commit, to a MetaStore or to records
- `disk_pair`: the third way, for two stores on one disk
- `unique_values`: reservations of values of unique fields
- `sweeping`: removes bodies that no record names
"""
