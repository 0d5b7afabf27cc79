"""The parts of the contract of stores that are not in `basic`.

protocols       abilities that only some stores have
overrides       refusal of stores that define a method which would never be called
staged_stores   stores on one disk whose writes share a committer
idempotency     which results an Idempotency-Key keeps
limits          limits for the stored data of one resource
store_errors    checks that every store makes, and their errors
metadata_codec  how metadata and records are encoded
"""
