"""Helpers of the tests of PostgresMetaStore."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
from msgspec import Struct

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.resource_manager.basic import IndexedField, IStorage
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
        return SimpleStorage(meta_store, DiskResourceStore(self.root / model_name, encoding=self.encoding))


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


async def waits_for_advisory_lock(dsn: str) -> bool:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await connection.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return bool(await rows.fetchall())
