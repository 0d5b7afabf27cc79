"""The rows of blobs in SQLite databases of this machine: when the tables are made, what they cost, and damage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from app.autocrud.errors import BlobQuotaExceeded, ConfigError, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.backends.sqlite.definitions import FORMAT, FORMAT_WITH_BLOBS
from app.autocrud.resource_manager.contract.blobs import BLOBS_MARKER
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
)
from app.autocrud.testing.blobs import NamedBlobs, blob_rows_of, upload
from app.autocrud.testing.model import Item, manage

FILES = {DiskStorageFactory: "index.sqlite", MemoryDiskStorageFactory: "bodies.sqlite"}
ON_DISK = pytest.mark.parametrize("factory", FILES)


@pytest.fixture
def file(factory, tmp_path) -> Iterator[apsw.Connection]:
    """Open the file that has the rows of blobs, made by a model without blobs."""

    async def make() -> None:
        manager = manage(factory(tmp_path))
        await manager.create(Item(code="c"), resource_id="r")
        await manager.close()

    asyncio.run(make())
    connection = apsw.Connection(str(next(tmp_path.rglob(FILES[factory]))))
    yield connection
    connection.close()


def state_of(file: apsw.Connection) -> tuple[int, set[str], set[str]]:
    """Return the format, the unique fields, and the tables of blobs."""
    uniques = {field for (field,) in file.execute("SELECT field FROM uniques")}
    tables = {name for (name,) in file.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'blob%'")}
    return file.execute("SELECT format FROM state").get, uniques - {"code"}, tables


@ON_DISK
async def test_the_first_row_marks_the_file(factory, file, tmp_path):
    manager = manage(factory(tmp_path))
    await manager.open()
    rows = blob_rows_of(manager)
    await rows.blobs([upload().sha256])
    await rows.blob_uses(upload().key)
    await rows.blob_usage()
    assert await rows.blob_epoch() == 0
    with pytest.raises(BlobQuotaExceeded):
        await rows.add_blob(upload(), quota=2)
    assert await rows.remove_blobs([]) == []
    await manager.update("r", Item(text="2"))
    assert state_of(file) == (FORMAT, set(), set())
    await rows.remove_blobs([upload().key])
    assert state_of(file)[:2] == (FORMAT, set())
    row = upload(epoch=1)
    await rows.add_blob(row)
    assert state_of(file)[:2] == (FORMAT_WITH_BLOBS, {BLOBS_MARKER})
    await rows.remove_blobs([row.key])
    assert state_of(file)[:2] == (FORMAT_WITH_BLOBS, {BLOBS_MARKER})
    await manager.close()


@pytest.mark.parametrize("factory", [MemoryStorageFactory, *FILES])
async def test_models_without_blobs_run_no_statement_about_them(factory: type[IStorageFactory], tmp_path: Path):
    manager = manage(factory(*[tmp_path] if factory in FILES else []))
    await manager.open()
    store = blob_rows_of(manager)
    await manager.create(Item())  # makes the indexes
    statements: list[str] = []
    for connection in [store._db._connection] if hasattr(store._db, "_connection") else [store._db._writer]:
        connection.exec_trace = lambda _cursor, statement, _bindings: statements.append(statement) or True
    await manager.create(Item(text="1"), resource_id="r", status="draft")
    await manager.modify("r", Item(text="2"))
    await manager.update("r", Item(text="3"))
    await manager.purge("r")
    assert len(statements) > 20
    others = [one for one in statements if "import_entries" not in one]  # a purge looks for the journal of an import
    assert [one for one in others if "blob" in one or "sqlite_schema" in one] == []
    await manager.close()


@ON_DISK
async def test_a_later_format_is_refused_by_its_number(factory, file, tmp_path):
    file.execute("UPDATE state SET format = 3")
    with pytest.raises(ConfigError, match="has format 3, this program knows 1 and 2: deploy a newer one"):
        await manage(factory(tmp_path)).open()


@ON_DISK
@pytest.mark.parametrize("damage", ["DROP TABLE blob_state", "DELETE FROM blob_state", "DROP TABLE blob_uses"])
async def test_a_file_that_lost_its_rows_of_blobs_removes_none(factory, file, tmp_path, damage):
    manager = manage(factory(tmp_path))
    await manager.open()
    rows, names = blob_rows_of(manager), NamedBlobs(manager.storage)
    row = upload()
    await rows.add_blob(row)
    names.by_resource["r"] = (row.key,)
    await manager.update("r", Item(text="2"))
    file.execute(damage)
    with pytest.raises((StoreDamaged, StoreUnavailable)):
        await rows.remove_blobs([row.key, upload().key])
    await manager.close()
