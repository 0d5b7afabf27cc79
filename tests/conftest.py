"""Fixtures for several tests, such as a server on a free loopback port that is stopped by its pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests import not_run
from tests.pgbouncer import pgbouncer
from tests.postgres import postgres
from tests.rabbitmq import rabbitmq
from tests.services import BUCKET, S3Server, ministack_s3, s3_server, seaweed_s3
from tests.valkey import valkey

# The many processes of the tests take half of their start to compile the modules that they import. So they keep the
# bytecode, as on the machine of a user, even if this environment, such as that of a container, turns that off.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

__all__ = ["ministack_s3", "pgbouncer", "postgres", "rabbitmq", "s3_server", "seaweed_s3", "serve", "valkey"]


class Server:
    """`crudstack serve` as a process."""

    def __init__(
        self,
        storage: str,
        data_dir: Path,
        *arguments: str,
        s3: S3Server | None = None,
        prefix: str = "",
        environment: Mapping[str, str] = {},
        max_files: int | None = None,
        module: str = "app.cli",
    ) -> None:
        more = environment
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CRUDSTACK_", "AWS_"))}
        environment |= {"CRUDSTACK_STORAGE": storage, "CRUDSTACK_DATA_DIR": str(data_dir), "CRUDSTACK_BUCKET": BUCKET}
        if s3 is not None:
            environment |= {
                "CRUDSTACK_S3_ENDPOINT_URL": s3.url,
                "CRUDSTACK_PREFIX": prefix,
                "AWS_ACCESS_KEY_ID": s3.access_key_id,
                "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
            }
        environment |= more
        command = [sys.executable, "-c", f"from {module} import main; main()", "serve", "--port", "0", *arguments]
        if max_files is not None:
            command = ["sh", "-c", f'ulimit -n {max_files}; exec "$0" "$@"', *command]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self.said = []
        for line in self.process.stdout:
            self.said.append(line.strip())
            if line.startswith("docs at "):
                self.url = line.removeprefix("docs at ").partition("/docs")[0]
                return
        raise AssertionError(f"the server ended with {self.process.wait()} and said {self.said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, *, close: bool = True) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0
        if close:
            self.process.stdout.close()


@pytest.fixture
def bucket(ministack_s3) -> str:
    """Create a bucket for one test, and return its name."""
    name = f"own-{uuid.uuid4().hex[:12]}"
    httpx.put(f"{ministack_s3.url}/{name}").raise_for_status()
    return name


@pytest.fixture
def database(postgres) -> str:
    """Create a database for one test, and return its address."""
    name = f"own_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{postgres.rpartition('/')[0]}/{name}"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers. Servers that still run at the end are killed."""
    with contextlib.ExitStack() as stack:

        def start(storage: str, data_dir: Path, *arguments: str, **s3: Any) -> Server:
            server = Server(storage, data_dir, *arguments, **s3)
            stack.callback(server.process.stdout.close)
            stack.callback(server.kill)
            return server

        yield start


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print which tests did not run, and why."""
    for line in not_run.summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line, yellow=True)
