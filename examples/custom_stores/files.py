"""A MetaStore and a ResourceStore of plain files. Local disks only: network file systems do not keep locks reliably.

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
"""Seconds after which a half-written file is removed. A writer that is slower fails, and has stored nothing."""


class FileMetaStore(DictMetaStore):
    """A durable DictMetaStore that several processes can share. The state is a file, and the lock a `flock`.

    A reader recognizes a replaced file by its inode number. No other file gets the same number while the reader has the
    file open. So no times and no sizes are compared.
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
    """Bodies in one file each. The name of a file is its uid in hex.

    So no uid leads to another directory. Unlike a hash, the name gives back the uid, which the sweep needs.
    """

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
    """Return the name of the file of a body."""
    return uid.encode().hex() + SUFFIX


def uid_of(name: str) -> str:
    """Return the uid of the body in a file."""
    return bytes.fromhex(name.removesuffix(SUFFIX)).decode()


class Directory:
    """Files that are complete or absent, even after a crash or a power failure.

    All methods block: call them in threads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._made = False

    def make(self) -> Path:
        """Return the path, after the directory was made."""
        if not self._made:
            make_directory(self.path)
            self._made = True
        return self.path

    def put(self, name: str, content: bytes) -> None:
        """Replace the file of this name.

        Raises StoreUnavailable if the file was not replaced, and OutcomeUnknown if it was but may not survive a power
        failure.
        """
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
        """Remove half-written files that killed processes left."""
        with translated(StoreUnavailable):
            for path in self.make().glob("*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - ABANDONED_S:
                        path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude all other threads of all processes. The kernel releases the lock of a killed process."""
        with contextlib.ExitStack() as stack:
            with translated(StoreUnavailable):
                file = stack.enter_context((self.make() / "lock").open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def make_directory(path: Path) -> None:
    """Make a directory and its parents, so that they survive a power failure."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(directory: Path) -> None:
    """Sync a directory, so that the names of its files survive a power failure."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def translated(into: type[StoreUnavailable | OutcomeUnknown]) -> Iterator[None]:
    """Raise errors of the disk as errors of the engine, without the path, because clients see the text."""
    try:
        yield
    except OSError as error:
        raise into(f"the disk says: {error.strerror}") from error
