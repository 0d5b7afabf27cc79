"""Real processes with a FastSlowMetaStore, each behind a proxy that can cut it off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from tests.stores import fast_slow_worker as worker
from tests.tcp_proxy import TcpProxy
from tests.valkey import Valkey


class RedisProxy(TcpProxy):
    """A proxy between one process and Redis. The test chooses the server behind it."""

    def __init__(self, server: Valkey) -> None:
        super().__init__(server.url)
        self.server = server

    def redis_url(self) -> str:
        return self.server.url.replace(f":{self.server.port}/", f":{urlsplit(self.url).port}/")

    def route_to(self, server: Valkey | None) -> None:
        self._to = ("127.0.0.1", 1 if server is None else server.port)
        self.cut()


class Processes:
    """Worker processes, and counts of the messages that they printed."""

    def __init__(self, tmp_path: Path, server: Valkey, dsn: str, lease_s: float, *, broken: bool = False) -> None:
        self.register = tmp_path / "register"
        self.register.write_bytes(bytes(worker.Register.SIZE))
        self.server, self.dsn, self.name, self.lease_s, self.broken = server, dsn, tmp_path.name, lease_s, broken
        self.stale: list[str] = []
        self.counts = [Counter() for _ in range(worker.PROCESSES)]
        self.news = asyncio.Condition()
        self.stack = contextlib.ExitStack()

    async def __aenter__(self):
        store = worker.store_of(self.server.url, self.dsn, self.name, self.lease_s)
        for at in range(worker.RESOURCES):
            await store.commit([worker.change_of(f"shared-{at}")])
        await store.close()
        self.proxies = [self.stack.enter_context(RedisProxy(self.server)) for _ in self.counts]
        self.started = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.stores.fast_slow_worker",
                json.dumps([at, proxy.redis_url(), self.dsn, self.name, self.lease_s, str(self.register), self.broken]),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for at, proxy in enumerate(self.proxies)
        ]
        self.listeners = [asyncio.create_task(self.listen(at)) for at in range(len(self.started))]
        return self

    async def listen(self, at: int) -> None:
        async for line in self.started[at].stdout:
            message = json.loads(line)
            async with self.news:
                self.counts[at][message["what"]] += 1
                if "hits" in message:
                    self.counts[at]["hits"] = message["hits"]
                if message["what"] == "stale":
                    self.stale.append(f"process {at}: {message['was']}")
                self.news.notify_all()
        async with self.news:
            self.counts[at]["gone"] += 1
            self.news.notify_all()

    async def until(self, reached) -> None:
        async with asyncio.timeout(60), self.news:
            await self.news.wait_for(lambda: reached() or any(count["gone"] for count in self.counts))
        assert reached()

    async def go_on(self, **more: int) -> None:
        """Wait until each process has done so many more operations of each kind."""
        least = [Counter({what: count[what] + number for what, number in more.items()}) for count in self.counts]
        await self.until(lambda: all(count >= goal for count, goal in zip(self.counts, least, strict=True)))

    async def __aexit__(self, *error) -> None:
        for process in self.started:
            if error[0] is None:
                process.stdin.close()
            else:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.started), *self.listeners)
        self.stack.close()
