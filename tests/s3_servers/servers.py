"""Run S3 servers of other projects on loopback, with their data in a directory, and kill and restart them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import httpx

from tests.not_run import not_run
from tests.s3_servers.install import SERVERS
from tests.services import S3Server, free_ports, seaweed_command

KEY, SECRET = "crudstack-tests", "crudstack-tests-secret"
READY_S = 90


class Start(NamedTuple):
    """The command that starts a server, and additional environment variables."""

    command: list[str]
    environment: Mapping[str, str] = MappingProxyType({})


def minio(program: Path, port: int, data: Path) -> Start:
    (console,) = free_ports(1)
    addresses = ["--address", f"127.0.0.1:{port}", "--console-address", f"127.0.0.1:{console}"]
    return Start(
        [str(program), "server", str(data), *addresses], {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET}
    )


def versitygw(program: Path, port: int, data: Path) -> Start:
    return Start(
        [
            str(program),
            "--port",
            f"127.0.0.1:{port}",
            "--access",
            KEY,
            "--secret",
            SECRET,
            "--quiet",
            "posix",
            str(data),
        ]
    )


def localstack(program: Path, port: int, data: Path) -> Start:
    """S3 alone. It keeps everything in memory and in a temporary directory: a restart loses it."""
    environment = {
        "ACTIVATE_PRO": "0",
        "SERVICES": "s3",
        "STRICT_SERVICE_LOADING": "1",
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "DNS_ADDRESS": "0",
        "DISABLE_EVENTS": "1",
        "S3_SKIP_SIGNATURE_VALIDATION": "0",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "HOME": str(data),
        "TMPDIR": str(data),
        "XDG_CACHE_HOME": str(data / "cache"),
    }
    return Start([str(program), "-m", "localstack.runtime.main"], environment)


def rclone(program: Path, port: int, data: Path) -> Start:
    options = [
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY},{SECRET}",
        "--config",
        str(data.parent / "rclone.conf"),
    ]
    return Start([str(program), "serve", "s3", *options, str(data)])


def s3rver(program: Path, port: int, data: Path) -> Start:
    return Start(["node", str(program), "--address", "127.0.0.1", "--port", str(port), "--directory", str(data)])


def seaweedfs(program: Path, port: int, data: Path) -> Start:
    return Start(seaweed_command(program, S3Server(f"http://127.0.0.1:{port}", KEY, SECRET), port, data))


STARTS: dict[str, Callable[[Path, int, Path], Start]] = {
    start.__name__: start for start in (minio, versitygw, seaweedfs, localstack, rclone, s3rver)
}
KEYS = {"s3rver": ("S3RVER", "S3RVER"), "localstack": ("test", "test")}
"""Servers that have keys of their own. LocalStack accepts others too, but not in presigned URLs."""


class Running:
    """A server that was installed. `key`: its name and version in `install.SERVERS`."""

    def __init__(self, key: str, directory: Path) -> None:
        self.server = SERVERS[key]
        program = self.server.find()
        if program is None:
            not_run(f"the S3 server {key}, which is not in {self.server.directory}: run `make s3-servers`")
        (port,) = free_ports(1)
        data = directory / "data"
        data.mkdir()
        command, environment = STARTS[self.server.name](program, port, data)
        self._command = command
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TEST_"))}
        self._environment = {**inherited, **environment}
        self._directory, self._log = directory, directory / "log"
        self.s3 = S3Server(f"http://127.0.0.1:{port}", *KEYS.get(self.server.name, (KEY, SECRET)))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers. Raises AssertionError with its last words if it does not."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.s3.url, timeout=2).status_code < 500:
                    return
            time.sleep(0.05)
        words = self._log.read_text(errors="replace")[-3000:]
        self.stop()
        raise AssertionError(f"{self.server.name} {self.server.version} does not answer:\n{words}")

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None, "it was started"
        os.killpg(self._process.pid, number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it and what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def running(key: str, directory: Path) -> Iterator[Running]:
    """Run a server while the block lasts. `directory`: an empty one for its data and its log."""
    server = Running(key, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
