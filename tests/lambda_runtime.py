"""Lambda on this machine: the real runtime client (awslambdaric) on the unpacked zip, with a local Runtime API.

    with Instance(task, python, environment) as instance:
        answer = instance.invoke(http_event("GET", "/article"))

The module does what AWS does if the app relies on it: one invocation at a time; a deadline, after which the process is
killed; a freeze between invocations (SIGSTOP); 6 MB for an event and for an answer; the events of the two gateways.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote, urlsplit
from uuid import uuid4

from typing_extensions import override

from infra import artifact
from tests.local_server import LocalServer, QuietHandler

ROOT = Path(__file__).parent.parent
MAX_EVENT = 6 * 1024 * 1024
MAX_RESPONSE = 6_291_556
PERIOD_S = 0.1
"""Seconds. In each such period a throttled process runs for its share of the time."""
ARN = "arn:aws:lambda:us-east-1:123456789012:function:crudstack"


class InvocationFailed(Exception):
    """The function raised an exception, or its process ended. `error` is the report of the runtime."""

    def __init__(self, error: Any) -> None:
        super().__init__(error)
        self.error = error


class Answer(NamedTuple):
    """An answer as an HTTP client would see it."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: dict[str, Any]

    def json(self) -> Any:
        return json.loads(self.body)


class Task(NamedTuple):
    """An unpacked zip, and the Python and runtime client to run it with."""

    directory: Path
    python: Path
    client: Path


def unpack(version: str, directory: Path) -> Task:
    """Build the zip for this machine and version of Python, and install the runtime client for it.

    Raises ConfigError if that Python is not installed.
    """
    built = artifact.build(directory / "host.zip", target=artifact.host(version))
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(directory / "task")
    python = artifact.interpreter(version)
    locked = (ROOT / "requirements/dev.txt").read_text()
    wanted = ("awslambdaric", "simplejson", "snapshot-restore-py")
    blocks = re.findall(r"^\S+==(?:.*\\\n)*.*\n", locked, re.MULTILINE)
    requirements = directory / "client.txt"
    requirements.write_text("".join(block for block in blocks if block.partition("==")[0] in wanted))
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python", str(python)]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command += ["--target", str(directory / "client"), "-r", str(requirements)]
    subprocess.run(command, check=True, env=environment)
    return Task(directory / "task", python, directory / "client")


class Instance:
    """One execution environment."""

    def __init__(
        self,
        task: Task,
        environment: dict[str, str],
        directory: Path,
        *,
        snap_start: bool = False,
        handler: str = "app.handler.handler",
    ) -> None:
        self._events: queue.Queue[tuple[str, bytes, float] | None] = queue.Queue()
        self._answers: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._server = _runtime_api(self._events, self._answers)
        self._log = directory / f"lambda-{uuid4().hex}.log"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
        environment = (
            kept
            | {
                "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._server.server_port}",
                "AWS_LAMBDA_FUNCTION_NAME": "crudstack-test",
                "AWS_EXECUTION_ENV": "AWS_Lambda_python3.13",
                "LAMBDA_TASK_ROOT": str(task.directory),
                "PYTHONPATH": f"{task.directory}{os.pathsep}{task.client}",
                "TMPDIR": str(directory),
            }
            | environment
        )
        self._snap_start = snap_start
        if snap_start:
            # The snapshot must hold no keys: Lambda sets none, and the endpoint of SnapStartCredentials in their place.
            keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            environment = {name: value for name, value in environment.items() if name not in keys}
            environment["AWS_LAMBDA_INITIALIZATION_TYPE"] = "snap-start"
        command = [str(task.python), "-S", "-m", "awslambdaric", handler]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=task.directory, env=environment, stdout=log, stderr=log)

    def __enter__(self) -> Self:
        return self

    def restore(self) -> None:
        """End the wait of the runtime in `restore/next`, as Lambda does when it restores a snapshot."""
        assert self._snap_start
        self._events.put((str(uuid4()), b"{}", time.time() + 60))

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._events.put(None)  # ends the thread that still waits for an event
        self._server.shutdown()
        self._server.server_close()

    def invoke(self, event: Any, seconds: float = 29.0) -> Any:
        """Return the result of the handler.

        Raises InvocationFailed if the handler fails. Raises TimeoutError after `seconds`; the process is then killed,
        as on AWS.
        """
        payload = json.dumps(event).encode()
        assert len(json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass")) <= MAX_EVENT, (
            "AWS refuses this event"
        )
        request_id = str(uuid4())
        deadline = time.monotonic() + seconds
        self._events.put((request_id, payload, time.time() + seconds))
        while True:
            try:
                kind, body = self._answers.get(timeout=0.05)
            except queue.Empty:
                if self.process.poll() is not None:
                    raise InvocationFailed({"errorMessage": self.log()}) from None
                if time.monotonic() > deadline:
                    self.kill()
                    raise TimeoutError from None
                continue
            if kind != "response":
                raise InvocationFailed(json.loads(body))
            assert len(body) <= MAX_RESPONSE, "AWS refuses this answer: Response payload size exceeded"
            return json.loads(body)

    def request(self, method: str, path: str, seconds: float = 29.0, **how: Any) -> Answer:
        """Send an HTTP request as an event, as a gateway does."""
        return seen(self.invoke(http_event(method, path, **how), seconds))

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def throttled(self, cpus: float) -> Iterator[None]:
        """Let the process run for this share of the time only, as Lambda does with less memory than 1,769 MB."""
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                self.freeze()
                ended.wait(PERIOD_S * (1 - cpus))
                self.thaw()
                ended.wait(PERIOD_S * cpus)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the log that are JSON."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def resources(self) -> tuple[int, int]:
        """Return the resident memory in KiB, and the number of open files and connections."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+)", status)
        assert resident is not None
        return int(resident[1]), len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class CredentialsEndpoint(LocalServer):
    """The server that gives a function with SnapStart its keys. It expects a token, and counts requests.

    https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
    """

    TOKEN = "a-token-of-the-runtime"  # noqa: S105 - of these tests

    def __init__(self, access_key_id: str, secret_access_key: str, token: str = TOKEN) -> None:
        self.asked, self.lives_s = 0, 3600.0
        self.token: str | None = token
        self.answer: str | None = None
        """The answer, if it is not the keys."""
        self.expiration: str | None = None
        """The expiry of the keys, if it does not follow from `lives_s`. Lambda gives microseconds too."""
        self.failures: list[int | str] = []
        """The results of the next requests: a status, or "closed" for a connection that is closed without an answer."""
        self.dead, self.delay_s = False, 0.0
        """If `dead`, every connection is closed without an answer. Answers are delayed by `delay_s` seconds."""
        self._stopped = threading.Event()
        endpoint = self

        class Endpoint(QuietHandler):
            def do_GET(self) -> None:
                endpoint.asked += 1
                failure = "closed" if endpoint.dead else endpoint.failures.pop(0) if endpoint.failures else None
                if failure == "closed" or (endpoint.delay_s and endpoint._stopped.wait(endpoint.delay_s)):
                    self.close_connection = True
                    return
                ends = datetime.now(UTC) + timedelta(seconds=endpoint.lives_s)
                answer = {
                    "AccessKeyId": access_key_id,
                    "SecretAccessKey": secret_access_key,
                    "Token": "session",
                    "Expiration": endpoint.expiration or ends.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                }
                allowed = self.headers.get("Authorization") == endpoint.token
                status = failure if isinstance(failure, int) else 200 if allowed else 403
                body = (endpoint.answer or json.dumps(answer)).encode() if status == 200 else b'{"message": "no"}'
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        super().__init__(Endpoint)
        uri = f"{self.url}/2021-08-23/credentials"
        self.environment = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": uri, "AWS_CONTAINER_AUTHORIZATION_TOKEN": token}

    @override
    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        super().__exit__()


def _runtime_api(events: Any, answers: Any) -> ThreadingHTTPServer:
    """Start a Runtime API: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html."""

    class Api(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_GET(self) -> None:
            event = events.get()
            if event is None:
                events.put(None)
                self.close_connection = True
                return
            request_id, payload, deadline = event
            headers = {
                "Lambda-Runtime-Aws-Request-Id": request_id,
                "Lambda-Runtime-Deadline-Ms": str(int(deadline * 1000)),
                "Lambda-Runtime-Invoked-Function-Arn": ARN,
                "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1",
                "Content-Type": "application/json",
            }
            self._send(200, payload, headers)

        def do_POST(self) -> None:
            body = self._body()
            kind = self.path.rpartition("/")[2]
            answers.put(("init" if "/init/" in self.path else kind, body))
            self._send(202, b'{"status":"OK"}', {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# Events


def http_event(
    method: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    body: bytes | str | None = None,
    json_body: Any = None,
    gateway: str = "http-api",
    claims: dict[str, str] | None = None,
    stage: str = "$default",
    domain: str | None = None,
) -> dict[str, Any]:
    """Return an event of payload format 2.0.

    `path` is encoded, and includes the query. If AWS's own host name is used, it includes the stage too. An HTTP API
    decodes the path except `%25` (middleapi/standard-server#93 has captures of both); a function URL passes it
    unchanged.
    """
    headers = {name.lower(): value for name, value in (headers or {}).items()}
    if json_body is not None:
        body = json.dumps(json_body, ensure_ascii=False)
        headers.setdefault("content-type", "application/json")
    url = urlsplit(path)
    shown = decoded(url.path) if gateway == "http-api" else url.path
    host = (
        "abc123.execute-api.us-east-1.amazonaws.com" if gateway == "http-api" else "abc123.lambda-url.us-east-1.on.aws"
    )
    host = domain or host
    context: dict[str, Any] = {
        "accountId": "123456789012" if gateway == "http-api" else "anonymous",
        "apiId": "abc123",
        "domainName": host,
        "domainPrefix": "abc123",
        "http": {
            "method": method,
            "path": shown,
            "protocol": "HTTP/1.1",
            "sourceIp": "203.0.113.1",
            "userAgent": "test",
        },
        "requestId": "JKJaXmPLvHcESHA=",
        "routeKey": "$default",
        "stage": stage,
        "time": "24/Nov/2026:22:00:00 +0000",
        "timeEpoch": int(time.time() * 1000),
    }
    if claims is not None:
        context["authorizer"] = {"jwt": {"claims": claims, "scopes": None}}
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": shown,
        "rawQueryString": url.query,
        "headers": {"host": host, "x-forwarded-port": "443", "x-forwarded-proto": "https", **headers},
        "requestContext": context,
        "isBase64Encoded": isinstance(body, bytes),
    }
    if body is not None:
        event["body"] = base64.b64encode(body).decode() if isinstance(body, bytes) else body
    return event


def decoded(path: str) -> str:
    """Return a path as an HTTP API decodes it."""

    def run(match: re.Match[str]) -> str:
        raw = bytes.fromhex(match[0].replace("%", ""))
        return "%25".join(part.decode("utf-8", "replace") for part in raw.split(b"%"))

    return re.sub(r"(?:%[0-9A-Fa-f]{2})+", run, path)


def seen(returned: dict[str, Any]) -> Answer:
    """Return the answer that a client gets from the gateway for a result of the handler."""
    body = returned.get("body") or ""
    raw = base64.b64decode(body) if returned.get("isBase64Encoded") else body.encode()
    return Answer(returned["statusCode"], returned.get("headers") or {}, raw, returned)


class Gateway(LocalServer):
    """An HTTP API in front of instances, which take turns. Each serves one request at a time."""

    def __init__(self, instances: list[Instance]) -> None:
        free: queue.Queue[Instance] = queue.Queue()
        for instance in instances:
            free.put(instance)

        class Front(QuietHandler):
            disable_nagle_algorithm = True
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length).decode() if length else None
                path = quote(self.path, safe="/?&=%[]+,:;@!$'()*-._~")
                instance = free.get()
                try:
                    answer = instance.request(self.command, path, headers=dict(self.headers), body=body)
                finally:
                    free.put(instance)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name != "content-length":
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any  # noqa: N815

        super().__init__(Front)
