"""specstar's server, run by the Python of its own environment: `python specstar_server.py KIND DIRECTORY PORT`."""

from __future__ import annotations

import sys
import warnings

import uvicorn
from fastapi import FastAPI
from msgspec import Struct
from specstar import SpecStar
from specstar.resource_manager.basic import Encoding
from specstar.resource_manager.storage_factory import DiskStorageFactory, MemoryStorageFactory


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: int = 0


def specstar(kind: str, directory: str) -> SpecStar:
    warnings.simplefilter("ignore")
    factory = MemoryStorageFactory() if kind == "memory" else DiskStorageFactory(directory)
    made = SpecStar(storage_factory=factory, encoding=Encoding.json)
    made.add_model(Article, indexed_fields=[("author", str), ("views", int)])
    return made


if __name__ == "__main__":
    app = FastAPI()
    specstar(sys.argv[1], sys.argv[2]).apply(app)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="error", access_log=False)
