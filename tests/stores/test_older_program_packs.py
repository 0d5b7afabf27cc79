"""A program of the commit before packs beside this one: K3 of `packs`."""

from __future__ import annotations

import asyncio
import re
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.resource_manager.storage_factory import MemoryStorageFactory, S3StorageFactory
from app.autocrud.testing.model import Item, manage
from tests.services import BUCKET

from .older_program import BEFORE_PACKS, Refused, older_program, sources

pytestmark = pytest.mark.slow

REFUSAL = "ConfigError: the store in the bucket has format 3, this program knows 1 and 2: deploy a newer one"
COMMANDS: list[tuple[Any, ...]] = [
    ("update", "r1", "x"),
    ("modify", "d", "x"),
    ("publish", "d"),
    ("switch", "r1", 1),
    ("delete", "r1"),
    ("purge", "r1"),
    ("texts",),
    ("maintain", 10),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return sources(BEFORE_PACKS, tmp_path_factory.mktemp("older"))


@pytest.fixture(params=["ministack_s3", "seaweed_s3"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("runs", ["before", "afterwards"])
def test_an_older_program_refuses_a_model_with_packs(source, server, runs, tmp_path):
    """It may be running when the model is imported."""
    prefix = f"{uuid.uuid4().hex}/"
    start = partial(older_program, source, "s3-sqlite", BUCKET, *server, prefix=prefix)

    def refuses(program: Any) -> None:
        for command in COMMANDS:
            with pytest.raises(Refused, match=re.escape(REFUSAL)):
                program(*command)
        # A create needs no read, so its PUT conflicts with a HEAD that the program cannot read.
        with pytest.raises(Refused, match=f"{re.escape(REFUSAL)}|OutcomeUnknown"):
            program("create", "by old", "x")

    async def imported() -> None:
        memory = manage(MemoryStorageFactory())
        for number in range(20):
            await memory.create(Item(text=str(number)), resource_id=f"r{number}")
        await memory.create(Item(text="draft"), resource_id="d", status="draft")
        await export_all({memory.name: memory}, tmp_path / "a.tar.gz")
        new = manage(S3StorageFactory(BUCKET, *server, prefix=prefix))
        await import_all({new.name: new}, tmp_path / "a.tar.gz")
        await new.close()

    async def check() -> None:
        new = manage(S3StorageFactory(BUCKET, *server, prefix=prefix))
        texts = {f"r{number}": str(number) for number in range(20)} | {"d": "draft"}
        for rid, text in texts.items():
            assert (await new.get(rid)).data.text == text
        assert await new.count() == len(texts)
        await new.close()

    if runs == "before":
        with start() as running:
            running("open")
            asyncio.run(imported())
            refuses(running)
    else:
        asyncio.run(imported())
        with start() as later:
            refuses(later)
    asyncio.run(check())
