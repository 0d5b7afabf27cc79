"""ResourceStores, which keep immutable bodies, and the caches before them.

simple           in memory, and in one SQLite file
s3               one object per body on S3
cached_s3        the same behind caches
mq_cached_s3     the same with invalidation between instances through RabbitMQ
cache            re-exports Cache, Entry, MemoryCache and DiskCache
body_cache       the contract of a cache
memory_cache     a cache in memory
disk_cache       a cache on a local disk: order of operations and recovery
cache_directory  its files, and the lock between processes
cache_file       its SQLite file
"""
