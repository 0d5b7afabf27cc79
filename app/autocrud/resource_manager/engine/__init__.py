"""The rules of revisions: operations, plans, writes and access filters."""
