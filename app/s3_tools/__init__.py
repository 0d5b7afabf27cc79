"""The commands that check and repair an object storage."""
