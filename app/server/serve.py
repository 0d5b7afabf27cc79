"""The server of `crudstack serve`: uvicorn with limits on connections and requests.

uvicorn runs the event loop and the lifespan, handles signals and writes responses. `http_protocol` and `connections`
limit what clients can send and keep open. `overload` limits the number of concurrent requests.
"""

from __future__ import annotations

import functools
import resource
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from typing_extensions import override

from ..autocrud.errors import ConfigError
from ..request_log import RequestLog
from .connections import Connections
from .http_protocol import LimitedProtocol
from .overload import IN_PROGRESS, QUEUED, Overload

MAX_CONNECTIONS = 1024
BACKLOG = 256
OTHER_FILES = 512
"""File descriptors for databases, caches, connections to stores, and accepted connections that are not yet counted."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address and does not listen. Raises ConfigError if the address is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {_shown(host)}:{port}: {error.strerror or error}; choose another --port"
        ) from None
    return listener


def run(app: FastAPI, listener: socket.socket, host: str, *, access_log: bool) -> None:
    """Serve until Ctrl-C. Raises BrokenPipeError if standard output is closed when the URL is printed."""
    connections = Connections(connection_limit())
    # If there were fewer connections than slots, busy requests would leave no connection for health checks.
    queued = max(0, min(QUEUED, connections.limit - 2 * IN_PROGRESS))
    in_progress = min(IN_PROGRESS, connections.limit // 2)
    served: Any = Overload(
        app, unsent=connections.unsent, in_progress=in_progress, queued=queued, base=app.state.base_path or ""
    )
    config = uvicorn.Config(
        RequestLog(served) if access_log else served,
        access_log=False,
        log_level="warning",
        server_header=False,
        http=functools.partial(LimitedProtocol, connections),  # type: ignore[arg-type]
        ws="none",
        proxy_headers=False,  # the app does not use the scheme or the client's address
        backlog=BACKLOG,
    )
    server = _Server(config, app, f"http://{_shown(host)}:{listener.getsockname()[1]}")
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    if server.unread is not None:
        raise server.unread


def connection_limit() -> int:
    """Return the largest number of connections, after raising the soft limit of file descriptors as far as allowed.

    The limit leaves enough file descriptors to accept connections and to open files.
    """
    wanted = MAX_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_CONNECTIONS
    return max(8, soft - OTHER_FILES, soft // 4)


class _Server(uvicorn.Server):
    """A uvicorn server that prints its URLs when it has started."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, url: str) -> None:
        super().__init__(config)
        self._app, self._url = app, url
        self.unread: BrokenPipeError | None = None
        """The error of printing the URLs, if standard output was closed. The server then stops in an orderly way."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            lines = [f"  {self._url}/{name}" for name in self._app.state.crud.managers]
            try:
                print("\n".join([*lines, f"docs at {self._url}/docs, Ctrl-C stops"]), flush=True)
            except BrokenPipeError as error:
                self.unread, self.should_exit = error, True


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
