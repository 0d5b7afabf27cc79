"""RedisMetaStore: the truth in Redis, searches from a copy in this process.

scripts      the keys, and what happens in one atomic step inside Redis
client       connections; what is repeated and what never is
transaction  how changes become the arguments of a script, and documents come back
mirror       the copy in memory that searches read, kept up with the log
"""
