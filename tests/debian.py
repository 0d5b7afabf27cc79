"""Packages of this Debian or Ubuntu for the tests: fetched by apt-get and unpacked, without a change to the system."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LOCAL = Path(__file__).absolute().parent.parent / ".local"


class Missing(Exception):
    """There is no such program, and none can be had."""


def unpacked(program: str, local: str, needed: tuple[str, ...], notice: str, without: tuple[str, ...] = ()) -> Path:
    """Return the directory that the package of `program` lies unpacked in, with all packages that it needs.

    Two runs at once fetch them once, without root. An interrupted run leaves nothing that counts. Raises Missing if
    there are none.

    local    name of the directory below `.local` that keeps them, and apt-get's state meanwhile
    needed   what the names of the packages begin with: what is not part of every system that runs Python
    notice   what the person is told before they are fetched
    without  what the names of packages begin with that are left out all the same
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Missing(f"there is no {program} on PATH, and no {tool} to fetch one with")
    directory = LOCAL / local
    root = directory / _release(program)
    if root.exists():
        return root
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            unpacking = directory / f"{root.name}.new"
            shutil.rmtree(unpacking, ignore_errors=True)
            for package in _packages(program, directory / "apt", needed, notice, without):
                _run(program, "dpkg", "-x", str(package), str(unpacking))
            unpacking.rename(root)
            shutil.rmtree(directory / "apt", ignore_errors=True)
    return root


def libraries(root: Path) -> str:
    """Return the LD_LIBRARY_PATH of programs that were unpacked."""
    found = [str(path) for path in (*root.glob("usr/lib/*-linux-gnu*"), *root.glob("lib/*-linux-gnu*"))]
    return ":".join([*found, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def _release(program: str) -> str:
    """A checkout may be used on several systems."""
    with contextlib.suppress(OSError):
        lines = Path("/etc/os-release").read_text().splitlines()
        of = dict(line.split("=", 1) for line in lines if "=" in line)
        names = [of.get(name, "").strip('"') for name in ("ID", "VERSION_ID")]
        return "-".join([*filter(None, names), _run(program, "dpkg", "--print-architecture").strip()])
    return "unknown"


def _packages(
    program: str, directory: Path, needed: tuple[str, ...], notice: str, without: tuple[str, ...]
) -> list[Path]:
    shutil.rmtree(directory, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial", "packages"):
        (directory / name).mkdir(parents=True)
    # As if nothing were installed: what the system has of it may be half of it.
    (directory / "status").touch()
    settings = {
        "Dir::State": directory / "state",
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory / "cache",
        "APT::Sandbox::User": "root",  # another user could not enter a closed home; without root it changes nothing
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    # Not as options: they are split at spaces.
    configuration = directory / "apt.conf"
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {"APT_CONFIG": str(configuration)}
    _say(notice)
    _run(program, "apt-get", "-q", "update", environment=environment)
    install = ("apt-get", "-q", "-s", "--no-install-recommends", "install", program)
    plan = _run(program, *install, environment=environment)
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    wanted = [name for name in names if name.startswith(needed) and not name.startswith(without)]
    _run(program, "apt-get", "-q", "download", *wanted, environment=environment, cwd=directory / "packages")
    return sorted((directory / "packages").glob("*.deb"))


def _run(program: str, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Missing(
            f"there is no {program} on PATH, and it could not be fetched: {' '.join(command[:3])} ended with"
            f" {done.returncode} and said\n{done.stdout[-1500:]}"
        )
    return done.stdout


def _say(text: str) -> None:
    """To the person, whatever pytest does with output."""
    try:
        with Path("/dev/tty").open("w") as terminal:
            print(text, file=terminal)
    except OSError:
        print(text, file=sys.__stderr__, flush=True)
