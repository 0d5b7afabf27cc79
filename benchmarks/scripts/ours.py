"""Our server: `python -m benchmarks.scripts.ours KIND DIRECTORY PORT`."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, IStorageFactory, MemoryStorageFactory


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: int = 0


def factory(kind: str, directory: str) -> IStorageFactory:
    return MemoryStorageFactory() if kind == "memory" else DiskStorageFactory(directory)


def crud(kind: str, directory: str) -> AutoCRUD:
    made = AutoCRUD(storage_factory=factory(kind, directory))
    made.add_model(Article, indexed_fields=["author", "views"])
    return made


if __name__ == "__main__":
    app = FastAPI()
    crud(sys.argv[1], sys.argv[2]).apply(app)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="error", access_log=False)
