"""A MetaStore in PostgreSQL. Rooms:

schema  the tables, and the one function that commits
query   how PostgreSQL spells a query
pool    connections, and what their failures mean
"""
