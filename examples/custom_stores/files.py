"""A MetaStore and a ResourceStore of plain files. Local disks only: network file systems keep neither locks nor promises.

FileMetaStore("data/article/meta")      everything in `state.json`, which each commit replaces
FileResourceStore("data/article/data")  a file for each body
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import heapq
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeVar

import msgspec
from typing_extensions import override

from app.autocrud.errors import OutcomeUnknown, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.basic import Encoding, ModelSpec, ResourceStore, RevisionInfo
from app.autocrud.resource_manager.contract.protocols import BodySweeping
from app.autocrud.resource_manager.contract.store_errors import generation_of

from .dicts import DictMetaStore, State

T = TypeVar("T")

ABANDONED_S = 3600.0
"""After which a half-written file is removed. Whoever is slower than that finds its file gone, and has stored nothing."""


class FileMetaStore(DictMetaStore):
    """A DictMetaStore that is durable, and that several processes share: the state is a file, and a lock among processes stands for
    the one among threads.

    A file that was replaced tells so by its identity, which no other file gets as long as we have it open: no clock and no size decides.
    """

    authoritative: ClassVar[bool] = True
    durable: ClassVar[bool] = True

    def __init__(self, root: str | Path) -> None:
        self._directory = Directory(root)
        self._reading = threading.Lock()  # guards the file, and that it is the one that the state was read from
        self._file: BinaryIO | None = None
        super().__init__()

    @override
    def bind(self, spec: ModelSpec) -> None:
        super().bind(spec)
        self._shut()

    @override
    async def _now(self) -> State:
        return await asyncio.to_thread(self._read)

    @override
    async def _write(self, work: Callable[[State], T]) -> T:
        return await asyncio.to_thread(self._replace, work)

    @override
    def _replace(self, work: Callable[[State], T]) -> T:
        with self._directory.locked():
            state = self._read().copy()
            result = work(state)
            self._directory.put("state.json", msgspec.json.encode(state))
            return result

    def _read(self) -> State:
        with self._reading, translated(StoreUnavailable):
            path = self._directory.path / "state.json"
            try:
                if self._file is not None and os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                    return self._state
                file = path.open("rb")
            except FileNotFoundError:
                if self._file is None:
                    return State()  # nothing was committed yet
                raise StoreDamaged("the file of metadata was removed; restore it from a copy") from None
            self._shut()
            self._file = file
            try:
                self._state = msgspec.json.decode(file.read(), type=State)
            except msgspec.MsgspecError:
                self._shut()
                raise StoreDamaged("the file of metadata is damaged; restore it from a copy") from None
            return self._state

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @override
    async def health(self) -> None:
        await asyncio.to_thread(self._directory.check)

    @override
    async def maintain(self, budget_s: float) -> None:
        await asyncio.to_thread(self._directory.sweep)

    @override
    async def close(self) -> None:
        with self._reading:
            self._shut()


class FileResourceStore(ResourceStore, BodySweeping):
    """A uid becomes a name by its bytes in hex: nothing in it leads elsewhere, and unlike a hash the name gives back the uid, for the sweep."""

    durable: ClassVar[bool] = True

    def __init__(self, root: str | Path, encoding: Encoding | None = None) -> None:
        self.encoding = encoding
        self._directory = Directory(root)

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        await asyncio.to_thread(self._directory.put, name_of(uid), body)

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        return await asyncio.to_thread(lambda: [self._body(uid) for uid in uids])

    def _body(self, uid: str) -> bytes:
        with translated(StoreUnavailable):
            try:
                return (self._directory.path / name_of(uid)).read_bytes()
            except FileNotFoundError:
                raise StoreDamaged(f"the body {uid} is missing") from None

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        await asyncio.to_thread(self._directory.remove, [name_of(uid) for uid in uids])

    @override
    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
        def work() -> list[str]:
            with translated(StoreUnavailable):
                uids = [uid_of(path.name) for path in self._directory.make().glob(f"*{SUFFIX}")]
            return heapq.nsmallest(limit, (uid for uid in uids if uid > after and generation_of(uid) < generation))

        return await asyncio.to_thread(work)

    @override
    async def health(self) -> None:
        await asyncio.to_thread(self._directory.check)

    @override
    async def maintain(self, budget_s: float) -> None:
        await asyncio.to_thread(self._directory.sweep)


SUFFIX = ".body"


def name_of(uid: str) -> str:
    return uid.encode().hex() + SUFFIX


def uid_of(name: str) -> str:
    return bytes.fromhex(name.removesuffix(SUFFIX)).decode()


class Directory:
    """Files that are whole or not there, whatever happens to the process or the machine. Everything blocks: for threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._made = False

    def make(self) -> Path:
        """The path, once there is a directory."""
        if not self._made:
            make_directory(self.path)
            self._made = True
        return self.path

    def put(self, name: str, content: bytes) -> None:
        """Put a file in place of what has this name. StoreUnavailable: it was not. OutcomeUnknown: it was, and may not outlive a power cut."""
        with translated(StoreUnavailable):
            handle, temporary = tempfile.mkstemp(".tmp", dir=self.make())
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(handle)  # before it has the name: whatever has one is whole
                Path(temporary).replace(self.path / name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        with translated(OutcomeUnknown):
            sync(self.path)  # the name is content too, of the directory

    def remove(self, names: Iterable[str]) -> None:
        with translated(StoreUnavailable):
            for name in names:
                (self.make() / name).unlink(missing_ok=True)
            sync(self.make())

    def check(self) -> None:
        with translated(StoreUnavailable):
            self.make().stat()

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        with translated(StoreUnavailable):
            for path in self.make().glob("*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - ABANDONED_S:
                        path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all threads of all processes; one that is killed holds no lock."""
        with contextlib.ExitStack() as stack:
            with translated(StoreUnavailable):
                file = stack.enter_context((self.make() / "lock").open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def make_directory(path: Path) -> None:
    """Make it and those above it, so that a power cut does not take them back."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def translated(into: type[StoreUnavailable | OutcomeUnknown]) -> Iterator[None]:
    """An error of the disk in the words of the engine, without the path: clients read it."""
    try:
        yield
    except OSError as error:
        raise into(f"the disk says: {error.strerror}") from error
