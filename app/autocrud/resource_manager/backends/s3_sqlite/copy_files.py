"""The files of local copies in a directory: their names, which one is current, and the removal of unused ones."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from uuid import uuid4

LEFTOVER_S = 24 * 3600.0
"""An unused file or object that was not modified for this long belongs to a process that was killed."""


def new_path(directory: Path) -> Path:
    """Return a new name for a local copy, or for a temporary file, in a directory."""
    return directory / f"copy-{uuid4().hex}.sqlite"


def current_path(directory: Path) -> Path | None:
    """Return the file that the processes of this directory use now; None if there is none. Blocks."""
    try:
        path = directory / (directory / "current").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return path if path.suffix == ".sqlite" and path.parent == directory and path.is_file() else None


def make_current(path: Path) -> None:
    """Have the processes of this directory use another file from their next start on. Blocks. Raises OSError."""
    temporary = path.parent / f"current-{uuid4().hex}"
    try:
        temporary.write_text(path.name)
        temporary.replace(path.parent / "current")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_database(path: Path) -> None:
    """Remove a SQLite file and the files that SQLite keeps beside it. Ignores errors. Blocks."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            Path(f"{path}{suffix}").unlink()


def remove_leftovers(directory: Path, unused_s: float = LEFTOVER_S) -> None:
    """Remove files of killed processes. Blocks. Ignores errors.

    Such a file is not current and was not modified for `unused_s` seconds. A process that has such a file open can
    finish its reads. A process that was still building it finds the file missing, and builds another one.
    """
    current = current_path(directory)
    for path in directory.glob("c*-*"):
        with contextlib.suppress(OSError):
            if not (current and path.name.startswith(current.name)) and path.stat().st_mtime < time.time() - unused_s:
                path.unlink()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. Blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
