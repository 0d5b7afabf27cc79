"""The matrix: every storage and composition against the one suite. Nothing in it is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.autocrud import Encoding
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    S3StorageFactory,
)
from app.autocrud.testing import DurableConformance, OwnedConformance, SharedConformance, StorageConformance
from tests.services import BUCKET, given


class TestMemory(StorageConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MemoryStorageFactory()


class TestMemoryAsMessagePack(StorageConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MemoryStorageFactory(Encoding.msgpack)


class TestDisk(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return DiskStorageFactory(root)


class MessagePackOnDisk(IStorageFactory):
    """A factory of one's own, in a dozen lines."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(
            DiskMetaStore(self.root / "meta" / model_name, encoding=Encoding.msgpack),
            DiskResourceStore(self.root / "bodies" / model_name, encoding=Encoding.msgpack),
            DiskBlobStore(self.root / "files" / model_name),
        )


class TestCustomFactory(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MessagePackOnDisk(root)


class TestMemoryDisk(OwnedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MemoryDiskStorageFactory(root)


class LooksAtOnce(S3ResourceStore):
    """Each read checks the index beside the bodies, as the suite expects of a storage that instances share."""

    refresh_s = 0.0


class MemoryWithS3(IStorageFactory):
    """A MemoryMetaStore over S3, as in the cached examples of the seed."""

    def __init__(self, root: Path) -> None:
        self.prefix = f"{root.name}/"

    def build(self, model_name: str) -> IStorage:
        endpoint, access_key, secret_key = given("TEST_S3")
        return SimpleStorage(
            MemoryMetaStore(),
            LooksAtOnce(
                os.environ["TEST_S3_BUCKET"],
                f"{self.prefix}{model_name}/",
                endpoint,
                access_key,
                secret_key,
                "us-east-1",
            ),
            S3BlobStore(
                os.environ["TEST_S3_BUCKET"],
                f"{self.prefix}{model_name}/blobs/",
                endpoint,
                access_key,
                secret_key,
                "us-east-1",
            ),
        )


@pytest.mark.usefixtures("s3_server")
class TestMemoryWithS3(SharedConformance):
    """The requests for bodies and blobs are those of S3Sqlite, so only that one is in the slice."""

    def make(self, root: Path) -> IStorageFactory:
        return MemoryWithS3(root)


_doubles: dict[Path, MemoryObjectStore] = {}


class TestS3SqliteOnTheDouble(DurableConformance):
    def make(self, root: Path) -> IStorageFactory:
        return S3StorageFactory("double", object_store=_doubles.setdefault(root, MemoryObjectStore()))


@pytest.mark.s3_slice
@pytest.mark.usefixtures("s3_server")
class TestS3Sqlite(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return S3StorageFactory(os.environ["TEST_S3_BUCKET"], *given("TEST_S3"), prefix=f"{root.name}/")


@pytest.mark.usefixtures("ministack_s3")
class TestS3SqliteWithOneCopyForAll(SharedConformance):
    """Processes share a directory, thus the local copy. This does not depend on the server: it is not in the slice."""

    def make(self, root: Path) -> IStorageFactory:
        return S3StorageFactory(BUCKET, *given("TEST_MINISTACK"), prefix=f"{root.name}/", local_dir=root)
