"""Storages: a MetaStore with a ResourceStore.

- `layout`: the location of the data of each store
- `former_layout`: refuses stores that factories of earlier releases wrote to other locations
- `stores_by_name`: makes a pair of stores from their names
- `simple_storage`: SimpleStorage, which composes the other modules
- `opening`: opens a storage once for all callers, and rebuilds an index from records
- `reindexing`: makes the index entries again if the indexed fields change, or if entries were lost
- `commits`: two ways to commit, to a MetaStore or to records
- `disk_pair`: the third way, for two stores on one disk
- `unique_values`: reservations of values of unique fields
- `sweeping`: removes bodies that no record names
- `direct_s3`: uploads of blobs to S3 and downloads from it, by presigned URLs
- `dropped_bodies`: removes bodies whose records a commit has removed
- `blobs`: uploads, reads and removes files
"""
