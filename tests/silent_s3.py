"""An S3 server that answers as a test plans: not at all, with half an answer, or with an error. It counts requests."""

from __future__ import annotations

import functools
import hashlib
import re
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

SILENT, HALF = "silent", "half"
"""Plans: no answer, or half of its body. The connection stays open without further bytes."""


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


class SilentS3:
    """One bucket in memory.

    `plan` returns the result of a request: None (it is answered), SILENT, HALF, or status and code of an error, such as
    "403 RequestTimeTooSkewed".
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.plan: Callable[[Request], str | None] = lambda _: None
        self.before_answer: Callable[[], object] = lambda: None
        self.connections = 0
        self.page = 1000
        self._mutex = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            with connection.makefile("rb") as file:
                while line := file.readline():
                    method, target, _ = line.decode().split()
                    headers: dict[str, str] = {}
                    while (line := file.readline()) not in (b"\r\n", b""):
                        name, _, value = line.decode().partition(":")
                        headers[name.lower()] = value.strip()
                    body = file.read(int(headers.get("content-length", 0)))
                    request = Request(method, target, headers, body, number)
                    with self._mutex:
                        self.requests.append(request)
                        what = self.plan(request)
                        status, more, answer = self._answer(request, what)
                    self.before_answer()
                    if what == SILENT:
                        file.read()  # acknowledged, but not stored
                        return
                    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(answer)}\r\n{more}\r\n".encode()
                    if what == HALF:
                        connection.sendall(head + answer[: len(answer) // 2])
                        file.read()
                        return
                    connection.sendall(head + (b"" if method == "HEAD" else answer))
        except (OSError, ValueError):
            return

    def _answer(self, request: Request, what: str | None) -> tuple[str, str, bytes]:
        if what not in (None, SILENT, HALF):
            status, _, code = str(what).partition(" ")
            return f"{status} Refused", "", f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        parts = urlsplit(request.path)
        key = unquote(parts.path).split("/", 2)[-1]
        if request.method == "PUT":
            return self._put(request, key)
        if request.method == "GET" and "list-type" in parts.query:
            return self._list(parse_qs(parts.query))
        if request.method == "POST":
            names = re.findall(r"<Key>(.*?)</Key>", request.body.decode())
            for name in names:
                self.objects.pop(name, None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            return "200 OK", "", f"<DeleteResult>{deleted}</DeleteResult>".encode()
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return "204 No Content", "", b""
        return self._get(request, key)

    def _put(self, request: Request, key: str) -> tuple[str, str, bytes]:
        found = self.objects.get(key)
        if_match, if_none = request.headers.get("if-match"), request.headers.get("if-none-match")
        if (if_none == "*" and found is not None) or (if_match and (found is None or _etag(found) != if_match)):
            return "412 Precondition Failed", "", b"<Error><Code>PreconditionFailed</Code></Error>"
        self.objects[key] = request.body
        return "200 OK", f"etag: {_etag(request.body)}\r\n", b""

    def _get(self, request: Request, key: str) -> tuple[str, str, bytes]:
        found = self.objects.get(key)
        if found is None:
            return "404 Not Found", "", b"<Error><Code>NoSuchKey</Code></Error>"
        more = f"etag: {_etag(found)}\r\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n"
        if request.headers.get("if-none-match") == _etag(found):
            return "304 Not Modified", more, b""
        if request.headers.get("if-match", _etag(found)) != _etag(found):
            return "412 Precondition Failed", "", b"<Error><Code>PreconditionFailed</Code></Error>"
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            start, end = int(ranged[1]), int(ranged[2]) + 1 if ranged[2] else len(found)
            more += f"content-range: bytes {start}-{end - 1}/{len(found)}\r\n"
            return "206 Partial Content", more, found[start:end]
        return "200 OK", more, found

    def _list(self, query: dict[str, list[str]]) -> tuple[str, str, bytes]:
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        keys = [key for key in sorted(self.objects) if key.startswith(prefix) and key > after]
        page, more = keys[: self.page], len(keys) > self.page
        contents = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>{_etag(self.objects[key])}</ETag><Size>{len(self.objects[key])}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
        body = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        return "200 OK", "", body.encode()


@functools.lru_cache(maxsize=4096)
def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
