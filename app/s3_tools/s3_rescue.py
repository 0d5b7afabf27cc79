"""`crudstack s3-rescue`: write the changes that a fork lost to a file, and resume service.

docs/s3-sqlite.md explains forks. The record of the fork in the data directory and the local copy beside it name the
lost transactions. Their bodies are in the bucket until the maintenance of some process sweeps them as orphans.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec

from ..autocrud.errors import ConfigError, CrudError
from ..autocrud.resource_manager.backends.s3_sqlite.copy_files import current_path
from ..autocrud.resource_manager.backends.s3_sqlite.fork_report import (
    LostRecords,
    find_lost,
    forget_copy,
    fork_files,
    read_copy,
    read_fork,
)
from ..autocrud.resource_manager.backends.s3_sqlite.head import LogRecord, decode_head, decode_ops
from ..autocrud.resource_manager.core import ResourceManager, SimpleStorage
from ..autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from ..autocrud.resource_manager.model.verification import Verifier


class Rescued(NamedTuple):
    """The numbers of written changes, transactions and changes without data, and the files with whole local copies."""

    changes: int
    transactions: int
    without_data: int
    copies: list[Path]


class _Forked(NamedTuple):
    """A model with a forked history, and the directory of its local copy."""

    manager: ResourceManager[Any]
    store: S3SqliteMetaStore
    directory: Path


async def rescue(managers: Mapping[str, ResourceManager[Any]], file: Path, *, resume: bool = False) -> Rescued:
    """Write the changes that this machine acknowledged and the bucket lost to `file`, as JSON lines.

    If `resume` is true, removes the record of the fork and the local copies afterwards, so that the program serves
    again. In that case, a `file` that already contains all lost transactions is kept. Raises ConfigError if no fork is
    recorded, or if `file` exists and is not such a file.
    """
    forked = _forked(managers)
    if not forked:
        raise ConfigError(
            "no fork is recorded for any model: expected CRUDSTACK_DATA_DIR, CRUDSTACK_BUCKET and the S3 endpoint of"
            " the program that answered history-forked"
        )
    lines: list[dict[str, Any]] = []
    incomplete: list[_Forked] = []
    for one in forked:
        lost = await _lost(one)
        for record in lost.records:
            lines += await _lines(one.manager, record)
        if lost.incomplete:
            incomplete.append(one)
    wanted = {line["transaction"] for line in lines}
    if not (resume and _has_all(file, wanted)):
        _write(file, lines)
    copies = []
    if resume:
        for one in incomplete:  # only the local copy has the content
            copies += _keep_copy(one, file)
        for one in forked:
            forget_copy(one.directory)
    return Rescued(len(lines), len(wanted), sum(line["data"] is None for line in lines if "error" in line), copies)


def _forked(managers: Mapping[str, ResourceManager[Any]]) -> list[_Forked]:
    forked = []
    for manager in managers.values():
        store = manager.storage.meta_store if isinstance(manager.storage, SimpleStorage) else None
        if isinstance(store, S3SqliteMetaStore):
            directory = store.local_directory
            if directory is not None and fork_files(directory):
                forked.append(_Forked(manager, store, directory))
    return forked


async def _lost(one: _Forked) -> LostRecords:
    """Compare the local records with the bucket again, because it may have changed since the fork was detected."""
    recorded = [record for path in fork_files(one.directory) for record in read_fork(path).lost]
    heads, recent = read_copy(one.directory)
    head_key = f"{one.store.key}/HEAD"
    found = await one.store.object_store.get(head_key)
    if found is None:
        raise ConfigError(f"{head_key} is missing in the bucket: put it back, then rescue")
    return await find_lost(one.store.object_store, head_key, heads, [*recent, *recorded], decode_head(found.body))


async def _lines(manager: ResourceManager[Any], record: LogRecord) -> list[dict[str, Any]]:
    """Return a line for each change of a transaction, but none for index entries and idempotency keys."""
    common = {"model": manager.name, "transaction": record.txid.hex(), "sequence": record.seq}
    if not record.ops:
        error = "the log of this transaction is gone; its content is unknown"
        return [{**common, "change": "unknown", "data": None, "error": error}]
    common["time"] = dt.datetime.fromtimestamp(record.time / 1_000_000, dt.UTC).isoformat()
    lines = []
    for op in decode_ops(record.ops):
        line: dict[str, Any] = {**common, "change": op.kind, "resource_id": op.resource_id}
        if op.kind == "purge":
            lines.append({**line, "data": None})
        elif op.blob_row is not None:
            row = op.blob_row
            lines.append({**common, "change": "blob", "sha256": row.sha256, "size": row.size, "data": None})
        elif op.kind == "put" and op.meta is not None:
            line["metadata"] = op.meta
            try:
                body = await manager.storage.body(op.meta.uid)
                line["data"] = msgspec.Raw(Verifier(manager.codec, verified=True).json(op.meta, body))
            except (CrudError, msgspec.MsgspecError) as error:
                line |= {"data": None, "error": f"the body cannot be read: {error}"}
            lines.append(line)
    return lines


def _write(file: Path, lines: list[dict[str, Any]]) -> None:
    """Write a new file and sync it to disk."""
    body = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{file} exists: expected a new file, or with --resume one that has all lost changes"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as out:
        out.write(body)
        out.flush()
        os.fsync(out.fileno())
    directory = os.open(file.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _has_all(file: Path, wanted: set[str]) -> bool:
    """Return whether an existing file has a line of each transaction."""
    try:
        lines = file.read_bytes().splitlines()
        return wanted <= {msgspec.json.decode(line)["transaction"] for line in lines}
    except (OSError, msgspec.MsgspecError, KeyError, TypeError):
        return False


def _keep_copy(one: _Forked, file: Path) -> list[Path]:
    """Write the local copy as one SQLite file beside `file`, and return its path."""
    path = current_path(one.directory)
    if path is None:
        return []
    kept = file.with_name(f"{file.name}.{one.manager.name}.sqlite")
    unfinished = kept.with_name(f"{kept.name}.new")
    try:
        unfinished.unlink(missing_ok=True)
        with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            connection.execute("VACUUM INTO ?", (str(unfinished),))
        unfinished.replace(kept)
    except (apsw.Error, OSError) as error:
        raise ConfigError(f"the local copy of {one.manager.name} cannot be written to {kept}: {error}") from None
    return [kept]
