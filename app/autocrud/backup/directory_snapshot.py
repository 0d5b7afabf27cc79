"""A copy of a data directory, made while programs read and write it.

    {model}/meta/index.sqlite and {model}/data/bodies.sqlite    of the kind `disk`
    {model}/bodies.sqlite                                       of the kind `memory-disk`
    {model}/blobs/{first digits}/{sha256}/{uid}                 files, which never change

- D1 *The databases of a model are as at one moment.* Their read transactions begin while both are locked against
  writers. A body is stored before the commit that names it and removed after the commit that does not, so the bodies of
  that moment are complete.
- D2 *The files of that moment are complete.* All files are linked before it, and those that are new after it. A file
  is only missing if a purge was faster. Then the resource is removed from the copy too.
- D3 *A directory with the name of the copy is complete.* The copy is made beside it, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import apsw

from ..errors import ConfigError, InvalidData, StoreUnavailable
from ..resource_manager.backends.sqlite import blob_tables
from ..resource_manager.backends.sqlite.errors import translated
from ..resource_manager.backends.sqlite.pins import remove_all_pins
from ..resource_manager.backends.sqlite.snapshot import begin_reading
from ..resource_manager.backends.sqlite.tables import ResourceTables
from ..resource_manager.basic import ModelSpec
from ..resource_manager.contract.blobs import BlobUse
from ..resource_manager.records import BLOB_KEY
from ..resource_manager.runtime.disk_space import full, is_full
from ..resource_manager.runtime.files import lock_within
from ..resource_manager.runtime.partial import Partial

DISK = (Path("meta/index.sqlite"), Path("data/bodies.sqlite"))
"""The databases of a model of the kind `disk`. The first one has the metadata."""
MEMORY_DISK = (Path("bodies.sqlite"),)
BLOBS = "blobs"
PAGES_AT_ONCE = 1024
LOCK_TIMEOUT_S = 10.0

Report = Callable[[int, int | None, str], None]


class CopiedModel(NamedTuple):
    """A model in a copy of a data directory.

    purged   ids of resources that were purged while their files were copied. The copy does not have them
    damaged  ids of resources whose files are missing in the data directory itself
    """

    name: str
    resources: int
    files: int
    purged: tuple[str, ...]
    damaged: tuple[str, ...]


def snapshot_directory(data_dir: Path, target: Path, report: Report) -> list[CopiedModel]:
    """Copy the stores below a data directory to a new directory, which a program can use as its data directory.

    Programs may use the stores meanwhile. Files are linked if both directories are on one file system, else copied.
    Blocks.

    report  called with the bytes that are copied of a database, its size, and its name

    Raises InvalidData if the target exists or is inside of the data directory, ConfigError if there is no store, and
    StoreUnavailable.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidData(f"{target} exists: expected the name of a new directory")
    if target.resolve().is_relative_to(data_dir.resolve()):
        raise InvalidData(f"{target} is inside of the data directory {data_dir}: expected a directory outside of it")
    found = sorted(_models(data_dir))
    if not found:
        raise ConfigError(f"{data_dir} has no store of the kinds disk and memory-disk")
    target = target.absolute()
    partial = None
    try:
        partial = Partial(target, directory=True)
        copied = [
            _ModelCopy(data_dir / name, partial.path / name, databases, report).run() for name, databases in found
        ]
        _sync_directories(partial.path)
        partial.publish(replace=False)
    except FileExistsError:
        raise InvalidData(f"{target} was made by another program meanwhile, and is kept") from None
    except apsw.Error as error:
        raise translated(error, target.parent) from error
    except OSError as error:
        if is_full(error, target.parent):
            raise full(error, target.parent) from error
        raise StoreUnavailable(f"the data directory cannot be copied to {target}: {error.strerror}") from error
    finally:
        if partial is not None:
            partial.discard()
    return copied


def _models(data_dir: Path) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Yield the names of the directories that have a store, with its databases."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for directory in data_dir.iterdir():
            if all((directory / database).is_file() for database in DISK):
                yield directory.name, DISK
            elif (directory / MEMORY_DISK[0]).is_file():
                yield directory.name, MEMORY_DISK


class _ModelCopy:
    """The copy of the store of one model."""

    def __init__(self, source: Path, target: Path, databases: tuple[Path, ...], report: Report) -> None:
        self._source, self._target, self._databases, self._report = source, target, databases, report

    def run(self) -> CopiedModel:
        """Copy the databases and the files."""
        self._target.mkdir(mode=0o700)
        for key in _keys(self._source / BLOBS):
            self._link(key)
        with contextlib.ExitStack() as opened:
            connections = self._begin(opened)
            for database, connection in zip(self._databases, connections, strict=True):
                self._copy(connection, self._target / database)
        with contextlib.closing(apsw.Connection(str(self._target / self._databases[0]))) as copy:
            copy.pragma("journal_mode", "delete")
            copy.pragma("secure_delete", "on")
            with copy:
                remove_all_pins(copy)
                purged, damaged = self._complete_files(copy)
            files = self._remove_unknown_files(copy)
            resources = int(copy.execute("SELECT count(*) FROM resources").get)
        for database in self._databases:
            _sync(self._target / database)
        return CopiedModel(self._source.name, resources, files, tuple(purged), tuple(damaged))

    # Databases

    def _begin(self, opened: contextlib.ExitStack) -> list[apsw.Connection]:
        """Begin to read all databases, at one moment at which no program writes to them (D1)."""
        with contextlib.ExitStack() as locks:
            connections = []
            for database in self._databases:
                self._lock(self._source / f"{database}-lock", locks)
                connection = opened.enter_context(contextlib.closing(apsw.Connection(str(self._source / database))))
                connection.set_busy_timeout(int(LOCK_TIMEOUT_S * 1000))
                connections.append(connection)
            for connection in connections:
                begin_reading(connection)
            return connections

    def _lock(self, path: Path, locks: contextlib.ExitStack) -> None:
        """Take the lock that programs hold while they write. See `backends.sqlite.database`."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        locks.callback(os.close, handle)
        try:
            lock_within(LOCK_TIMEOUT_S, handle, 0.001)
        except BlockingIOError:
            raise StoreUnavailable(
                f"another process has locked {path} for {LOCK_TIMEOUT_S:g} s; is it stopped? Continue it, and try again"
            ) from None

    def _copy(self, connection: apsw.Connection, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        page_size = int(connection.pragma("page_size"))
        name = f"{self._source.name} {path.stem}"
        with contextlib.closing(apsw.Connection(str(path))) as copy:
            copy.pragma("synchronous", "off")  # it is synced when it is complete
            with copy.backup("main", connection, "main") as backup:
                while not backup.done:
                    backup.step(PAGES_AT_ONCE)
                    done = backup.page_count - backup.remaining
                    self._report(done * page_size, backup.page_count * page_size, name)

    # Files

    def _link(self, key: str) -> bool:
        """Link or copy a file. Returns False if it is not there any more."""
        source, target = _path(self._source / BLOBS, key), _path(self._target / BLOBS, key)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            try:
                os.link(source, target, follow_symlinks=False)
            except FileExistsError:
                return True
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise
                shutil.copyfile(source, target, follow_symlinks=False)
                target.chmod(0o600)
                _sync(target)
        except FileNotFoundError:
            return False
        return True

    def _complete_files(self, copy: apsw.Connection) -> tuple[list[str], list[str]]:
        """Link the files that are new. Remove the resources whose files were purged, and return their ids (D2).

        Also returns the ids of resources whose files are missing although the source still has them.
        """
        purged: dict[str, None] = {}
        damaged: dict[str, None] = {}
        missing = []
        for (key,) in copy.execute("SELECT key FROM blobs") if blob_tables.exist(copy) else ():
            if not _path(self._target / BLOBS, str(key)).exists() and not self._link(str(key)):
                missing.append(str(key))
        for key in missing:
            states = {use.resource_id: self._state_in_source(use, key) for use in blob_tables.uses(copy, key, limit=-1)}
            if "changed" in states.values():
                raise StoreUnavailable(f"the file {key} was removed while it was copied; nothing was copied, try again")
            purged |= {resource_id: None for resource_id, state in states.items() if state == "purged"}
            damaged |= {resource_id: None for resource_id, state in states.items() if state == "damaged"}
            if "damaged" not in states.values():  # an upload without a reference may be swept at any time
                blob_tables.delete(copy, key)
        tables = ResourceTables(ModelSpec(self._source.name))
        for resource_id in purged:
            tables.purge(copy, resource_id)
        return list(purged), list(damaged)

    def _state_in_source(self, use: BlobUse, key: str) -> Literal["purged", "damaged", "changed"]:
        """Return why a file is missing that a resource of the copy names."""
        with contextlib.closing(apsw.Connection(str(self._source / self._databases[0]))) as source:
            if source.execute("SELECT 1 FROM resources WHERE id = ?", (use.resource_id,)).get is None:
                return "purged"
            uses = blob_tables.uses(source, key, limit=-1)
        return "damaged" if use in uses else "changed"

    def _remove_unknown_files(self, copy: apsw.Connection) -> int:
        """Remove the files that have no row, because they were removed meanwhile. Return the number of the others."""
        kept = 0
        for key in list(_keys(self._target / BLOBS)):
            if blob_tables.row(copy, key) is not None:
                kept += 1
            else:
                _path(self._target / BLOBS, key).unlink()
        return kept


def _keys(root: Path) -> Iterator[str]:
    """Yield the keys of the files in a directory of blobs."""
    for digits in _entries(root):
        for sha256 in _entries(root / digits):
            for uid in _entries(root / digits / sha256):
                key = f"{sha256}/{uid}"
                if BLOB_KEY.fullmatch(key) and sha256.startswith(digits):
                    yield key


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _path(root: Path, key: str) -> Path:
    sha256, _, uid = key.partition("/")
    return root / sha256[:2] / sha256 / uid


def _sync_directories(root: Path) -> None:
    """Sync all directories. Files that are linked were synced before they got their names."""
    for directory, _, _ in os.walk(root):
        _sync(Path(directory))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
