"""The BlobStores of the project against the suite for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import BlobStore
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore, MemoryBlobStore
from app.autocrud.testing.blob_stores import BlobStoreConformance
from tests.services import given


class TestMemory(BlobStoreConformance):
    durable = False

    def make(self, root: Path) -> BlobStore:
        return MemoryBlobStore()


class TestDisk(BlobStoreConformance):
    def make(self, root: Path) -> BlobStore:
        return DiskBlobStore(root)


_doubles: dict[Path, MemoryObjectStore] = {}


class TestS3OnTheDouble(BlobStoreConformance):
    def make(self, root: Path) -> BlobStore:
        objects = _doubles.setdefault(root.parent, MemoryObjectStore())
        return S3BlobStore("double", f"{root.name}/", object_store=objects)


@pytest.mark.s3_slice
@pytest.mark.usefixtures("s3_server")
class TestS3(BlobStoreConformance):
    def make(self, root: Path) -> BlobStore:
        return S3BlobStore(
            os.environ["TEST_S3_BUCKET"], f"{root.parent.name}/{root.name}/", *given("TEST_S3"), "us-east-1"
        )
