"""Imports of files: their content, their owners, and the references of revisions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Blob, Encoding
from app.autocrud.backup.errors import BadArchive
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.basic import BlobRow
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.simple import MemoryResourceStore

from .archives import Content, blob, read_back, resource, write
from .imports import KINDS as STORES
from .imports import Note, Place, program
from .test_importing import Killed, programs, stop_after

__all__ = ["programs"]

KINDS = ("memory", "disk", "memory-disk", "s3-sqlite", "memory-s3", "cached-s3")


def content() -> Content:
    """Return resources that refer to files: one twice, one from an earlier revision only, one that is empty."""
    blobs = [
        blob(content, owner)
        for content, owner in ((b"a" * 3_000_000, "alice"), (os.urandom(70_000), "bob"), (b"", "bob"))
    ]
    first, second, third = (row.key for row, _ in blobs)
    resources = [
        resource("a", [{"text": "1"}, {"text": "2"}], blobs=[[first, second], [first]]),
        resource("b", [{"text": "3"}], blobs=[[third]]),
        resource("c", [{"text": "4"}]),
    ]
    return Content(resources=resources, blobs=sorted(blobs, key=lambda one: one[0].key))


async def files_of(storage: Any) -> dict[tuple[str, int], list[tuple[bytes, int, str]]]:
    """Return content, size and owner of the files of each revision."""
    found = {}
    async for meta in storage.scan():
        for record in (await storage.revisions(meta.resource_id)).items:
            files = []
            for key in record.blobs:
                row = next(row for row in await storage.blobs.rows([key.partition("/")[0]]) if row.key == key)
                text = b"".join([chunk async for chunk in storage.blobs.read(key)])
                files.append((text, row.size, row.owner))
            found[meta.resource_id, record.revision] = sorted(files)
    return found


def expected_of(content: Content) -> dict[tuple[str, int], list[tuple[bytes, int, str]]]:
    files = {row.key: (text, row.size, row.owner) for row, text in content.blobs}
    return {
        (meta.resource_id, record.revision): sorted(files[key] for key in record.blobs)
        for meta, revisions in content.resources
        for record, _ in revisions
    }


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", KINDS)
async def test_files_are_equal_after_an_import(programs, tmp_path, kind, empty):
    expected = content()
    await write(tmp_path / "a.tar.gz", {"note": expected})
    crud = programs(kind)
    storage = crud.resource_manager(Note).storage
    if not empty:
        await crud.resource_manager(Note).create(Note(text="mine"), resource_id="mine")
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz")).models.values()
    assert model.blobs == 3
    found = await files_of(storage)
    assert found.pop(("mine", 1), None) == (None if empty else [])
    assert found == expected_of(expected)
    await export_all(crud.managers, tmp_path / "b.tar.gz")
    again = read_back(tmp_path / "b.tar.gz")["note"]
    assert sorted((row.sha256, text) for row, text in again.blobs) == sorted(
        (row.sha256, text) for row, text in expected.blobs
    )
    await crud.resource_manager(Note).purge("a")
    used = {row.sha256 for row, _ in expected.blobs if row.size == 0}
    left = [row for row, _ in expected.blobs if await storage.blobs.rows([row.sha256])]
    assert {row.sha256 for row in left} == used


@pytest.mark.parametrize("kind", KINDS)
async def test_files_are_uploaded_once_if_an_import_is_resumed(programs, tmp_path, monkeypatch, kind):
    expected = content()
    await write(tmp_path / "a.tar.gz", {"note": expected})
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="b")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 0)
        with pytest.raises(Killed):
            await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")
    for row, _ in expected.blobs:
        assert len(await manager.storage.blobs.rows([row.sha256])) == 1
    await manager.maintain(10)
    await import_all(crud.managers, tmp_path / "a.tar.gz", resume=True)
    assert await files_of(manager.storage) == expected_of(expected)
    for row, _ in expected.blobs:
        assert len(await manager.storage.blobs.rows([row.sha256])) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_files_of_replaced_resources_come_back(programs, tmp_path, monkeypatch, kind):
    """The journal keeps the files of what the import has replaced, whatever sweeps do."""
    first, second = content(), Content(resources=[resource("a", [{"text": "new"}])])
    await write(tmp_path / "a.tar.gz", {"note": first})
    await write(tmp_path / "b.tar.gz", {"note": second})
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await import_all(crud.managers, tmp_path / "a.tar.gz")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 1)
        with pytest.raises(Killed):
            await import_all(crud.managers, tmp_path / "b.tar.gz", on_conflict="replace")
    manager.storage._blob_sweep._keep_s = 0
    assert (await manager.get("a")).data.text == "new"
    for _ in range(3):
        await manager.maintain(10)
    (model,) = (await import_all(crud.managers, tmp_path / "b.tar.gz", abort=True)).models.values()
    assert (model.taken_back, model.not_taken_back) == (1, 0)
    assert await files_of(manager.storage) == expected_of(first)


async def test_a_storage_without_files_refuses_an_archive_with_files(tmp_path):
    await write(tmp_path / "a.tar.gz", {"note": content()})

    class WithoutBlobs:
        def build(self, _name: str) -> SimpleStorage:
            return SimpleStorage(MemoryMetaStore(), MemoryResourceStore())

    crud = program("memory", Place(Path(tmp_path)))
    crud.storage_factory = WithoutBlobs()  # type: ignore[assignment]
    manager = crud.add_model(Note, name="other")
    with pytest.raises(ConfigError, match="give it a BlobStore"):
        await import_all({"note": manager}, tmp_path / "a.tar.gz")


class Photo(Struct):
    title: str
    images: list[Blob] = []
    cover: Blob | None = None


@pytest.mark.parametrize("encoding", Encoding)
async def test_references_to_files_that_the_record_does_not_name_are_refused(tmp_path, encoding):
    """Also those of earlier revisions. A record may name more files than the model of today finds."""
    (one, text), (other, _) = blob(b"one"), blob(b"other")
    crud = AutoCRUD()
    crud.add_model(Photo)

    def photo(*rows: BlobRow) -> dict[str, Any]:
        return {"title": "t", "images": [{"sha256": row.sha256, "size": row.size} for row in rows]}

    async def refusal(datas: list[Any], blobs: list[list[str]]) -> str:
        resources = [resource("a", datas, blobs=blobs, encoding=encoding)]
        named = {key for keys in blobs for key in keys}
        files = [found for found in ((one, text),) if found[0].key in named]
        await write(tmp_path / "a.tar.gz", {"photo": Content(resources=resources, blobs=files)})
        with pytest.raises(BadArchive) as caught:
            await crud.import_all(tmp_path / "a.tar.gz")
        return caught.value.detail

    said = "the data of revision {} of resource 'a' refer to the file {}, which its record does not name"
    assert await refusal([photo(one)], [[]]) == said.format(1, one.sha256)
    assert await refusal([photo(other), photo()], [[], []]) == said.format(1, other.sha256)
    assert await refusal([photo(), photo(one, other)], [[one.key], [one.key]]) == said.format(2, other.sha256)
    assert await refusal([{"title": "t", "cover": {"sha256": other.sha256}}], [[one.key]]) == said.format(
        1, other.sha256
    )
    assert [meta async for meta in crud.resource_manager(Photo).storage.scan()] == []
    named = [resource("a", [photo(one), photo()], blobs=[[one.key], [one.key]], encoding=encoding)]
    await write(tmp_path / "a.tar.gz", {"photo": Content(resources=named, blobs=[(one, text)])})
    assert (await crud.import_all(tmp_path / "a.tar.gz")).models["photo"].blobs == 1
    await crud.close()


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize(
    ("given", "said"), [(None, "no size, or 0 bytes"), (0, "no size, or 0 bytes"), (99, "99 bytes")]
)
async def test_references_with_another_size_than_their_files_are_refused(tmp_path, encoding, given, said):
    """Also those of earlier revisions, and if another reference to the file has its size."""
    one, other = blob(b"one"), blob(b"other")
    size = {} if given is None else {"size": given}
    wrong = {"title": "t", "cover": {"sha256": one[0].sha256, **size}}
    right = {"title": "t", "images": [{"sha256": row.sha256, "size": row.size} for row, _ in (one, other)]}
    keys = [one[0].key, other[0].key]
    crud = AutoCRUD()
    manager = crud.add_model(Photo)
    blobs = sorted((one, other), key=lambda one: one[0].key)
    path = tmp_path / "a.tar.gz"
    for number, datas in ((1, [wrong]), (1, [wrong, right]), (2, [right, {**right, **wrong}])):
        good = resource("a", [right], blobs=[keys], encoding=encoding)
        bad = resource("b", datas, blobs=[keys] * 2, encoding=encoding)
        await write(path, {"photo": Content(resources=[good, bad], blobs=blobs)})
        with pytest.raises(BadArchive) as caught:
            await crud.import_all(path)
        assert caught.value.detail == (
            f"the data of revision {number} of resource 'b' of model 'photo' give the file {one[0].sha256} {said}, but"
            " the archive holds it with 3 bytes: each reference must have the size of its file"
        )
    assert [meta async for meta in manager.storage.scan()] == []
    assert await manager.storage.blobs.rows([one[0].sha256]) == []
    await write(path, {"photo": Content(resources=[good, bad], blobs=blobs, absent=("b",))})
    assert (await crud.import_all(path)).models["photo"].created == 1
    await crud.close()


async def test_a_reference_to_an_empty_file_needs_no_size(tmp_path):
    empty = blob(b"")
    crud = AutoCRUD()
    crud.add_model(Photo)
    data = {"title": "t", "cover": {"sha256": empty[0].sha256}}
    await write(
        tmp_path / "a.tar.gz",
        {"photo": Content(resources=[resource("a", [data], blobs=[[empty[0].key]])], blobs=[empty])},
    )
    assert (await crud.import_all(tmp_path / "a.tar.gz")).models["photo"].blobs == 1
    await crud.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_the_program_refuses_no_file_of_its_own_backups(tmp_path, kind):
    """The data of revisions have the sizes of files, whatever the requests said."""
    crud = AutoCRUD(storage_factory=STORES[kind](Place(tmp_path / "one")))
    manager = crud.add_model(Photo)
    refs = [await manager.upload(content) for content in (b"", b"one", b"other")]
    made = await manager.create(Photo("t", images=[replace(ref, size=7) for ref in refs]), status="draft")
    resource_id = made.meta.resource_id
    await manager.modify(resource_id, Photo("t", images=[Blob(sha256=refs[1].sha256)]))
    await manager.update(resource_id, Photo("u", cover=Blob(sha256=refs[1].sha256, size=1), images=[refs[2]]))
    await crud.export_all(tmp_path / "a.tar.gz")
    await crud.close()
    other = AutoCRUD(storage_factory=STORES[kind](Place(tmp_path / "two")))
    other.add_model(Photo)
    assert (await other.import_all(tmp_path / "a.tar.gz")).models["photo"].created == 1
    await other.close()
