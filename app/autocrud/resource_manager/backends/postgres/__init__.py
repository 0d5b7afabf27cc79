"""A MetaStore in PostgreSQL.

schema            the tables, and the stored function that commits
commit_arguments  the arguments of that function
migration         completes the tables that another version of the program made
query             the SQL dialect of PostgreSQL
pool              connections, and the translation of their failures
session           the settings of statements, also through a pooler
"""
