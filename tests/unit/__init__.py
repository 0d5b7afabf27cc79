"""Tests of single functions, without servers and files: `make test-fast` runs them in seconds."""
