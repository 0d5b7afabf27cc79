"""The stores of examples/custom_stores satisfy the contract, also combined with the project's own stores."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from app import settings, wiring
from app.autocrud.errors import ConfigError, OutcomeUnknown, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import (
    BlobStore,
    Change,
    IdempotentCommit,
    IStorage,
    MetaStore,
    ResourceStore,
    Version,
)
from app.autocrud.resource_manager.contract.overrides import (
    META_STORE_PROTOCOLS,
    RENAMED_OF_CACHE,
    RENAMED_OF_META_STORE,
    RENAMED_OF_RESOURCE_STORE,
    RENAMED_OF_STORAGE,
    RESOURCE_STORE_PROTOCOLS,
    members_of,
)
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.engine.operations import Create, Purge
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing import CacheClock, DurableConformance, OwnedConformance, SharedConformance, StorageConformance
from app.autocrud.testing.model import Item, manage
from examples.custom_stores import BytesCache, DictMetaStore, FileMetaStore, FileResourceStore, FilesStorageFactory
from tests.stores import cache_helpers

ROOT = Path(__file__).parent.parent

_doubles: dict[Path, MemoryObjectStore] = {}


class Mixed(IStorageFactory):
    """One combination of the layers of the project and of the example."""

    def __init__(self, mixture: str, root: Path) -> None:
        self.mixture, self.root = mixture, root

    def build(self, model_name: str) -> IStorage:
        root = self.root / model_name
        match self.mixture:
            case "dicts, memory":
                return SimpleStorage(DictMetaStore(), MemoryResourceStore())
            case "dicts, disk":
                return SimpleStorage(DictMetaStore(), DiskResourceStore(root))
            case "disk, files":
                return SimpleStorage(DiskMetaStore(root / "meta"), FileResourceStore(root / "data"))
            case "file, S3 behind a cache":
                objects = _doubles.setdefault(self.root, MemoryObjectStore())
                bodies = CachedS3ResourceStore([BytesCache()], bucket="double", prefix="m/", object_store=objects)
                return SimpleStorage(FileMetaStore(root), bodies)
        raise AssertionError(self.mixture)


class TestFiles(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return FilesStorageFactory(root)


class TestDictsOverMemory(StorageConformance):
    def make(self, root: Path) -> IStorageFactory:
        return Mixed("dicts, memory", root)


class TestDictsOverOurDisk(OwnedConformance):
    """Our store keeps records, so they are the truth, and the dicts are made from them again."""

    def make(self, root: Path) -> IStorageFactory:
        return Mixed("dicts, disk", root)


class TestFilesUnderOurDisk(DurableConformance):
    def make(self, root: Path) -> IStorageFactory:
        return Mixed("disk, files", root)


class TestFileOverOurS3BehindACache(DurableConformance):
    def make(self, root: Path) -> IStorageFactory:
        return Mixed("file, S3 behind a cache", root)


class TestBytesCache(cache_helpers.BoundedConformance):
    def make(self, root: Path, clock: CacheClock) -> BytesCache:
        return BytesCache(clock=clock)

    def small(self, root: Path, clock: CacheClock) -> BytesCache:
        return BytesCache(cache_helpers.ROOM * cache_helpers.SIZE + cache_helpers.SIZE // 2, clock=clock)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_a_cache_without_capacity_is_refused(self, wrong):
        with pytest.raises(ConfigError, match="expected at least 1"):
            BytesCache(wrong)

    async def test_an_entry_that_is_too_large_evicts_nothing(self):
        cache = BytesCache(10)
        await cache.put("a", b"1", 60)
        await cache.put("b", bytes(10), 60)
        assert (await cache.get("a"), await cache.get("b")) == (b"1", None)


# Behaviour that the conformance suite does not check


@pytest.fixture(params=["files", "disk, files"])
async def manager(request, tmp_path):
    factory = FilesStorageFactory(tmp_path) if request.param == "files" else Mixed(request.param, tmp_path)
    manager = manage(factory)
    await manager.open()
    yield manager
    await manager.close()


@pytest.fixture
async def files(tmp_path):
    manager = manage(FilesStorageFactory(tmp_path))
    await manager.create(Item(text="1"), resource_id="1")
    yield manager
    await manager.close()


def bodies(root: Path) -> set[str]:
    return {path.name for path in root.glob("item/data/*.body")}


async def test_a_body_that_was_swept_before_its_commit_is_put_again(manager, tmp_path):
    storage, commit = manager.storage, manager.storage.meta_store.commit
    swept = []

    async def slow(changes, once):
        if not swept:
            swept.extend(bodies(tmp_path))
            for _ in range(3):
                await storage.maintain(10)
            assert bodies(tmp_path) == set()
        return await commit(changes, once)

    storage.meta_store.commit = slow
    await manager.create(Item(text="1"), resource_id="1")
    assert len(swept) == 1
    assert (await manager.get("1")).data.text == "1"


async def test_only_orphans_and_unfinished_files_are_removed(manager, tmp_path):
    created = await manager.create(Item(text="1"))
    await manager.update(created.meta.resource_id, Item(text="2"))
    kept = bodies(tmp_path)
    store = manager.storage.resource_store
    for number in range(3):
        await store.put(f"0/orphan {number}", None, b"")
    old, young = tmp_path / "item/data/old.tmp", tmp_path / "item/data/young.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    for _ in range(3):
        await manager.maintain(10)
    assert bodies(tmp_path) == kept
    assert (old.exists(), young.exists()) == (False, True)


async def test_older_ones_come_in_pages_and_generations_are_numbers(tmp_path):
    store = FileResourceStore(tmp_path)
    uids = ["0/b", "0/a", "2/a", "9/a", "10/a", "3/../x"]
    for uid in uids:
        await store.put(uid, None, b"")
    assert await store.older_than(10, limit=3) == ["0/a", "0/b", "2/a"]
    assert await store.older_than(10, "2/a") == ["3/../x", "9/a"]
    assert await store.older_than(11, "0/b") == ["10/a", "2/a", "3/../x", "9/a"]


async def test_a_purged_resource_leaves_no_trace(files, tmp_path):
    await files.batch([Create(Item(text="secret"), "secret")])
    await files.batch([Purge(resource_id="secret")])
    meta_store = files.storage.meta_store
    once = IdempotentCommit(key="k", request="r", time=0, results=(0, 1))
    meta = (await files.create(Item(), resource_id="other secret")).meta
    present = Version(meta.version, meta.nonce)
    purge, create = change(meta, expect=present, purge=True), change(meta, expect="absent")
    await meta_store.commit([purge, create, purge], once)
    assert (await meta_store.done("k")).results == [None, None]
    left = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in left


def change(meta, **more):
    return Change(meta=meta, record=None, index=None, **more)


class PowerCut:
    """The files that a machine finds after a power failure.

    These are the names as they were at the last sync of their directory, each with the content of the last sync of its
    file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[Path, dict[str, bytes | None]] = {}
        self.fail: list[str] = []  # the files that the disk refuses to sync
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.sync)

    def sync(self, handle: int) -> None:
        found = os.fstat(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if ("directory" if stat.S_ISDIR(found.st_mode) else "file") in self.fail:
            raise OSError(28, "No space left on device")
        self.fsync(handle)
        if stat.S_ISDIR(found.st_mode):
            self.names[path] = {one.name: self.contents.get(one.stat().st_ino) for one in path.iterdir()}
        else:
            self.contents[found.st_ino] = path.read_bytes()

    def check(self, root: Path) -> None:
        """Check that every present file and its content are synced."""
        for path in root.rglob("*"):
            assert path.name in self.names[path.parent]
            if path.suffix in (".json", ".body"):
                assert self.names[path.parent][path.name] == path.read_bytes()


async def test_acknowledged_writes_survive_a_power_cut(tmp_path, monkeypatch):
    power = PowerCut(monkeypatch)
    manager = manage(FilesStorageFactory(tmp_path / "a" / "b"))
    for number in range(3):
        await manager.create(Item(number=number), resource_id=f"{number}", status="draft")
        power.check(tmp_path)
    await manager.modify("0", Item(number=7))
    await manager.purge("1")
    power.check(tmp_path)
    await manager.close()


async def test_a_disk_that_refuses_changes_nothing(files, tmp_path, monkeypatch):
    power = PowerCut(monkeypatch)
    power.fail = ["file"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StoreUnavailable, match="No space left"):
        await files.update("1", Item(text="2"))
    with pytest.raises(StoreUnavailable):
        await files.delete("1")  # which has no body
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    power.fail = []
    assert (await files.update("1", Item(text="2"))).meta.version == 2


async def test_an_unknown_outcome_of_a_commit_is_reported(files, monkeypatch):
    PowerCut(monkeypatch).fail = ["directory"]
    with pytest.raises(OutcomeUnknown):
        await files.delete("1")


async def test_damage_is_reported_and_stops_writes(files, tmp_path):
    await files.get("1")
    (state,) = tmp_path.rglob("state.json")
    whole = state.read_bytes()
    state.unlink()
    for content in (None, b"", whole[:-1]):
        if content is not None:
            state.write_bytes(content)
        with pytest.raises(StoreDamaged):
            await files.get("1")
        with pytest.raises(StoreDamaged):
            await files.create(Item())


async def test_no_read_waits_for_a_writer(files):
    with files.storage.meta_store._directory.locked():
        writing = asyncio.create_task(files.delete("1"))
        assert (await files.get("1")).data.text == "1"
        assert await files.count() == 1
    assert (await writing).is_deleted


# The pages


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def table(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this title."""
    (rows,) = re.findall(rf"^\| {heading} \|.*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def test_the_excerpts_are_from_the_example():
    source = (ROOT / "examples/custom_stores/dicts.py").read_text()
    excerpts = blocks(page("custom-stores.md"), "py")
    assert len(excerpts) == 2
    assert all(any(textwrap.indent(excerpt, " " * depth) in source for depth in (4, 8)) for excerpt in excerpts)


def test_the_example_is_used_as_the_page_says():
    names: dict[str, object] = {"__name__": "page"}
    exec(blocks(page("custom-stores.md"), "python")[0], names)  # noqa: S102 - it is our own page
    stores = {name: manager.storage for name, manager in names["crud"].managers.items()}
    assert {name: type(storage.meta_store) for name, storage in stores.items()} == {
        "article": FileMetaStore,
        "photo": FileMetaStore,
    }
    assert [storage.durable for storage in stores.values()] == [True, True]


def test_the_suite_runs_as_the_page_says(tmp_path):
    text = page("custom-stores.md")
    (command,) = blocks(text, "sh")
    name, *arguments = shlex.split(command)
    assert name == ".venv/bin/python"
    (tmp_path / "tests").mkdir()
    for path in ("app", "examples", "pyproject.toml", "tests/__init__.py"):
        (tmp_path / path).symlink_to(ROOT / path)
    (tmp_path / arguments[-1]).write_text(blocks(text, "python")[1])
    one = ["-k", "create_and_get or put_and_get", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *arguments, *one], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_every_method_of_a_contract_has_a_row():
    text = page("custom-stores.md")
    for heading, contract in [("MetaStore", MetaStore), ("ResourceStore", ResourceStore), ("BlobStore", BlobStore)]:
        rows = " ".join(row[0] for row in table(text, heading))
        assert contract.__abstractmethods__
        assert all(f"`{name}" in rows for name in contract.__abstractmethods__)


@pytest.mark.parametrize(
    ("heading", "protocols"),
    [("MetaStore", META_STORE_PROTOCOLS), ("ResourceStore", RESOURCE_STORE_PROTOCOLS)],
)
def test_every_protocol_has_a_row_with_its_methods(heading, protocols):
    rows = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1]))
        for row in table(page("custom-stores.md"), f"ability of a {heading}")
    }
    assert rows == {protocol.__name__: set(members_of(protocol)) for protocol in protocols}


def test_every_renamed_method_has_a_row():
    rows = table(page("custom-stores.md"), "former name")
    told = {pair for row in rows for pair in zip(*(re.findall(r"`(\w+)`", cell) for cell in row), strict=True)}
    renamed = (RENAMED_OF_META_STORE, RENAMED_OF_RESOURCE_STORE, RENAMED_OF_STORAGE, RENAMED_OF_CACHE)
    assert told == {pair for names in renamed for pair in names.items()}


def test_every_storage_has_a_row():
    text = page("storage.md")
    hints = get_type_hints(settings.Pair)
    assert {row[0].split("`")[1] for row in table(text, "kind")} == set(settings.KINDS)
    assert {row[0].strip("`") for row in table(text, "MetaStore")} == set(get_args(hints["meta"]))
    assert {row[0].strip("`") for row in table(text, "ResourceStore")} == set(get_args(hints["resource"]))


VALUES = {
    "CRUDSTACK_BUCKET": "bucket",
    "CRUDSTACK_PG_DSN": "postgresql://127.0.0.1:1/db",
    "CRUDSTACK_REDIS_URL": "redis://127.0.0.1:1/0",
    "CRUDSTACK_AMQP_URL": "amqp://127.0.0.1:1",
}


@pytest.mark.parametrize("row", table(page("storage.md"), "kind"), ids=lambda row: row[0])
def test_a_kind_is_the_pair_needs_the_variables_and_promises_what_its_row_says(row, tmp_path):
    kind, pair, needs, durable = row[0].split("`")[1], row[1], re.findall(r"`(\w+)`", row[2]), row[3]
    values = {**VALUES, "CRUDSTACK_DATA_DIR": str(tmp_path)}
    environment = {"CRUDSTACK_STORAGE": kind, **{name: values[name] for name in needs}}
    given = settings.load(environment)
    found = wiring.pair_of(kind, given)
    assert f"{found.meta}, {found.resource}" == pair
    storage = wiring.storage_factory(given).build("m")
    assert {(False, False): "no", (True, False): "yes", (True, True): "remote"}[
        storage.durable, storage.remote
    ] == durable
    for name in needs:
        less = {variable: value for variable, value in environment.items() if variable != name}
        with pytest.raises(ConfigError, match="is not set"):
            wiring.storage_factory(settings.load(less)).build("m")


def test_the_settings_of_the_page_are_settings():
    text = page("storage.md")
    assert set(re.findall(r"CRUDSTACK_[A-Z0-9_]+", text)) <= set(settings.VARIABLES)
    commands = blocks(text, "sh")
    assert len(commands) == 4
    for command in commands:
        assigned = dict(word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z_]+=", word))
        assert settings.load(assigned).outputs.storage


@pytest.mark.parametrize("name", ["custom-stores.md", "storage.md"])
def test_links_and_modules_exist(name):
    text = page(name)
    for link in re.findall(r"\]\(([^)#]+)\)", re.sub(r"`[^`]*`", "", text)):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:app|examples|tests)/[\w/.]+)`", text):
        assert path == "tests/test_my_storage.py" or (ROOT / path).exists(), path
