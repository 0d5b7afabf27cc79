"""The numbered examples of the document that need servers, as written, on real ones.

Only the import root, addresses and credentials differ, and models that the page leaves out are added.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager import storage_factory as ours
from app.autocrud.resource_manager.basic import Encoding, IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests.services import given
from tests.test_seed import use


class Article(Struct):
    title: str
    content: str
    author: str


class User(Struct):
    email: str
    department: str


class Document(Struct):
    text: str


class Product(Struct):
    name: str


ARTICLE = Article("Sun", "It shines.", "alice")


# 範例 2：PostgreSQL Meta + S3 Resource


class PostgresS3StorageFactory(IStorageFactory):
    """PostgreSQL metadata + S3 資料儲存"""

    def __init__(
        self,
        pg_dsn: str,
        s3_bucket: str,
        s3_endpoint: str | None = None,
        s3_access_key: str = "minioadmin",
        s3_secret_key: str = "minioadmin",  # noqa: S107 - the document's
    ):
        self.pg_dsn = pg_dsn
        self.s3_bucket = s3_bucket
        self.s3_endpoint = s3_endpoint
        self.s3_access_key = s3_access_key
        self.s3_secret_key = s3_secret_key

    def build(self, model_name: str) -> IStorage:
        # PostgreSQL MetaStore：強大的查詢能力
        meta_store = PostgresMetaStore(
            pg_dsn=self.pg_dsn,
            encoding=Encoding.msgpack,  # MessagePack 效能更好
            table_name=f"meta_{model_name}",
        )

        # S3 ResourceStore：低成本、高可靠性
        resource_store = S3ResourceStore(
            bucket=self.s3_bucket,
            prefix=f"{model_name}/",
            endpoint_url=self.s3_endpoint,
            access_key_id=self.s3_access_key,
            secret_access_key=self.s3_secret_key,
            encoding=Encoding.msgpack,
        )

        return SimpleStorage(meta_store, resource_store)


# 範例 3：S3 + SQLite Meta + S3 Resource


class S3StorageFactory(IStorageFactory):
    """完全使用 S3 儲存的方案（SQLite DB 檔案也在 S3）"""

    def __init__(
        self,
        bucket: str,
        endpoint_url: str | None = None,
        access_key_id: str = "minioadmin",
        secret_access_key: str = "minioadmin",  # noqa: S107 - the document's
        region_name: str = "us-east-1",
    ):
        self.bucket = bucket
        self.endpoint_url = endpoint_url
        self.access_key_id = access_key_id
        self.secret_access_key = secret_access_key
        self.region_name = region_name

    def build(self, model_name: str) -> IStorage:
        # S3SqliteMetaStore：SQLite 資料庫存放在 S3
        meta_store = S3SqliteMetaStore(
            bucket=self.bucket,
            key=f"meta/{model_name}.sqlite",
            endpoint_url=self.endpoint_url,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            region_name=self.region_name,
            encoding=Encoding.msgpack,
            auto_sync=True,  # 自動同步到 S3
            sync_interval=5.0,  # 每 5 秒同步一次
            enable_locking=True,  # 啟用 ETag 鎖定防止衝突
        )

        # S3 ResourceStore：資料存放在 S3
        resource_store = S3ResourceStore(
            bucket=self.bucket,
            prefix=f"data/{model_name}/",
            endpoint_url=self.endpoint_url,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            region_name=self.region_name,
            encoding=Encoding.msgpack,
        )

        return SimpleStorage(meta_store, resource_store)


# 範例 4：Redis Meta + PostgreSQL Meta（雙層快取）


class RedisPgStorageFactory(IStorageFactory):
    """Redis（快）+ PostgreSQL（慢）雙層 MetaStore"""

    def __init__(
        self,
        redis_url: str,
        pg_dsn: str,
        data_dir: Path,
    ):
        self.redis_url = redis_url
        self.pg_dsn = pg_dsn
        self.data_dir = Path(data_dir)

    def build(self, model_name: str) -> IStorage:
        # 快速層：Redis（記憶體快取）
        fast_store = RedisMetaStore(
            redis_url=self.redis_url,
            prefix=f"{model_name}:",
            encoding=Encoding.msgpack,
        )

        # 慢速層：PostgreSQL（持久化）
        slow_store = PostgresMetaStore(
            pg_dsn=self.pg_dsn,
            encoding=Encoding.msgpack,
            table_name=f"meta_{model_name}",
        )

        # 組合成雙層 MetaStore
        meta_store = FastSlowMetaStore(
            fast_store=fast_store,
            slow_store=slow_store,
        )

        # ResourceStore 使用磁碟
        resource_store = DiskResourceStore(rootdir=self.data_dir / model_name)

        return SimpleStorage(meta_store, resource_store)


# 範例 5：Cached S3 Resource（S3 + 多層快取）


class CachedS3StorageFactory(IStorageFactory):
    """帶多層快取的 S3 儲存"""

    def __init__(
        self,
        s3_bucket: str,
        s3_endpoint: str,
        cache_dir: Path,
        s3_access_key: str = "minioadmin",
        s3_secret_key: str = "minioadmin",  # noqa: S107 - the document's
    ):
        self.s3_bucket = s3_bucket
        self.s3_endpoint = s3_endpoint
        self.cache_dir = Path(cache_dir)
        self.s3_access_key = s3_access_key
        self.s3_secret_key = s3_secret_key

    def build(self, model_name: str) -> IStorage:
        # MetaStore 使用記憶體（快速）
        meta_store = MemoryMetaStore()

        # 建立快取層
        mem_cache = MemoryCache(max_size=100)  # 最多快取 100 個資源
        disk_cache = DiskCache(cache_dir=str(self.cache_dir / model_name))

        # CachedS3ResourceStore：S3 + 多層快取
        resource_store = CachedS3ResourceStore(
            caches=[mem_cache, disk_cache],  # 快取鏈：記憶體 → 磁碟 → S3
            ttl_draft=3600,  # Draft 資料快取 1 小時
            ttl_stable=86400,  # Stable 資料快取 24 小時
            bucket=self.s3_bucket,
            prefix=f"{model_name}/",
            endpoint_url=self.s3_endpoint,
            access_key_id=self.s3_access_key,
            secret_access_key=self.s3_secret_key,
            encoding=Encoding.msgpack,
        )

        return SimpleStorage(meta_store, resource_store)


# 範例 6：進階 Cached S3（訊息佇列同步）


class MQCachedS3StorageFactory(IStorageFactory):
    """支援多實例快取同步的 S3 儲存"""

    def __init__(
        self,
        s3_config: dict,
        cache_dir: Path,
        amqp_url: str = "amqp://guest:guest@localhost:5672",
    ):
        self.s3_config = s3_config
        self.cache_dir = Path(cache_dir)
        self.amqp_url = amqp_url

    def build(self, model_name: str) -> IStorage:
        meta_store = MemoryMetaStore()

        # MQ-based Cached S3 ResourceStore
        resource_store = MQCachedS3ResourceStore(
            caches=[MemoryCache(max_size=100), DiskCache(cache_dir=str(self.cache_dir / model_name))],
            amqp_url=self.amqp_url,
            queue_prefix=f"autocrud_{model_name}_",
            ttl_draft=1800,
            ttl_stable=3600,
            **self.s3_config,
        )

        return SimpleStorage(meta_store, resource_store)


# How each is used


def serve_three_times(make) -> None:
    """Serve the example three times. Each time, the data of the earlier times is there."""
    for times in range(3):
        ((model, _),) = make()[1].items()
        asyncio.run(use(make, {f"{make.__name__} {model.__name__}": times}))


def test_example_2(database, bucket):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")

    def make():
        storage_factory = PostgresS3StorageFactory(
            pg_dsn=database,
            s3_bucket=bucket,
            s3_endpoint=endpoint,
            s3_access_key=access_key,
            s3_secret_key=secret_key,
        )
        crud = AutoCRUD(storage_factory=storage_factory)
        crud.add_model(Article, indexed_fields=[("author", str)])
        return crud, {Article: ARTICLE}

    serve_three_times(make)


def test_example_3(bucket):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")

    def make():
        storage_factory = S3StorageFactory(
            bucket=bucket,
            endpoint_url=endpoint,
            access_key_id=access_key,
            secret_access_key=secret_key,
        )
        crud = AutoCRUD(storage_factory=storage_factory)
        crud.add_model(Article)
        return crud, {Article: ARTICLE}

    serve_three_times(make)


def test_example_4(valkey, database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    redis.Redis.from_url(valkey).flushdb()

    def make():
        storage_factory = RedisPgStorageFactory(
            redis_url=valkey,
            pg_dsn=database,
            data_dir=Path("./data"),
        )
        crud = AutoCRUD(storage_factory=storage_factory)
        crud.add_model(User, indexed_fields=[("email", str), ("department", str)])
        return crud, {User: User("alice@example.org", "sales")}

    serve_three_times(make)


def test_example_5(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endpoint, access_key, secret_key = given("TEST_MINISTACK")

    def make():
        storage_factory = CachedS3StorageFactory(
            s3_bucket=bucket,
            s3_endpoint=endpoint,
            cache_dir=Path("./cache"),
            s3_access_key=access_key,
            s3_secret_key=secret_key,
        )
        crud = AutoCRUD(storage_factory=storage_factory)
        crud.add_model(Document)
        return crud, {Document: Document("x")}

    serve_three_times(make)
    assert (tmp_path / "cache" / "document").is_dir()


@pytest.mark.rabbitmq
def test_example_6(bucket, rabbitmq, tmp_path):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")

    def make():
        storage_factory = MQCachedS3StorageFactory(
            s3_config={
                "bucket": bucket,
                "endpoint_url": endpoint,
                "access_key_id": access_key,
                "secret_access_key": secret_key,
            },
            cache_dir=tmp_path / "cache",
            amqp_url=rabbitmq,
        )
        crud = AutoCRUD(storage_factory=storage_factory)
        crud.add_model(Product)
        return crud, {Product: Product("x")}

    serve_three_times(make)


# The factories of these names that are there already


def serve_ours(factory: IStorageFactory) -> None:
    def make():
        crud = AutoCRUD(storage_factory=factory)
        crud.add_model(Document)
        return crud, {Document: Document("x")}

    serve_three_times(make)


def test_ours_of_example_2(database, bucket):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")
    serve_ours(ours.PostgresS3StorageFactory(database, bucket, endpoint, access_key, secret_key))


def test_ours_of_example_3(bucket):
    serve_ours(ours.S3StorageFactory(bucket, *given("TEST_MINISTACK")))


@pytest.mark.parametrize("bodies", ["disk", "s3"])
def test_ours_of_example_4(bodies, valkey, database, bucket, tmp_path):
    redis.Redis.from_url(valkey).flushdb()
    endpoint, access_key, secret_key = given("TEST_MINISTACK")
    s3 = {"s3_bucket": bucket, "s3_endpoint": endpoint, "s3_access_key": access_key, "s3_secret_key": secret_key}
    where = {"data_dir": tmp_path} if bodies == "disk" else s3
    serve_ours(ours.RedisPgStorageFactory(valkey, database, **where))


def test_redis_and_postgres_keep_bodies_in_one_place():
    for where in ({}, {"data_dir": "x", "s3_bucket": "y"}):
        with pytest.raises(ConfigError, match="expected either data_dir or s3_bucket"):
            ours.RedisPgStorageFactory("redis://h/0", "postgresql://h/d", **where)


def test_ours_of_example_5(bucket, tmp_path):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")
    serve_ours(ours.CachedS3StorageFactory(bucket, endpoint, tmp_path, access_key, secret_key))


@pytest.mark.rabbitmq
def test_ours_of_example_6(bucket, rabbitmq, tmp_path):
    endpoint, access_key, secret_key = given("TEST_MINISTACK")
    s3_config = {
        "bucket": bucket,
        "endpoint_url": endpoint,
        "access_key_id": access_key,
        "secret_access_key": secret_key,
    }
    serve_ours(ours.MQCachedS3StorageFactory(s3_config, tmp_path, rabbitmq))
