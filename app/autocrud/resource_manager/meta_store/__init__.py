"""The MetaStores, which store metadata, records of revisions and the search index.

simple     in memory, and in one SQLite file
sqlite3    in SQLite, with S3 as the durable store
redis      in Redis or Valkey
postgres   in PostgreSQL
fast_slow  a cache in front of a durable MetaStore
"""
