"""The local S3 server that commands share with `crudstack serve --local-s3`."""

from __future__ import annotations

import fcntl
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.dev import local_s3
from app.settings import LocalOverrides


@pytest.fixture
def locked(tmp_path: Path):
    """Hold the lock of the directory, as a ministack does that is being started."""
    directory = tmp_path / "ministack"
    directory.mkdir()
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def test_a_server_that_is_being_started_is_waited_for(locked: Path, monkeypatch):
    for name in (*local_s3.LOCAL_KEYS, "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:

        def begin() -> None:
            (locked / "port").write_text(str(server.server_port))
            server.serve_forever()

        timer = threading.Timer(0.3, begin)
        timer.start()
        try:
            with ExitStack() as running:
                found = local_s3.start(LocalOverrides(data_dir=str(locked.parent)), running, share=True)
            assert found.s3_endpoint_url == f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            timer.join()


def test_a_server_that_does_not_start_is_reported(locked: Path, monkeypatch):
    monkeypatch.setattr(local_s3, "START_TIMEOUT_S", 0.3)
    with pytest.raises(local_s3.ConfigError, match="does not answer: stop its process"), ExitStack() as running:
        local_s3.start(LocalOverrides(data_dir=str(locked.parent)), running, share=True)
