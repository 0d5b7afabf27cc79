"""Run the lines of docs/local.md against each server that is installed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.s3_servers import install
from tests.s3_servers.servers import running
from tests.services import S3Server, free_ports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/local.md").read_text()
SERVERS = {
    "MinIO": "minio-2026-02-12",
    "LocalStack": "localstack-4.13.1",
    "versitygw": "versitygw-1.8.0",
    "SeaweedFS": "seaweedfs-4.48",
}


def lines_of(title: str, server: S3Server, directory: Path, port: int) -> str:
    """Return the two lines below a title, for this server, a directory and a port of their own."""
    found = re.search(rf"^## {title}\n\n```sh\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/local.md has no lines for {title}"
    lines = found[1]
    assert len(lines.splitlines()) == 2
    for variable, value in zip(
        ("CRUDSTACK_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), server, strict=True
    ):
        lines, count = re.subn(rf"\b{variable}=\S+", f"{variable}={value}", lines)
        assert count == 1, f"{variable} in {found[1]}"
    assert "\nmake run\n" in lines
    return lines.replace("\nmake run\n", f"\nexec make run PORT={port} LOCAL_DIR={directory}\n")


@contextlib.contextmanager
def serving(script: str, url: str, log: Path) -> Iterator[httpx.Client]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TEST_", "CRUDSTACK_"))
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=inherited, stdout=out, stderr=out, start_new_session=True
        )
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield client
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.parametrize("title", SERVERS)
def test_make_run_works_as_documented(title: str, tmp_path: Path):
    directory = tmp_path / "s3"
    directory.mkdir()
    with running(SERVERS[title], directory) as running_server:
        server = running_server.s3
        (port,) = free_ports(1)
        script, url = lines_of(title, server, tmp_path / "local", port), f"http://127.0.0.1:{port}"
        with serving(script, url, tmp_path / "log") as client:
            body = {"title": title, "content": "It was here.", "author": "a"}
            path = client.post("/article", json=body).raise_for_status().headers["location"]
        with serving(script, url, tmp_path / "log") as client:
            assert client.get(f"{path}/data").raise_for_status().json()["title"] == title


def test_make_run_after_localstack_lost_its_data(tmp_path: Path):
    """The server refuses, and prints the command that removes the copies. After that it starts with an empty store."""
    directory = tmp_path / "s3"
    directory.mkdir()
    with running("localstack-4.13.1", directory) as server:
        (port,) = free_ports(1)
        script, url = lines_of("LocalStack", server.s3, tmp_path / "local", port), f"http://127.0.0.1:{port}"
        body = {"title": "t", "content": "", "author": "a"}
        with serving(script, url, tmp_path / "log") as client:
            client.post("/article", json=body).raise_for_status()
        server.stop()
        server.start()
        environment = {name: os.environ[name] for name in ("PATH", "HOME")}
        refused = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert refused.returncode != 0
        command = re.search(r"remove the local copies: (rm -r .*)", refused.stderr)
        assert command is not None, refused.stderr
        subprocess.run(["bash", "-c", command[1]], cwd=ROOT, check=True)
        with serving(script, url, tmp_path / "log") as client:
            assert client.get("/article/count").json() == {"count": 0}
            client.post("/article", json=body).raise_for_status()


def test_the_table_names_what_is_tested():
    for server in install.SERVERS.values():
        assert re.search(
            rf"^\| {server.name} \| {re.escape(server.version)} \| each run", PAGE, re.MULTILINE | re.IGNORECASE
        )
