"""Real servers for the benchmarks: those of the tests, on loopback, in temporary directories, on the last core."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psycopg

from app.dev.local_s3 import LOCAL_KEYS, ministack
from tests.postgres import Postgres
from tests.valkey import Valkey

from .load import on_last_core

BUCKET = "bench"
MEMORY = Path("/dev/shm")  # noqa: S108 - the system's own place for what need not be kept


class Servers(NamedTuple):
    """The addresses of the servers; `amqp` is None if there is no RabbitMQ."""

    postgres: str
    redis: str
    s3: str
    amqp: str | None
    settings: str

    def database(self, name: str) -> str:
        """Create a database. specstar needs one per model, because its indexes have the same names in all tables."""
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return f"{self.postgres.rpartition('/')[0]}/{name}"

    def environment(self, database: str, directory: Path) -> dict[str, str]:
        """Return variables of the app and of our scripts. Keys in Redis and S3 begin with the database's name."""
        found = {
            "CRUDSTACK_PG_DSN": self.database(database),
            "CRUDSTACK_REDIS_URL": self.redis,
            "CRUDSTACK_S3_ENDPOINT_URL": self.s3,
            "CRUDSTACK_BUCKET": BUCKET,
            "CRUDSTACK_PREFIX": f"{database}/",
            "CRUDSTACK_DATA_DIR": str(directory),
            "TMPDIR": str(directory),  # specstar leaves its copies of databases there
        }
        return LOCAL_KEYS | found | ({} if self.amqp is None else {"CRUDSTACK_AMQP_URL": self.amqp})


@contextlib.contextmanager
def running() -> Iterator[Servers]:
    cores = os.sched_getaffinity(0)
    # What a bucket holds lies in memory: it is a hundred thousand files, and no S3 is as slow as a disk that is asked
    # to remove them.
    in_memory = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
    with in_memory as bucket, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        root = Path(directory)
        on_last_core()  # what is started stays there
        try:
            postgres = Postgres(
                "-c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.track_planning=on"
            )
            stack.callback(postgres.remove)
            (root / "valkey").mkdir()
            valkey = Valkey(root / "valkey")
            stack.callback(valkey.stop)
            valkey.start()
            s3 = stack.enter_context(ministack(Path(bucket)))
            amqp = _rabbitmq(stack, root / "rabbitmq")
        finally:
            os.sched_setaffinity(0, cores)
        httpx.put(f"{s3}/{BUCKET}").raise_for_status()
        with psycopg.connect(postgres.dsn, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
            said = {name: _shown(connection, name) for name in ("server_version", "fsync", "synchronous_commit")}
        settings = ", ".join(f"{name} {value}" for name, value in said.items())
        yield Servers(postgres.dsn, valkey.url, s3, amqp, settings)


def _shown(connection: psycopg.Connection, name: str) -> str:
    (value,) = connection.execute(f"SHOW {name}".encode()).fetchone() or ("unknown",)
    return str(value).partition(" ")[0]


def _rabbitmq(stack: contextlib.ExitStack, directory: Path) -> str | None:
    try:
        import app.autocrud.resource_manager.resource_store.mq_cached_s3  # noqa: F401 - is the driver installed?
        from tests.rabbitmq import Missing, RabbitMQ
    except ImportError:
        return None
    try:
        server = RabbitMQ(directory)
    except Missing:
        return None
    directory.mkdir()
    stack.callback(server.stop)
    server.start()
    url: str = server.url
    return url
