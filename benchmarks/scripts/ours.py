"""Our server: `python -m benchmarks.scripts.ours KIND DIRECTORY PORT [uvicorn]`, with limits or on plain uvicorn."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, IStorageFactory, MemoryStorageFactory
from app.server import serve as server


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
    kind, directory, port, *plain = sys.argv[1:]
    app = FastAPI()
    app.state.crud = crud(kind, directory)
    app.state.crud.apply(app)
    if plain:
        uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)
    else:
        with server.bind("127.0.0.1", int(port)) as listener:
            server.run(app, listener, "127.0.0.1", access_log=False)
