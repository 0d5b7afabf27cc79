"""`GET /export` and `POST /import`: archives of models that only the running server can read.

Those are models in memory, and models with an index in memory, whose data directory one process owns. All other stores
are exported and imported by `crudstack export` and `crudstack import`, without the server.

- The actions `export` and `import` must be allowed explicitly for each model: see `access.Permissions`.
- Memory use does not depend on the size of the archive. An export waits until the client has read what is written; an
  import is spooled to a file.
- An import that fails takes back what it has written. If the process ends meanwhile, or if that fails too, the import
  is not finished; then it is continued with `resume=true`, or taken back with `abort=true`.
- One export or import runs at a time, because each may take a pin, a copy of a store in memory, or space on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import msgspec
from starlette.routing import BaseRoute, Route
from typing_extensions import override

from ..access import ANONYMOUS, Forbidden, decide
from ..errors import CrudError, Overloaded
from ..resource_manager.core import ResourceManager
from ..resource_manager.runtime.threads import TURN
from . import problems
from .guard import PRINCIPAL, principal
from .messages import (
    ClientGone,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    bad_parameter,
    parse_flag,
    parse_integer,
    unknown_parameter,
)
from .model_context import Policy

AHEAD = 1024 * 1024
"""How many bytes of an archive wait for the client at most, besides the piece that is written."""
HELD_BACK = 64 * 1024
"""So many bytes are kept before the response begins, so that an error at the beginning becomes the response."""
STALLED_S = 60.0
"""An export ends if the client reads nothing for so long."""
FORMATS = {"tar.gz": b"application/gzip", "tar.zst": b"application/zstd"}
ARCHIVE_TYPES = ("application/gzip", "application/x-gzip", "application/zstd", "application/octet-stream")
MOST_BYTES = 2**53 - 1
"""Largest `max_bytes`: JSON numbers of most programs are exact up to here."""
FLAGS = ("check", "resume", "abort")
"""Parameters of an import that are true or false."""

Action = Literal["export", "import"]


class StoredElsewhere(CrudError):
    """The model is in a store that commands can reach without the server."""

    type, title, status = "stored-elsewhere", "Use the command for this model", 409


class ExportOptions(NamedTuple):
    """The options of an export: the models, the format, and whether each resource is as at some moment."""

    models: Sequence[str]
    format: str
    each_resource: bool


class ImportOptions(NamedTuple):
    """The options of an import: the models, what happens to ids that exist, and what the archive must be.

    models  None: all of the archive
    check   whether to stop before anything is changed
    resume  whether to continue an import of the same archive that is not finished
    abort   whether to take it back
    """

    models: Sequence[str] | None
    on_conflict: str
    sha256: str | None
    max_bytes: int | None
    check: bool
    resume: bool
    abort: bool


Export = Callable[[BinaryIO, ExportOptions], Awaitable[object]]
Import = Callable[[AsyncIterator[bytes], ImportOptions], Awaitable[object]]


def routes(
    managers: Mapping[str, ResourceManager[Any]], policy: Policy, export: Export, import_: Import
) -> list[BaseRoute]:
    """Return the routes /export and /import. `export` and `import_` do the work."""
    busy = asyncio.Lock()
    return [
        Route("/export", _ExportRoute(managers, policy, busy, export), include_in_schema=False),
        Route("/import", _ImportRoute(managers, policy, busy, import_), include_in_schema=False),
    ]


class _BackupRoute(ABC):
    """The ASGI application of one path."""

    path: str
    methods: tuple[str, ...]
    action: Action

    def __init__(self, managers: Mapping[str, ResourceManager[Any]], policy: Policy, busy: asyncio.Lock) -> None:
        self._managers, self._policy, self._busy = managers, policy, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope[problems.ROUTE] = self.path
        method = scope["method"]
        try:
            request = Request(scope, receive, [], 0)
            if self._policy.authenticate is not None:
                await principal(self._policy.authenticate, scope, receive)
            if method not in self.methods:
                allowed = ", ".join(self.methods)
                error: CrudError = problems.MethodNotAllowed(f"expected {allowed}, got {method}")
                response: Response | None = problems.response(error, ((b"allow", allowed.encode()),))
            else:
                response = await self._answer(request, send)
        except CrudError as error:
            response = problems.response(error)
        except ClientGone:
            return
        except _AnswerCutOff:
            raise
        except Exception as error:
            response = problems.unexpected(error, scope)
        if response is not None:
            await response.send(send, head=method == "HEAD")

    @abstractmethod
    async def _answer(self, request: Request, send: Send) -> Response | None:
        """Return the response, or None if it was sent."""

    async def _chosen(self, request: Request, models: Sequence[str]) -> list[str]:
        """Return the names of the models of a request. Raises InvalidQuery, Forbidden or StoredElsewhere."""
        for name in models:
            if name not in self._managers:
                raise bad_parameter("model", f"there is no model {name[:60]!r}")
        chosen = [name for name in self._managers if not models or name in models]
        if self._policy.authorize is not None:
            who = request.scope.get(PRINCIPAL, ANONYMOUS)
            for name in chosen:
                if await decide(self._policy.authorize, who, self.action, name) is not True:
                    raise Forbidden(f"you may not {self.action} the model {name!r}; choose others by model=")
        for name in chosen:
            if not self._managers[name].storage.exclusive:
                raise StoredElsewhere(
                    f"the model {name!r} is in a store that commands can reach: use `crudstack {self.action}` with the"
                    " settings of this server, or choose other models by model="
                )
        return chosen

    def _options(self, request: Request, *allowed: str) -> tuple[dict[str, str], list[str]]:
        """Return the options of a request by name, and its models."""
        options: dict[str, str] = {}
        models: list[str] = []
        for name, value in request.parameters():
            if name == "model":
                models.append(value)
            elif name not in allowed:
                raise unknown_parameter(name, ("model", *allowed))
            elif name in options:
                raise bad_parameter(name, "given twice")
            else:
                options[name] = value
        return options, models

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Refuse a second export or import. Give up the slot of the request, because the work may take long."""
        if self._busy.locked():
            raise Overloaded("another export or import runs; try again when it has ended")
        async with self._busy:
            turn = TURN.get()
            if turn is not None:
                turn.leave()
            try:
                yield
            finally:
                if turn is not None:
                    await turn.come_back()


class _ExportRoute(_BackupRoute):
    path, methods, action = "/export", ("GET", "HEAD"), "export"

    def __init__(
        self, managers: Mapping[str, ResourceManager[Any]], policy: Policy, busy: asyncio.Lock, export: Export
    ) -> None:
        super().__init__(managers, policy, busy)
        self._export = export

    @override
    async def _answer(self, request: Request, send: Send) -> Response | None:
        options, models = self._options(request, "format", "per_resource")
        format_ = options.get("format", "tar.gz")
        if format_ not in FORMATS:
            raise bad_parameter("format", f"expected tar.gz or tar.zst, got {format_[:60]!r}")
        each = "per_resource" in options and parse_flag("per_resource", options["per_resource"])
        chosen = ExportOptions(await self._chosen(request, models), format_, each)
        headers = (
            (b"content-type", FORMATS[format_]),
            (b"content-disposition", f'attachment; filename="backup.{format_}"'.encode()),
        )
        if request.scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": [*headers]})
            await send({"type": "http.response.body", "body": b""})
            return None
        async with self._alone():
            await self._stream(request, send, chosen, headers)
        return None

    async def _stream(
        self, request: Request, send: Send, options: ExportOptions, headers: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        """Export, and send the archive while it is written. Errors before its first byte become a response."""
        pipe = _Pipe()
        gone = asyncio.create_task(_disconnected(request.receive))
        work = asyncio.ensure_future(self._export(cast("BinaryIO", pipe), options))
        work.add_done_callback(lambda _: pipe.end())
        held = b""
        started = False
        try:
            while chunk := await pipe.read():
                if gone.done():
                    raise ClientGone
                if not started and len(held) + len(chunk) < HELD_BACK:
                    held += chunk
                    continue
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": [*headers]})
                    started, chunk, held = True, held + chunk, b""
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await work
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": [*headers]})
                started = True
            await send({"type": "http.response.body", "body": held, "more_body": False})
        except ClientGone:
            raise
        except Exception as error:
            if started:  # only a connection that is cut off tells the client that the archive is not complete
                problems.log.error("export failed: %s", error)
                raise _AnswerCutOff from error
            raise
        finally:
            pipe.close()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class _ImportRoute(_BackupRoute):
    path, methods, action = "/import", ("POST",), "import"

    def __init__(
        self, managers: Mapping[str, ResourceManager[Any]], policy: Policy, busy: asyncio.Lock, import_: Import
    ) -> None:
        super().__init__(managers, policy, busy)
        self._import = import_

    @override
    async def _answer(self, request: Request, send: Send) -> Response | None:
        options, models = self._options(request, "on_conflict", "sha256", "max_bytes", *FLAGS)
        on_conflict = options.get("on_conflict", "fail")
        if on_conflict not in ("fail", "skip", "replace"):
            raise bad_parameter("on_conflict", f"expected fail, skip or replace, got {on_conflict[:60]!r}")
        limit = parse_integer("max_bytes", options["max_bytes"], 1, MOST_BYTES) if "max_bytes" in options else None
        flags = {name: name in options and parse_flag(name, options[name]) for name in FLAGS}
        named = await self._chosen(request, models)  # without names, the archive may hold every model
        chosen = ImportOptions(named if models else None, on_conflict, options.get("sha256"), limit, **flags)
        if request.header(b"content-type") is not None:
            request.content_type(*ARCHIVE_TYPES)
        async with self._alone():
            result = await self._import(_chunks(request), chosen)
        return Response(200, msgspec.json.encode(result))


class _AnswerCutOff(Exception):
    """The response cannot be completed. The server closes the connection."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """Yield the body of a request as it arrives. Raises ClientGone."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


class _Pipe:
    """A binary file that one thread writes and one coroutine reads. The thread waits if the reader is slow."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._ended = self._closed = False
        self._filled, self._emptied = asyncio.Event(), asyncio.Event()

    # Called by the thread

    def write(self, data: bytes) -> int:
        """Append bytes. Blocks as long as AHEAD bytes wait. Raises OSError if the reader is gone or reads nothing."""
        asyncio.run_coroutine_threadsafe(self._append(bytes(data)), self._loop).result()
        return len(data)

    def flush(self) -> None:
        """Do nothing: the reader gets each piece at once."""

    async def _append(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(STALLED_S):
                while self._size >= AHEAD and not self._closed:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"the client read nothing for {STALLED_S:g} s") from None
        if self._closed:
            raise OSError(errno.EPIPE, "the client is gone")
        self._chunks.append(data)
        self._size += len(data)
        self._filled.set()

    # Called by the coroutine

    async def read(self) -> bytes:
        """Return the next bytes; empty at the end."""
        while not self._chunks:
            if self._ended:
                return b""
            self._filled.clear()
            await self._filled.wait()
        chunk = self._chunks.popleft()
        self._size -= len(chunk)
        self._emptied.set()
        return chunk

    def end(self) -> None:
        """Note that the thread writes no more."""
        self._ended = True
        self._filled.set()

    def close(self) -> None:
        """Let all writes of the thread fail from now on."""
        self._closed = True
        self._emptied.set()
