"""An object that is received in chunks. A part that a lost connection cut off is requested again."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .clients import Attempts, Clients, Pools
from .obstore_exit import tracked

if TYPE_CHECKING:
    from obstore.store import S3Store


class Reception:
    """The bytes of one object from `start` up to but not including `end`; None: up to its end.

    A request that gets no answer is repeated on new connections. If an answer stops, the rest is requested on condition
    that the object still has the same ETag, so two versions of an object are never mixed.

    clients  the clients of the bucket
    get      sends a GET with options of obstore
    failed   the errors of a request
    """

    def __init__(
        self,
        clients: Clients,
        get: Callable[[S3Store, Any], Awaitable[Any]],
        failed: tuple[type[Exception], ...],
        start: int = 0,
        end: int | None = None,
    ) -> None:
        self._clients, self._get, self._failed = clients, get, failed
        self._next, self._end = start, end
        self._etag: str | None = None
        self._attempts = Attempts()
        self.size = 0
        """Size of the whole object in bytes. Known after `begin`."""

    async def begin(self) -> None:
        """Send the first request. Raises one of `failed`, for example if there is no such object."""
        self._pools, self._result = await self._request()
        self.size, self._etag = self._result.meta["size"], self._result.meta["e_tag"]
        self._end = self._result.range[1]

    async def chunks(self, at_least: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes. All chunks but the last one have `at_least` bytes, and little more.

        Raises one of `failed`, for example if the object was replaced meanwhile.
        """
        while True:
            try:
                async with contextlib.aclosing(pages(self._result.stream(min_chunk_size=at_least))) as chunks:
                    async for chunk in chunks:
                        self._next, self._attempts = self._next + len(chunk), Attempts()
                        yield chunk
                return
            except self._failed as error:
                if self._next == self._end:
                    return
                if not self._etag or not await self._may_repeat(self._pools, error):
                    raise
            self._pools, self._result = await self._request()

    async def _request(self) -> tuple[Pools, Any]:
        options: dict[str, Any] = {"if_match": self._etag} if self._etag else {}
        if self._end is not None:
            options["range"] = (self._next, self._end)
        elif self._next:
            options["range"] = {"offset": self._next}
        while True:
            pools = self._clients.current()
            try:
                return pools, await self._get(pools.client("small", self._attempts.count), options)
            except self._failed as error:
                if not await self._may_repeat(pools, error):
                    raise

    async def _may_repeat(self, pools: Pools, error: Exception) -> bool:
        return await self._clients.may_repeat("small", pools, self._attempts, error)


async def pages(stream: Any) -> AsyncGenerator[Any, None]:
    """Iterate over a stream of obstore. Each step is a request."""
    while True:
        try:
            page = await tracked(stream.__anext__())
        except StopAsyncIteration:
            return
        yield page


async def no_bytes() -> AsyncGenerator[bytes, None]:
    """Yield nothing."""
    return
    yield b""
