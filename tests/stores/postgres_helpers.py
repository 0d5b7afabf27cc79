"""Helpers of the tests of PostgresMetaStore."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.resource_manager.basic import IndexedField, IStorage, ModelSpec
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory


class WithDisk(IStorageFactory):
    def __init__(self, root: Path, encoding: Encoding | None = None) -> None:
        self.root, self.encoding = root, encoding

    def build(self, model_name: str) -> IStorage:
        meta_store = PostgresMetaStore(
            os.environ["TEST_POSTGRES"],
            encoding=self.encoding,
            table_name=f"{self.root.name}/meta_{model_name}",
            max_size=4,
        )
        directory = self.root / model_name
        return SimpleStorage(
            meta_store,
            DiskResourceStore(directory, encoding=self.encoding),
            DiskBlobStore(directory / "blobs"),
        )


class Note(Struct):
    text: str
    views: int = 0
    tags: list[str] = []
    code: str | None = None


FIELDS = ("text", "views", "tags", IndexedField("code", unique=True))


def manager_of(dsn: str, name: str, fields=FIELDS, bodies=None, **options):
    class Factory(IStorageFactory):
        def build(self, model_name: str) -> IStorage:
            return SimpleStorage(
                PostgresMetaStore(dsn, table_name=name, **options),
                bodies if bodies is not None else MemoryResourceStore(),
            )

    return AutoCRUD(storage_factory=Factory()).add_model(Note, indexed_fields=list(fields))


def dsn_of(request: pytest.FixtureRequest) -> str:
    """Return the address of a server, or of a pooler in front of one if the parameter of the fixture is "pooled"."""
    if request.param == "pooled":
        request.getfixturevalue("pgbouncer")
        return os.environ["TEST_PGBOUNCER"]
    return request.getfixturevalue("postgres")


def new_store(dsn: str, prefix: str, **options) -> PostgresMetaStore:
    """Return a store of the model `item`, whose fields are not indexed, with tables of its own."""
    store = PostgresMetaStore(dsn, table_name=f"{prefix}{uuid4().hex[:12]}", **options)
    store.bind(ModelSpec("item"))
    return store


async def waits_for_advisory_lock(dsn: str) -> bool:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await connection.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return bool(await rows.fetchall())
