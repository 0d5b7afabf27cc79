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
    """The program is not installed, and cannot be fetched."""


def unpacked(program: str, local: str, needed: tuple[str, ...], notice: str, without: tuple[str, ...] = ()) -> Path:
    """Return the directory with the unpacked package of `program` and the packages that it needs.

    Two concurrent runs fetch them once, without root. A next run ignores what an interrupted run leaves. Raises
    Missing if there are no such packages.

    local    the name of the directory below `.local` for them, and for the state of apt-get during the run
    needed   prefixes of the names of packages to fetch: those that a system with Python may lack
    notice   the text for the user before the packages are fetched
    without  prefixes of the names of packages to leave out of them
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
    """Return the LD_LIBRARY_PATH for unpacked programs."""
    found = [str(path) for path in (*root.glob("usr/lib/*-linux-gnu*"), *root.glob("lib/*-linux-gnu*"))]
    return ":".join([*found, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def _release(program: str) -> str:
    """Return a name for this system, because several systems may use one checkout."""
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
    # apt-get sees no installed package, because the system may have only a part of the packages.
    (directory / "status").touch()
    settings = {
        "Dir::State": directory / "state",
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory / "cache",
        "APT::Sandbox::User": "root",  # so that another user can enter a private home; no effect without root
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    # These are not options, because apt-get splits options at spaces.
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
    """Print to the terminal of the user, also if pytest captures output."""
    try:
        with Path("/dev/tty").open("w") as terminal:
            print(text, file=terminal)
    except OSError:
        print(text, file=sys.__stderr__, flush=True)
