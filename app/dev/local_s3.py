"""S3 on this machine: ministack as a child process, and the creation of buckets on other servers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from ..autocrud.errors import ConfigError
from ..autocrud.resource_manager.runtime.files import lock_within
from ..settings import LocalOverrides

START_TIMEOUT_S = 60.0
OWNER_TIMEOUT_S = 10.0
"""Seconds to wait for another ministack that uses the directory."""
LOCAL_KEYS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_REGION": "us-east-1"}
"""ministack only checks the signatures of presigned URLs, and knows these keys. Other requests must be signed too."""

_DYING_WITH_PARENT = (
    (
        *(sys.executable, "-I", "-S", "-c"),
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])",
    )
    if sys.platform == "linux"
    else ()
)
"""A command before another one: the kernel ends it (SIGTERM) if its parent is killed: prctl PR_SET_PDEATHSIG. It is not
done between fork and exec, because there a process with threads may run no Python."""


def start(local: LocalOverrides, running: contextlib.ExitStack, *, share: bool = False) -> LocalOverrides:
    """Run an S3 server with its data in the data directory until `running` ends, and use keys that it accepts.

    share  whether to use the server of another process if one runs there

    Returns the settings with its address. Raises ConfigError.
    """
    if local.data_dir is None:
        raise ConfigError("CRUDSTACK_DATA_DIR is not set: --local-s3 keeps its data in that directory")
    directory = Path(local.data_dir).expanduser() / "ministack"
    url = _running(directory) if share else None
    if url is None:
        url = running.enter_context(ministack(directory))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(LOCAL_KEYS)
    return replace(local, s3_endpoint_url=url)


def _running(directory: Path) -> str | None:
    """Return the URL of the ministack that uses a directory, or None if none does. Waits for one that is being started.

    Raises ConfigError if it does not answer.
    """
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            try:
                lock_within(0, lock, 0.05)
            except BlockingIOError:
                with contextlib.suppress(OSError):  # the port is written after the lock was taken
                    url = f"http://127.0.0.1:{int((directory / 'port').read_text() or 0)}"
                    if _answers(url):
                        return url
                time.sleep(0.05)
            else:
                return None
    finally:
        os.close(lock)
    raise ConfigError(f"the local S3 on {directory} does not answer: stop its process, and try again")


@contextlib.contextmanager
def ministack(directory: Path) -> Iterator[str]:
    """Run ministack on a free loopback port with its data in `directory`, and yield its URL.

    Raises ConfigError if it does not start, or if another ministack uses the directory: each keeps its state in memory,
    so two of them would both acknowledge writes of which only one survives.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with _owned(directory) as lock:
        yield from _run(directory, lock)


def _run(directory: Path, lock: int) -> Iterator[str]:
    port = _free_port(directory / "port")
    inherited = {name: value for name, value in os.environ.items() if name != "AWS_SESSION_TOKEN"}
    environment = inherited | {
        **LOCAL_KEYS,
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(directory / "s3"),
        "PERSIST_STATE": "1",
        "STATE_DIR": str(directory / "state"),
        "LOG_LEVEL": "WARNING",
    }
    log = directory / "ministack.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        # A new session, so that Ctrl-C reaches only `crudstack serve`, which needs ministack for an orderly shutdown.
        process = subprocess.Popen(
            [*_DYING_WITH_PARENT, str(Path(sys.executable).with_name("ministack"))],
            env=environment,
            cwd=directory,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),  # ministack holds the lock until it has ended, even if this process is killed
        )
    try:
        _await(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _owned(directory: Path) -> Iterator[int]:
    """Hold the lock of a directory. Waits for another process that holds it, because that may be shutting down."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            lock_within(OWNER_TIMEOUT_S, lock, 0.05)
        except BlockingIOError:
            raise _taken(directory) from None
        yield lock
    finally:
        os.close(lock)


def _taken(directory: Path) -> ConfigError:
    with contextlib.suppress(OSError):
        port = (directory / "port").read_text()
        return ConfigError(
            f"another local S3 runs on {directory}: stop it, take another CRUDSTACK_DATA_DIR (make run LOCAL_DIR=...),"
            f" or share it, with CRUDSTACK_S3_ENDPOINT_URL=http://127.0.0.1:{port} AWS_ACCESS_KEY_ID=local"
            " AWS_SECRET_ACCESS_KEY=local"
        )
    return ConfigError(f"another local S3 is being started on {directory}: take another CRUDSTACK_DATA_DIR")


def _free_port(memory: Path) -> int:
    """Return the port of the last run if it is free, else another one.

    The names of local copies depend on the port.
    """
    try:
        last = int(memory.read_text())
    except (OSError, ValueError):
        last = 0
    for wanted in (last, 0):
        with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted))
            port: int = probe.getsockname()[1]
            memory.write_text(str(port))
            return port
    raise ConfigError("there is no free port on 127.0.0.1")


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(url):
            return
        time.sleep(0.05)
    raise ConfigError(f"the local S3 (ministack) did not start; {log} says why")


def _answers(url: str) -> bool:
    """Return whether a server answers. An error response shows too that it runs."""
    try:
        with urllib.request.urlopen(f"{url}/_ministack/health", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def make_bucket(bucket: str, endpoint_url: str | None, region: str | None) -> None:
    """Create a bucket if it does not exist, with the ambient credentials. Raises ConfigError if that fails."""
    import boto3
    import botocore.config
    import botocore.exceptions

    once = botocore.config.Config(retries={"max_attempts": 2}, connect_timeout=5, s3={"addressing_style": "path"})
    try:
        # Not the default session, because that keeps the credentials of its first use.
        client = boto3.Session().client("s3", endpoint_url=endpoint_url, region_name=region or "us-east-1", config=once)
        try:
            client.head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            elsewhere = (
                {} if region in (None, "us-east-1") else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            )
            client.create_bucket(Bucket=bucket, **elsewhere)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise ConfigError(f"the bucket {bucket!r} cannot be created at {endpoint_url or 'AWS'}: {error}") from None
