"""The examples of the document that the system is built from, in its order and in one directory.

Only the import root differs, and models that the page leaves out are added. Each block is what a user would paste.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.basic import Encoding, IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryStorageFactory,
)
from tests.http.conftest import client_of


class TodoItem(Struct):
    title: str


class User(Struct):
    username: str
    email: str


class Session(Struct):
    user_id: str
    token: str
    expires_at: datetime


class Article(Struct):
    title: str
    content: str
    published: bool = False


USER = User("alice", "alice@example.org")
SESSION = Session("1", "t", datetime(2026, 1, 1, tzinfo=UTC))
ARTICLE = Article("Sun", "It shines.")


class CustomSimpleStorageFactory(IStorageFactory):
    """自定義儲存工廠：記憶體索引 + 磁碟資料"""

    def __init__(self, data_dir: Path):
        self.data_dir = Path(data_dir)

    def build(self, model_name: str) -> IStorage:
        # MetaStore: 記憶體（快速搜尋）
        meta_store = MemoryMetaStore()

        # ResourceStore: 磁碟（持久化資料）
        resource_store = DiskResourceStore(rootdir=self.data_dir / model_name)

        return SimpleStorage(meta_store, resource_store)


def memory():
    crud = AutoCRUD()
    crud.add_model(TodoItem)
    return crud, {TodoItem: TodoItem("x")}


def disk():
    storage_factory = DiskStorageFactory(rootdir=Path("./data"))
    crud = AutoCRUD(storage_factory=storage_factory)
    crud.add_model(TodoItem)
    return crud, {TodoItem: TodoItem("x")}


def a_storage_for_each_model():
    crud = AutoCRUD()
    crud.add_model(User, storage_factory=DiskStorageFactory("./data"))
    crud.add_model(Session, storage_factory=MemoryStorageFactory())
    return crud, {User: USER, Session: SESSION}


def memory_and_disk():
    storage_factory = CustomSimpleStorageFactory(data_dir=Path("./data"))
    crud = AutoCRUD(storage_factory=storage_factory)
    crud.add_model(Article)
    return crud, {Article: ARTICLE}


def development():
    crud = AutoCRUD()
    crud.add_model(Article)
    return crud, {Article: ARTICLE}


def production():
    storage_factory = DiskStorageFactory(rootdir=Path("./production_data"))
    crud = AutoCRUD(storage_factory=storage_factory)
    crud.add_model(Article)
    return crud, {Article: ARTICLE}


def hybrid():
    crud = AutoCRUD()
    crud.add_model(User, storage_factory=DiskStorageFactory("./data/users"))
    crud.add_model(Session, storage_factory=MemoryStorageFactory())
    crud.add_model(Article, storage_factory=DiskStorageFactory("./data/articles"))
    return crud, {User: USER, Session: SESSION, Article: ARTICLE}


def encoding():
    crud = AutoCRUD(
        storage_factory=DiskStorageFactory("./data"),
        encoding=Encoding.msgpack,  # 使用 MessagePack
    )
    crud.add_model(TodoItem)
    return crud, {TodoItem: TodoItem("x")}


PAGE = [memory, disk, a_storage_for_each_model, memory_and_disk, development, production, hybrid, encoding]


async def use(make, expected_before: dict[str, int]) -> None:
    """Serve the example as its page does, write to each model and read it back."""
    crud, data = make()
    app = FastAPI()
    crud.apply(app)
    async with app.router.lifespan_context(app), client_of(app) as api:
        for model, value in data.items():
            manager = crud.resource_manager(model)
            before = await manager.count()
            assert before == expected_before.get(f"{make.__name__} {model.__name__}", 0)
            created = await manager.create(value)
            answer = await api.get(f"/{manager.name}/{created.meta.resource_id}")
            assert answer.status_code == 200
            assert manager.codec.parse((await api.get(f"{answer.request.url.path}/data")).content).data == value
            assert await manager.count() == before + 1


def test_the_page_in_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The last example opens the store that the second one wrote as JSON, and continues with MessagePack.
    for make in PAGE:
        asyncio.run(use(make, {"encoding TodoItem": 1}))
    for path in (
        "data/todo-item/meta",
        "data/todo-item/data",
        "data/user/meta",
        "data/article",
        "production_data/article/meta",
    ):
        assert (tmp_path / path).is_dir(), path

    async def both_encodings():
        crud, _ = encoding()
        page = await crud.resource_manager(TodoItem).search()
        await crud.close()
        return {(found.meta.encoding, found.data.title) for found in page.items}

    assert asyncio.run(both_encodings()) == {(Encoding.json, "x"), (Encoding.msgpack, "x")}


@pytest.mark.parametrize("make", [disk, memory_and_disk, production, a_storage_for_each_model])
def test_data_on_disk_survives_a_restart(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = make()[1]
    durable = {model.__name__ for model in first if model is not Session}
    for times in range(3):
        asyncio.run(use(make, {f"{make.__name__} {name}": times for name in durable}))
