"""Cache invalidation between instances through RabbitMQ.

invalidation  what a message says, and how it is encoded
connection    the thread and the connections that all stores of the process share
publisher     sends the invalidations of one instance
consumer      receives those of the others, and knows until when all were handled
session       publisher and consumer of one store, on one connection after the other; the invariants stand there
bus           the interface for callers in any thread and any event loop

docs/design/cache-invalidation.md explains the protocol.
"""
