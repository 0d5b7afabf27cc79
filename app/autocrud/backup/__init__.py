"""Exports and imports: archives of all models, of any kind of storage.

archive_format  the entries of an archive, and its limits; docs/archive-format.md is the page for other programs
archive_writer  writes an archive
archive_reader  verifies an archive, and reads it
importing       puts the resources of an archive into the stores of models

An archive is a tar file, compressed with gzip or zstd. Memory use does not depend on its size.
"""
