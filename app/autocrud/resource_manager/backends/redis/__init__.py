"""RedisMetaStore: metadata in Redis, and searches on a replica in the memory of this process.

scripts           the keys, and the Lua scripts: each is one atomic step inside Redis
client            connections, and the rules about repeated commands
load_scripts      the scripts that load a whole model, and their keys
script_arguments  encodes changes as arguments of a script, and decodes documents
search_replica    the replica in memory that searches read. The log in Redis keeps it current
lease             a cache in Redis for a store that is elsewhere (FastSlowMetaStore)
"""
