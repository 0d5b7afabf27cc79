"""Imports of ids and names that earlier versions stored: each target takes what it can hold, or changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.backup import importing
from app.autocrud.backup.errors import BadArchive
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.resource_manager.basic import StoredKey
from app.autocrud.resource_manager.meta_store.postgres_limits import ENTRY_BYTES
from tests.stores import old_stores
from tests.stores.test_old_stores import LARGE_FILES, OLD_LARGE, servers

from .archives import Content, resource, write
from .imports import KINDS, LOCAL, Note, Place, content, program
from .test_importing import programs

__all__ = ["programs", "servers"]

ON_POSTGRES = ("postgres-disk", "redis-postgres")
Made = Callable[[str], AutoCRUD]


def text(size: int, alphabet: str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._~") -> str:
    """Return a text that PostgreSQL cannot compress to a large part."""
    return "".join(random.Random(size).choices(alphabet, k=size))


EMOJI = "".join(chr(0x1F300 + number) for number in range(256))
OLDER: dict[str, dict[str, Any]] = {
    "a long id": {"resource_id": text(6000)},
    "a name with NUL": {"created_by": "a\0b"},
    "a later name with NUL": {"updated_by": "a\0b"},
}


def one(data: str = "t", **changes: Any) -> Content:
    return Content(resources=[resource(changes.pop("resource_id", "r"), [{"text": data}], **changes)])


@pytest.fixture
async def on_postgres(tmp_path, postgres, valkey):
    """Make programs with two models whose metadata are in PostgreSQL, and close them at the end."""
    made: list[AutoCRUD] = []

    def make(kind: str) -> AutoCRUD:
        crud = AutoCRUD(storage_factory=KINDS[kind](Place(tmp_path / f"{kind}-{len(made)}", postgres, valkey)))
        for name in ("first", "note"):
            crud.add_model(Note, name=name, indexed_fields=["text"])
        made.append(crud)
        return crud

    yield make
    for crud in made:
        await crud.close()


@pytest.mark.parametrize("kind", LOCAL)
async def test_ids_and_names_of_earlier_versions_are_imported(programs: Made, tmp_path: Path, kind: str):
    changes = (*OLDER.values(), {"created_by": ""}, {"created_by": "n" * 3000}, {"resource_id": text(1500)})
    resources = [resource(f"r{at}", [{"text": "t"}], created_by="x") for at in range(2)]
    resources += [
        resource(given.get("resource_id", f"s{at}"), [{"text": "t"}], **{k: v for k, v in given.items() if k[0] != "r"})
        for at, given in enumerate(changes)
    ]
    resources.sort(key=lambda found: found[0].resource_id)
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources)})
    crud = programs(kind)
    result = await import_all(crud.managers, tmp_path / "a.tar.gz")
    assert result.models["note"].created == len(resources)
    found = (await content(crud.resource_manager(Note).storage))["resources"]
    assert {rid: shown["created_by"] for rid, (shown, _) in found.items()} == {
        meta.resource_id: meta.created_by for meta, _ in resources
    }


@pytest.mark.parametrize("name", LARGE_FILES)
async def test_a_store_with_larger_values_is_exported_and_imported(servers: old_stores.Servers, name: str, tmp_path):
    kind = Path(name).name.removesuffix(".tar.gz")
    held = old_stores.unpack(OLD_LARGE / name, servers)
    manager = old_stores.program(kind, servers)
    searches = old_stores.large_searches(kind)
    assert await old_stores.content(manager, searches) == held
    await export_all({"note": manager}, tmp_path / "a.tar.gz")
    expected = await content(manager.storage)
    place = Place(tmp_path / "other", servers.postgres, servers.redis_url)
    targets = ["memory", "postgres-disk"] if kind == "postgres" else ["memory", "disk"]
    for target in targets:
        crud = program(target, place)
        result = await import_all({"note": crud.resource_manager(Note)}, tmp_path / "a.tar.gz")
        assert result.models["note"].created == len(held["resources"])
        assert await content(crud.resource_manager(Note).storage) == expected
        await crud.close()
    await manager.storage.close()


@pytest.mark.slow
@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize("kind", ON_POSTGRES)
async def test_metadata_that_postgresql_cannot_hold_change_nothing(on_postgres: Made, tmp_path, kind, older):
    await write(tmp_path / "a.tar.gz", {"first": one(), "note": one(**OLDER[older])})
    crud = on_postgres(kind)
    for options in ({}, {"check": True}, {"on_conflict": "replace"}):
        with pytest.raises(BadArchive) as caught:
            await import_all(crud.managers, tmp_path / "a.tar.gz", **options)
        shown = f"{text(6000)[:60]}..." if older == "a long id" else "r"
        assert caught.value.detail.startswith(f"resource {shown!r} of model 'note' cannot be stored there: ")
        assert ("PostgreSQL can hold" in caught.value.detail) == (len(caught.value.detail) < 500)
    for name in ("first", "note"):
        assert [meta async for meta in crud.managers[name].storage.scan()] == []
        assert await crud.managers[name].storage.import_journal.state() is None
    await import_all(crud.managers, tmp_path / "a.tar.gz", models=["first"])
    assert (await crud.managers["first"].get("r")).data.text == "t"


@pytest.mark.slow
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("kind", ON_POSTGRES)
async def test_the_largest_ids_that_postgresql_holds(on_postgres: Made, tmp_path, kind, within):
    """Text that cannot be compressed, beside the longest text that an index may have, and in a result of a key."""
    for number, data in enumerate(("t", text(100_000, EMOJI))):
        resource_id = text(ENTRY_BYTES - len(data[:256].encode()) + (0 if within else 1))
        path = tmp_path / f"{number}.tar.gz"
        await write(path, {"note": one(data, resource_id=resource_id)})
        crud = on_postgres(kind)
        if within:
            await import_all(crud.managers, path)
            assert (await crud.managers["note"].get(resource_id)).data.text == data
        else:
            with pytest.raises(BadArchive, match=f"expected at most {len(resource_id) - 1}, which PostgreSQL can hold"):
                await import_all(crud.managers, path)
    result = resource(text(ENTRY_BYTES + (0 if within else 1)), [{"text": "t"}], created_by="a\0b")[0]
    key = StoredKey(key="0" * 64, request="1" * 64, time=5, results=(result,))
    await write(tmp_path / "k.tar.gz", {"note": Content(resources=one().resources, keys=[key])})
    crud = on_postgres(kind)
    if within:
        assert (await import_all(crud.managers, tmp_path / "k.tar.gz")).models["note"].keys == 1
    else:
        with pytest.raises(BadArchive, match="its id takes 2601 bytes in UTF-8, expected at most 2600"):
            await import_all(crud.managers, tmp_path / "k.tar.gz")


@pytest.mark.slow
async def test_an_import_that_an_earlier_version_began_is_taken_back(on_postgres: Made, tmp_path, monkeypatch):
    """It failed in the middle, because it did not look for what PostgreSQL cannot hold."""
    await write(tmp_path / "a.tar.gz", {"first": one(), "note": one(**OLDER["a long id"])})
    crud = on_postgres("postgres-disk")
    with monkeypatch.context() as patch:
        patch.setattr(importing, "MetadataLimits", type("None_", (), {}))
        with pytest.raises(Exception, match="cannot hold the id") as caught:
            await import_all(crud.managers, tmp_path / "a.tar.gz")
    assert "; imported: 'first'; not imported: 'note'; import that archive with --resume" in caught.value.detail
    assert "nothing was changed" not in caught.value.detail
    with pytest.raises(BadArchive, match="take back the import that is not finished \\(--abort\\)"):
        await import_all(crud.managers, tmp_path / "a.tar.gz", resume=True)
    await import_all(crud.managers, tmp_path / "a.tar.gz", abort=True)
    assert [meta async for meta in crud.managers["first"].storage.scan()] == []
