"""PgBouncer for the tests, in transaction mode: a plain process on a free loopback port, stopped by its pid.

An installed pgbouncer is used. Otherwise the package of this Debian or Ubuntu is fetched and unpacked below
`.local/pgbouncer`, once, without root: Debian 12 has 1.18, where prepared statements fail in transaction mode.
`python -m tests.pgbouncer` does that in advance.

`TEST_PGBOUNCER` has the address of the one in use, for processes that a test starts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.debian import Missing, libraries, unpacked
from tests.not_run import not_run
from tests.postgres import Postgres, as_somebody

NEEDED = (
    *("pgbouncer", "libcares", "libc-ares", "libevent-2", "libssl3", "libpam0g", "libsystemd0"),
    *("libaudit", "libcap", "libgcrypt", "libgpg-error", "liblz", "libzstd"),
)
START_TIMEOUT_S = 30.0
SERVER_CONNECTIONS = 4


@functools.cache
def program() -> tuple[str, Mapping[str, str]]:
    """Return PgBouncer's executable and the environment that it needs. Raises Missing if it cannot be installed."""
    if found := shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return found, {}
    root = unpacked("pgbouncer", "pgbouncer", NEEDED, "PgBouncer for the tests: fetching the packages, 4 MB, once ...")
    probe = as_somebody("test", "-x", root / "usr/sbin/pgbouncer")
    if subprocess.run(probe, check=False, cwd="/").returncode != 0:  # for example, below a private home
        copy = Path(tempfile.mkdtemp(prefix="crudstack-pgbouncer-programs-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        shutil.copytree(root, copy, symlinks=True, dirs_exist_ok=True)
        copy.chmod(0o755)
        root = copy
    return str(root / "usr/sbin/pgbouncer"), {"LD_LIBRARY_PATH": libraries(root)}


class PgBouncer:
    """A pooler in front of a server, with `SERVER_CONNECTIONS` for each user and database. `users` need no password."""

    def __init__(self, server: str, *users: str) -> None:
        self._program, self._environment = program()
        self.directory = Path(tempfile.mkdtemp(prefix="crudstack-pgbouncer-"))
        self.directory.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.server, parts = server, urlsplit(server)
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "default_pool_size": SERVER_CONNECTIONS,
            "max_client_conn": 1000,
            "auth_type": "trust",
            "auth_file": self.directory / "users",
            "admin_users": "admin",
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self.directory / "ini").write_text(
            f"[databases]\n* = host={parts.hostname} port={parts.port}\n[pgbouncer]\n{lines}"
        )
        (self.directory / "users").write_text("".join(f'"{user}" ""\n' for user in ("admin", *users)))
        self._process: subprocess.Popen[bytes] | None = None

    def dsn(self, user: str, database: str) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        log = self.directory / "log"
        with log.open("w") as output:
            self._process = subprocess.Popen(
                as_somebody(self._program, self.directory / "ini"),
                env={**os.environ, **self._environment},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PgBouncer did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the pooler, as in a crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return the rows of a SHOW command of the admin console."""
        with psycopg.connect(self.dsn("admin", "pgbouncer"), autocommit=True) as connection:
            cursor = connection.execute(f"SHOW {what}".encode())
            assert cursor.description is not None
            return [dict(zip((column.name for column in cursor.description), row, strict=True)) for row in cursor]


@contextlib.contextmanager
def running(server: str, *users: str) -> Iterator[PgBouncer]:
    """Start a pooler for one test. If there is no PgBouncer, the test does not run."""
    try:
        pooler = PgBouncer(server, *users)
    except Missing as error:
        not_run(f"PgBouncer: {error}\nInstall the package pgbouncer.")
    try:
        pooler.start()
        yield pooler
    finally:
        pooler.remove()


@pytest.fixture(scope="session")
def pgbouncer() -> Iterator[PgBouncer]:
    """Run a pooler in front of its own server, for the superuser `crud` and the user `crud_app` of app.bootstrap."""
    server = Postgres("-c fsync=off")  # it has many tables, and no test needs them after a crash
    try:
        with running(server.dsn, "crud", "crud_app") as pooler:
            os.environ["TEST_PGBOUNCER"] = pooler.dsn("crud", "postgres")
            yield pooler
    finally:
        server.remove()


def main() -> None:
    """Fetch the package if it is missing, and print its version."""
    try:
        found, environment = program()
    except Missing as error:
        sys.exit(f"{error}\nInstall the package pgbouncer.")
    subprocess.run([found, "--version"], env={**os.environ, **environment}, check=True)


if __name__ == "__main__":
    main()
