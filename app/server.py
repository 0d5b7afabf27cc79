"""The server underneath `crudstack serve`: uvicorn."""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI

from .autocrud.errors import ConfigError
from .request_log import RequestLog


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen yet. Raises ConfigError if the address is not free."""
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
    """Serve until Ctrl-C. Raises BrokenPipeError if nobody reads where it says that it serves."""
    config = uvicorn.Config(
        RequestLog(app) if access_log else app,
        access_log=False,
        log_level="warning",
        server_header=False,
    )
    server = _Server(config, app, f"http://{_shown(host)}:{listener.getsockname()[1]}")
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    if server.unread is not None:
        raise server.unread


class _Server(uvicorn.Server):
    """Says where it serves as soon as it does."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, url: str) -> None:
        super().__init__(config)
        self._app, self._url = app, url
        self.unread: BrokenPipeError | None = None
        """The error if nobody reads where it says that it serves. It then stops in an orderly way."""

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
