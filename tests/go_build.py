"""Build a command of a Go module that this checkout pins, with its progress; for programs that only tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def cache(*parts: str) -> Path:
    """Return a path in the user's cache. It may not exist yet."""
    directory = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(directory, "crudstack", *parts)


def build(label: str, command: str, module: Path, target: Path, *, linked: str = "", instead: str = "") -> Path:
    """Build a command and return its path. Raises SystemExit with one sentence if that fails.

    label    its name in messages, "minio 2026-02-12"
    command  the import path of its package
    module   the directory whose go.mod and go.sum pin it, with all its modules and their checksums
    target   the file to write
    linked   more flags for the linker
    instead  an alternative for a user without Go, for the message: ", or pulumi itself"
    """
    if shutil.which("go") is None:
        raise SystemExit(
            f"{label} is not in {target.parent} and cannot be built, because there is no `go` on PATH: install"
            f" Go{instead}, and try again"
        )
    # A workspace and flags of the user do not change the build.
    environment = {**os.environ, "GOWORK": "off", "GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}
    print(f"{label}: fetching its modules", file=sys.stderr, flush=True)
    listed = subprocess.run(
        ["go", "list", "-deps", command], cwd=module, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if listed.returncode:
        raise SystemExit(f"{label} cannot be built: go could not fetch its modules, as it says above")
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # A file with its final name is complete. A build that is killed leaves no such file.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
        built = Path(scratch, target.name)
        flags = f"-s -w {linked}".strip()
        build = ["go", "build", "-v", "-trimpath", "-ldflags", flags, "-o", str(built), command]
        _watched(build, module, environment, len(listed.stdout.split()), label)
        built.replace(target)
    print(f"{label}: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return target


def _watched(command: list[str], module: Path, environment: dict[str, str], packages: int, label: str) -> None:
    """Run `go build -v`, which names each compiled package, and show its progress."""
    said: list[str] = []
    shown, terminal = -1, sys.stderr.isatty()
    with subprocess.Popen(command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            said.append(line.rstrip())
            tenth = 10 * len(said) // packages
            if terminal:
                bar = "#" * (3 * tenth)
                print(f"\r{label}: [{bar:<30}] {len(said)} of up to {packages} packages", end="", file=sys.stderr)
            elif tenth > shown:
                print(f"{label}: {len(said)} of up to {packages} packages", file=sys.stderr, flush=True)
            shown = tenth
    if terminal and said:
        print(file=sys.stderr)
    if running.returncode:
        raise SystemExit("\n".join([*said[-5:], f"{label} could not be built, see above"]))
