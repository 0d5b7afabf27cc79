"""Threads, files, time and disk space: what the engine needs of the process it runs in."""
