"""The storage of resources. Each package imports only those below it.

core             the ResourceManager: the operations on the resources of one model
engine           the rules of revisions: operations, plans, reads, writes and access filters
storage_factory  one factory for each kind of storage
storage          a MetaStore and a ResourceStore together, and the layout of their data
resource_store   stores of bodies
meta_store       stores of metadata and of the index
backends         SQLite, S3, PostgreSQL, Redis and RabbitMQ
model            encoding, decoding and verification of a model's data
contract         what every store shares: protocols, errors, limits, the encoding of metadata
basic, records   the contracts of stores, and the data that they exchange
runtime          threads, deadlines, files and disk space
"""
