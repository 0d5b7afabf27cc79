"""SQLite, for every store that has a SQLite database: in memory, on disk or as a local copy.

tables          the tables of a MetaStore, and its contract as functions of a connection
definitions     the statements that create these tables, and their indexes
sql             the SQL dialect of these tables
database        MemoryDatabase and FileDatabase
committer       group commit of writes to files
replay          applies operations of a log to tables
findings_table  what re-indexing found, as one row
errors          translates errors of SQLite
"""
