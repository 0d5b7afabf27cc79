"""An HTTP proxy that makes a good S3 server faulty: a conditional PUT compares first and writes some time later."""

from __future__ import annotations

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.local_server import LocalServer, QuietHandler

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class CheckThenActProxy(LocalServer):
    """Forwards requests to the server of a URL.

    While `delay` is not None, it compares the conditions of PUTs itself, on average `delay` seconds before it sends the
    PUT.
    """

    def __init__(self, url: str, delay: float | None) -> None:
        self.delay = delay
        self.most_at_once = 0
        """The most connections that had a request at the same moment."""
        self._at_once = 0
        self._mutex = threading.Lock()
        self._to = urlsplit(url).netloc
        proxy = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve  # noqa: N815

        super().__init__(Handler)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        with self._mutex:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in handler.headers.items() if name.lower() not in HOP_BY_HOP}
            if handler.command == "PUT" and self.delay is not None:
                match, none_match = headers.pop("if-match", None), headers.pop("if-none-match", None)
                if match is not None or none_match is not None:
                    etag = self._etag(handler.path)
                    time.sleep(random.uniform(0, 2 * self.delay))  # random, so that concurrent writers overlap
                    if (etag is not None) if match is None else (etag != match):
                        _answer(handler, 412, {}, b"")
                        return
            status, answered, content = self._ask(handler.command, handler.path, body, headers)
            _answer(handler, status, answered, content)
        finally:
            with self._mutex:
                self._at_once -= 1

    def _etag(self, path: str) -> str | None:
        status, headers, _ = self._ask("HEAD", path, b"", {})
        return headers["ETag"] if status == 200 else None

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._to, timeout=30)
        try:
            connection.request(method, path, body if body or method == "PUT" else None, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()


def _answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in HOP_BY_HOP:
            handler.send_header(name, value)
    if status not in (204, 304):
        length = headers.get("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", length or str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)
