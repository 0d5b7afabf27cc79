"""A stack with a function for backups: its handler and its bucket are real, Lambda is a stand-in."""

from __future__ import annotations

import io
import json
import threading
import time
from typing import Any
from uuid import uuid4

import boto3
import pytest

from app import settings
from app.backup_function import MARGIN_S, BackupFunction
from app.dev.local_s3 import make_bucket
from tests.local_server import LocalServer, QuietHandler
from tests.services import S3Server

INVOCATIONS = "/2015-03-31/functions/{name}/invocations"


class Context:
    """The context of an invocation whose work may take `seconds`."""

    def __init__(self, seconds: float = 900) -> None:
        self._ends = time.monotonic() + seconds + MARGIN_S

    def get_remaining_time_in_millis(self) -> int:
        return int(1000 * (self._ends - time.monotonic()))


class Lambda:
    """Calls the handler, one call at a time, as an instance of Lambda does.

    settings  of the function
    seconds   how long the work of a call may take
    """

    def __init__(self, given: settings.Settings) -> None:
        self.settings, self.handler, self._lock = given, BackupFunction(given), threading.Lock()
        self.events: list[dict[str, Any]] = []
        self.seconds: float = 900

    def call(self, event: dict[str, Any]) -> bytes:
        with self._lock:
            self.events.append(event)
            return json.dumps(self.handler(event, Context(self.seconds))).encode()

    @property
    def name(self) -> str:
        name = self.settings.outputs.backup_function_name
        assert name is not None
        return name

    def close(self) -> None:
        """Close the stores, in the loop that uses them."""
        loop = self.handler._loop
        loop.run_until_complete(self.handler.close())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class LambdaServer(LocalServer):
    """The API of Lambda, for commands that run as programs."""

    def __init__(self, function: Lambda) -> None:
        class Api(QuietHandler):
            def do_POST(self) -> None:
                event = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, body = (
                    (200, function.call(event)) if self.path == INVOCATIONS.format(name=function.name) else (404, b"{}")
                )
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        super().__init__(Api)


class Stacks:
    """Stacks that share a bucket, each with a prefix and a function of its own."""

    def __init__(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self._s3 = s3
        self._client = boto3.session.Session.client
        self.environment = {
            "AWS_ACCESS_KEY_ID": s3.access_key_id,
            "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
            "AWS_ENDPOINT_URL": s3.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        self.bucket = f"stacks-{uuid4().hex[:12]}"
        make_bucket(self.bucket, s3.url, "us-east-1")
        self._functions: dict[str, Lambda] = {}

        def client(session: Any, name: str, **more: Any) -> Any:
            return self if name == "lambda" else self._client(session, name, **more)

        monkeypatch.setattr(boto3.session.Session, "client", client)

    def invoke(self, FunctionName: str, Payload: bytes) -> dict[str, Any]:  # noqa: N803 - as boto3 names them
        """Call the function, as the client of Lambda does."""
        return {"Payload": io.BytesIO(self._functions[FunctionName].call(json.loads(Payload)))}

    def outputs(self, prefix: str, storage: str) -> dict[str, Any]:
        return {
            "version": 1,
            "storage": storage,
            "bucket": self.bucket,
            "prefix": prefix,
            "region": "us-east-1",
            "backup_function_name": f"backup-{prefix}",
            "auth": {"mode": "none"},
        }

    def make(self, prefix: str, storage: str = "s3-sqlite", **servers: Any) -> tuple[settings.Settings, Lambda]:
        """Return the settings of a command for a new stack, and its function, which reaches the servers."""
        outputs = settings.StackOutputs(**self.outputs(prefix, storage) | {"auth": settings.NoAuth()})
        inside = settings.Settings(outputs, settings.LocalOverrides(s3_endpoint_url=self._s3.url, **servers))
        outside = settings.Settings(outputs, settings.LocalOverrides(s3_endpoint_url=self._s3.url))
        function = Lambda(inside)
        self._functions[function.name] = function
        return outside, function

    def keys(self, prefix: str = "_exports/") -> list[str]:
        """Return the keys of all versions of objects, deleted ones too."""
        client = self._client(boto3.session.Session(), "s3")
        found = client.list_object_versions(Bucket=self.bucket, Prefix=prefix)
        return [one["Key"] for one in [*found.get("Versions", []), *found.get("DeleteMarkers", [])]]

    def close(self) -> None:
        for function in self._functions.values():
            function.close()
