"""The engine of a ResourceManager: operations, the rules of revisions, reads and writes.

access_filter  which resources a caller may read and change
blobs          uploads of blobs, and the blobs that resources refer to
caller         the name and the Idempotency-Key of a caller
housekeeping   removal of expired revisions and of remnants
operations     the operations on resources, as values
planning       the rules of revisions: how each operation changes a resource
reading        consistent, verified reads
references     the blobs that the data of a write refers to
state          the state of a resource while it is read or planned
writing        commits, with retries and idempotent keys
"""
