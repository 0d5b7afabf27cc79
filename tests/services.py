"""Real servers for the tests: on loopback, on free ports, in temporary directories, stopped by pid.

A fixture's address also goes into the environment, where processes that a test starts find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore, s3
from app.dev.local_s3 import make_bucket, ministack

BUCKET = "tests"
WEED = Path(sys.executable).with_name("weed")


class S3Server(NamedTuple):
    url: str
    access_key_id: str
    secret_access_key: str

    def object_store(self) -> S3ObjectStore:
        return s3(BUCKET, self.url, self.access_key_id, self.secret_access_key, "us-east-1")


@pytest.fixture(scope="session")
def ministack_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as url:
        server = S3Server(url, "local", "local")
        os.environ["TEST_MINISTACK"] = json.dumps(server)
        httpx.put(f"{url}/{BUCKET}").raise_for_status()
        yield server


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Return the server for the S3 slice (`pytest -m s3_slice`).

    It is ministack, or the server in TEST_S3_ENDPOINT_URL, with AWS keys. A named server keeps the data. Each process
    has its own bucket there, because prefixes are named after tests and repeat in other processes and runs.
    """
    url = os.environ.get("TEST_S3_ENDPOINT_URL")
    server: S3Server = request.getfixturevalue("ministack_s3") if url is None else named(url)
    os.environ["TEST_S3"] = json.dumps(server)
    os.environ["TEST_S3_BUCKET"] = BUCKET if url is None else f"tests-{uuid.uuid4().hex[:12]}"
    if url is not None:
        make_bucket(os.environ["TEST_S3_BUCKET"], url, "us-east-1")
    return server


def named(url: str) -> S3Server:
    """Return a server that the tests did not start, with the ambient keys. Raises AssertionError without keys."""
    keys = [os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    if not all(keys):
        raise AssertionError(
            "TEST_S3_ENDPOINT_URL is set without keys, expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY beside it:"
            " set both"
        )
    return S3Server(url.rstrip("/"), *map(str, keys))


@pytest.fixture(scope="session")
def seaweed_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that checks signatures."""
    directory = tmp_path_factory.mktemp("seaweed")
    (port,) = free_ports(1)
    server = S3Server(f"http://127.0.0.1:{port}", "weed-key", "weed-secret-0123456789")
    command = seaweed_command(WEED, server, port, directory)
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT)
    try:
        _make_bucket(server, process, directory / "log")
        os.environ["TEST_SEAWEED"] = json.dumps(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # it sometimes waits for half a minute before it ends
            process.kill()
            process.wait(30)


def seaweed_command(program: Path, server: S3Server, port: int, data: Path) -> list[str]:
    """Return the command that starts SeaweedFS with these keys, and write its configuration beside its data."""
    credentials = [{"accessKey": server.access_key_id, "secretKey": server.secret_access_key}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = data / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    command = [str(program), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}"]
    ports = zip(("s3", "master", "volume", "filer"), (port, *free_ports(3)), strict=True)
    return [*command, *(f"-{name}.port={number}" for name, number in ports)]


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(Exception):
            create_bucket(BUCKET, server)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def create_bucket(name: str, server: S3Server) -> None:
    """Create a bucket with a server's keys.

    During the call the keys are in the environment, which may have the keys of a named server before and after it.
    """
    keys = {"AWS_ACCESS_KEY_ID": server.access_key_id, "AWS_SECRET_ACCESS_KEY": server.secret_access_key}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in keys.items():
            patch.setenv(variable, value)
        make_bucket(name, server.url, "us-east-1")


_given: set[int] = set()
"""Ports that this process has given out. Their servers may not listen yet."""


def free_ports(count: int) -> list[int]:
    """Return free ports that were not given out before.

    The ports 10,000 above them are free too, because SeaweedFS uses both.
    """
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in range(20000 + os.getpid() % 5000, 32000):
            if port in _given:
                continue
            with contextlib.suppress(OSError):
                for one in (port, port + 10000):
                    probe = held.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", one))
                found.append(port)
            if len(found) == count:
                _given.update(found)
                return found
    raise AssertionError("there are no free ports")


def given(name: str) -> S3Server:
    """Return the server of a fixture. Also works in processes that a test starts."""
    return S3Server(*json.loads(os.environ[name]))
