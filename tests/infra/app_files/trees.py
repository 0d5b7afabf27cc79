"""Helpers that write trees of files, run git, and copy the selected files of an app."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from infra.app_files import PRIVATE, copy, select

PEM = f"-----BEGIN {PRIVATE}-----\nMIIE\n-----END {PRIVATE}-----\n"


def git(directory: Path, *arguments: str) -> None:
    """Run git without the settings of this machine's user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    nobody = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "protocol.file.allow=always")
    subprocess.run(
        ["git", *nobody, *arguments],
        cwd=directory,
        env=environment | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        check=True,
        capture_output=True,
    )


def put(app: Path, *paths: str, content: str | bytes = "x") -> None:
    for path in paths:
        (app / path).parent.mkdir(parents=True, exist_ok=True)
        (app / path).write_bytes(content.encode() if isinstance(content, str) else content)


def chosen(app: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    selection = copy(app, select(app), tmp_path / "copy")
    found = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*"))
    assert [path for path in found if (tmp_path / "copy" / path).is_file()] == sorted(selection.files)
    return selection.files, dict(selection.left_out)
