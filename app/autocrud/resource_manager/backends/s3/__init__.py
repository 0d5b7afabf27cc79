"""S3: the interface to object storage, its clients, credentials and errors.

object_store         ObjectStore: the operations that the engine needs; S3ObjectStore: one bucket, through obstore
objects              the values that pass to and from an object store
signed_requests      requests that obstore cannot sign or send, through botocore
reception            an object that is received in chunks, and continued if the connection is lost
clients              pools of connections, time-outs, and which requests are repeated
endpoint             the name of the server, and the CAs that are trusted
credentials          credentials that obstore does not find itself
profile              credentials and region of a profile in ~/.aws, through botocore
errors               errors of obstore as one sentence each
obstore_exit         ends a process only after the threads of obstore have left Python
memory_object_store  MemoryObjectStore: an object store in memory, for tests
"""
