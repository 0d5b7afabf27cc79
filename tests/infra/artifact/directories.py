"""The names of the files in a directory."""

from __future__ import annotations

from pathlib import Path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
