"""The engine of a ResourceManager: operations, the rules of revisions, reads and writes.

access_filter  which resources a caller may read and change
caller         the name and the Idempotency-Key of a caller
operations     the operations on resources, as values
planning       the rules of revisions: how each operation changes a resource
reading        consistent, verified reads
state          the state of a resource while it is read or planned
writing        commits, with retries and idempotent keys
"""
