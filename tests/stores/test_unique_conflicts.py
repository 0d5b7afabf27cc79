"""The operation of a batch that a UniqueConflict names, with and without the resource ids from the store."""

from __future__ import annotations

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.errors import UniqueConflict
from app.autocrud.resource_manager.basic import IndexedField
from app.autocrud.resource_manager.core import Create, ResourceManager, Update
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, IStorageFactory, MemoryStorageFactory
from app.models import Article


def manage(factory: IStorageFactory | None = None) -> ResourceManager[Article]:
    fields = [IndexedField("title", unique=True)]
    return AutoCRUD(storage_factory=factory or MemoryStorageFactory()).add_model(Article, indexed_fields=fields)


@pytest.fixture(params=["the store says who", "the store does not say who"])
def manager(request, monkeypatch):
    manager = manage()
    if request.param == "the store does not say who":
        commit = manager.storage.commit

        async def commit_without_ids(writes, once=None):
            try:
                return await commit(writes, once)
            except UniqueConflict as error:
                error.resource_ids = frozenset()
                raise

        monkeypatch.setattr(manager.storage, "commit", commit_without_ids)
    return manager


def article(title: str) -> Article:
    return Article(title=title, content="", author="")


async def test_a_value_of_a_stored_resource(manager):
    await manager.create(article("a"))
    other = (await manager.create(article("b"))).meta.resource_id
    batch = [Create(article("c")), Update(resource_id=other, data=article("a")), Create(article("d"))]
    with pytest.raises(UniqueConflict) as refused:
        await manager.batch(batch)
    assert refused.value.operation == 1


async def test_a_value_of_an_earlier_operation(manager):
    batch = [Create(article("a")), Create(article("b")), Create(article("a"))]
    with pytest.raises(UniqueConflict) as refused:
        await manager.batch(batch)
    assert refused.value.operation == 2


async def test_a_value_that_a_later_operation_gives_up(manager):
    one = (await manager.create(article("a"))).meta.resource_id
    batch = [Create(article("a")), Update(resource_id=one, data=article("b"))]
    assert len(await manager.batch(batch)) == 2


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_the_ids_of_the_resources_that_share_the_value(kind, tmp_path):
    manager = manage(DiskStorageFactory(tmp_path) if kind == "disk" else None)
    await manager.create(article("a"), resource_id="owner")
    with pytest.raises(UniqueConflict) as refused:
        await manager.create(article("a"), resource_id="rival")
    assert refused.value.resource_ids == {"owner", "rival"}
    with pytest.raises(UniqueConflict) as refused:
        await manager.batch([Create(article("b"), resource_id="one"), Create(article("b"), resource_id="two")])
    assert refused.value.resource_ids == {"one", "two"}
    assert refused.value.operation == 1
    await manager.close()
