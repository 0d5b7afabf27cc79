"""Limits on how many files are sent and received at the same time.

A transfer of gigabytes takes as long as its client wants. So transfers hold no slot of the server
(`app.server.overload`), and have limits of their own:

- T1 *A bounded number is in progress*: at most `total`, and at most `per_caller` of one caller. So their buffers and
  temporary files are bounded too.
- T2 *A client that does nothing keeps no other one out.* If a limit is reached, a new transfer replaces the one that
  has waited longest for its client, if that is at least STALLED_S. A transfer that works on the store is never ended.

The counts are those of one event loop: on `crudstack serve`, those of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from weakref import WeakKeyDictionary

from ..errors import CrudError

MAX_UPLOADS = 128
MAX_UPLOADS_OF_CALLER = 16
MAX_DOWNLOADS = 128
STALLED_S = 2.0
"""Seconds without a sign of its client after which a transfer may be replaced."""


class TooManyUploads(CrudError):
    """The caller, or all callers together, have as many uploads in progress as they may have. Nothing was stored."""

    type, title, status = "too-many-uploads", "Too many uploads at once", 429


class TooManyDownloads(CrudError):
    """All callers together have as many downloads in progress as they may have."""

    type, title, status = "too-many-downloads", "Too many downloads at once", 503


class Transfer:
    """A transfer in progress, which belongs to the task that began it."""

    def __init__(self, transfers: Transfers, caller: str) -> None:
        self.caller = caller
        self.ended = False
        """Whether another transfer has replaced it."""
        self._transfers, self._task = transfers, asyncio.current_task()

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Count the time inside of the context as time that the transfer waits for its client."""
        self._transfers.waiting[self] = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._transfers.waiting.pop(self, None)

    def end(self) -> None:
        """End the transfer, which waits for its client."""
        self._transfers.waiting.pop(self, None)
        self.ended = True
        assert self._task is not None, "a transfer begins in a task"
        self._task.cancel()

    def resume(self) -> None:
        """Undo the cancellation of the task, after it has ended this transfer."""
        if self._task is not None:
            self._task.uncancel()


class Transfers:
    """The transfers of one kind in an event loop. `error` is raised if there are too many."""

    def __init__(self, error: type[CrudError], total: int, per_caller: int) -> None:
        self._error, self._total, self._per_caller = error, total, per_caller
        self.waiting: OrderedDict[Transfer, float] = OrderedDict()
        """The transfers that wait for their clients, the longest waiting one first, and since when."""
        self._count = 0
        self._of: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def one(self, caller: str) -> AsyncIterator[Transfer]:
        """Count a transfer of a caller until the end of the context. Raises `error` (T1, T2)."""
        if self._of[caller] >= self._per_caller and not self._replace(caller):
            raise self._error(f"you have {self._per_caller} in progress, which is the limit; wait until one has ended")
        if self._count >= self._total and not self._replace(None):
            raise self._error(f"there are {self._total} in progress, which is the limit; try again")
        transfer = Transfer(self, caller)
        self._count += 1
        self._of[caller] += 1
        try:
            yield transfer
        except asyncio.CancelledError:
            if not transfer.ended:
                raise
            transfer.resume()
            raise self._error("the client did nothing for some time, and another one needed its place") from None
        finally:
            if not transfer.ended:
                self._forget(caller)

    def _replace(self, caller: str | None) -> bool:
        """End the transfer (of this caller) that has waited longest, if it is stalled. Return whether there was one."""
        before = asyncio.get_running_loop().time() - STALLED_S
        for transfer, since in self.waiting.items():
            if since > before:
                return False
            if caller in (None, transfer.caller):
                transfer.end()
                self._forget(transfer.caller)
                return True
        return False

    def _forget(self, caller: str) -> None:
        self._count -= 1
        self._of[caller] -= 1
        if not self._of[caller]:
            del self._of[caller]


class LoopTransfers:
    """The uploads and downloads of one event loop."""

    def __init__(self) -> None:
        self.uploads = Transfers(TooManyUploads, MAX_UPLOADS, MAX_UPLOADS_OF_CALLER)
        self.downloads = Transfers(TooManyDownloads, MAX_DOWNLOADS, MAX_DOWNLOADS)


_TRANSFERS: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopTransfers] = WeakKeyDictionary()


def transfers() -> LoopTransfers:
    """Return the transfers of the running event loop."""
    return _TRANSFERS.setdefault(asyncio.get_running_loop(), LoopTransfers())
