"""A network between a client and a server, which tests can cut or delay."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import urlsplit


class TcpProxy:
    """Forwards connections to the server of a URL.

    `cut` ends all connections. `swallow` acknowledges all bytes of the present connections and drops them. After
    `hold`, requests arrive and answers wait until `release`.
    """

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._swallowed: set[socket.socket] = set()
        self._mutex = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self.held = threading.Event()  # set as soon as an answer waits
        self._closed = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self.release()
        self.cut()

    def lead_to(self, url: str) -> None:
        """Forward new connections to the server of another URL."""
        parts = urlsplit(url)
        self._to = (parts.hostname, parts.port)

    def hold(self) -> None:
        self.held.clear()
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def swallow(self) -> int:
        """Drop all bytes of the present connections, and return their number. New connections work."""
        with self._mutex:
            self._swallowed |= self._open
            return len(self._open) // 2

    def cut(self) -> int:
        """End all connections, and return their number."""
        with self._mutex:
            ended, self._open = self._open, set()
        for one in ended:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        return len(ended) // 2

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._to)
            except OSError:
                client.close()
                continue
            with self._mutex:
                self._open |= {client, server}
            if self._closed:
                self.cut()
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and not self._flows.is_set():
                    self.held.set()
                    self._flows.wait()
                if source in self._swallowed:
                    continue
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
