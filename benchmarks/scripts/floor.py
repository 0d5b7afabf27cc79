"""The floor: the same answers, byte for byte, without an engine. `python -m benchmarks.scripts.floor DATABASE PORT`.

Starlette, msgspec and sqlite3; one table, one thread hop a request. What it leaves out is what an engine is for:
revisions, conditions, validation of queries, any other model.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import os
import sqlite3
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.scripts.ours import Article

SCHEMA = """
CREATE TABLE article (id TEXT PRIMARY KEY, meta BLOB, data BLOB, author TEXT, views INTEGER, etag TEXT) WITHOUT ROWID;
CREATE INDEX by_author ON article (author, id);
CREATE INDEX by_views ON article (views, id);
CREATE TABLE scopes (name TEXT PRIMARY KEY, scope BLOB);
"""
local = threading.local()
decode, encode = msgspec.json.Decoder(Article).decode, msgspec.json.Encoder().encode
scopes: dict[str, bytes] = {}


def connection() -> sqlite3.Connection:
    if not hasattr(local, "connection"):
        local.connection = sqlite3.connect(sys.argv[1], isolation_level=None)
        local.connection.execute("PRAGMA synchronous=FULL")
    made: sqlite3.Connection = local.connection
    return made


async def in_thread(work: Callable[[], Response]) -> Response:
    return await asyncio.get_running_loop().run_in_executor(None, work)


def page(name: str, sql: str, parameters: tuple[Any, ...], limit: int) -> Response:
    rows = connection().execute(sql, (*parameters, limit + 1)).fetchall()
    items = b",".join([b'{"meta":%b,"data":%b}' % (row[0], row[1]) for row in rows[:limit]])
    if len(rows) <= limit:
        return Response(b'{"items":[%b],"next_cursor":null}' % items, media_type="application/json")
    raw = scopes[name] + msgspec.msgpack.encode(rows[limit - 1][2:])
    cursor = base64.urlsafe_b64encode(raw).rstrip(b"=")
    return Response(b'{"items":[%b],"next_cursor":"%b"}' % (items, cursor), media_type="application/json")


async def get(request: Request) -> Response:
    def work() -> Response:
        row = (
            connection()
            .execute("SELECT meta, data, etag FROM article WHERE id = ?", (request.path_params["id"],))
            .fetchone()
        )
        if row is None:
            return Response(status_code=404)
        body = b'{"meta":%b,"data":%b}' % (row[0], row[1])
        return Response(body, media_type="application/json", headers={"etag": row[2]})

    return await in_thread(work)


async def find(request: Request) -> Response:
    query = request.query_params
    limit = int(query["limit"])
    if "author" in query:
        sql = "SELECT meta, data, id FROM article WHERE author = ? ORDER BY id LIMIT ?"
        return await in_thread(lambda: page("filter", sql, (query["author"],), limit))
    if "views[gte]" in query:
        sql = "SELECT meta, data, views, id FROM article WHERE views >= ? ORDER BY views DESC, id LIMIT ?"
        return await in_thread(lambda: page("range", sql, (int(query["views[gte]"]),), limit))
    sql = "SELECT meta, data, id FROM article ORDER BY id LIMIT ?"
    return await in_thread(lambda: page("list", sql, (), limit))


async def count(_: Request) -> Response:
    def work() -> Response:
        (found,) = connection().execute("SELECT count(*) FROM article").fetchone()
        return Response(b'{"count":%d}' % found, media_type="application/json")

    return await in_thread(work)


def meta_of(rid: str, version: int, data: bytes) -> dict[str, object]:
    now = dt.datetime.now(dt.UTC)
    return {
        "resource_id": rid,
        "version": version,
        "nonce": os.urandom(8).hex(),
        "revision": version,
        "total_revision_count": version,
        "schema_version": 1,
        "status": "stable",
        "is_deleted": False,
        "uid": f"0/{uuid.uuid4()}",
        "data_hash": hashlib.sha256(data).hexdigest(),
        "encoding": "json",
        "created_time": now,
        "updated_time": now,
        "created_by": "anonymous",
        "updated_by": "anonymous",
    }


def write(rid: str, version: int, body: bytes) -> Response:
    article = decode(body)
    data = encode(article)
    meta = meta_of(rid, version, data)
    etag = f'"{version}-{meta["nonce"]}"'
    shown = encode(meta)
    connection().execute(
        "INSERT OR REPLACE INTO article VALUES (?, ?, ?, ?, ?, ?)",
        (rid, shown, data, article.author, article.views, etag),
    )
    answer = b'{"meta":%b,"data":%b}' % (shown, data)
    return Response(answer, 201 if version == 1 else 200, {"etag": etag}, "application/json")


async def create(request: Request) -> Response:
    body = await request.body()
    return await in_thread(lambda: write(str(uuid.uuid4()), 1, body))


async def update(request: Request) -> Response:
    body = await request.body()

    def work() -> Response:
        rid = request.path_params["id"]
        (meta,) = connection().execute("SELECT meta FROM article WHERE id = ?", (rid,)).fetchone()
        return write(rid, msgspec.json.decode(meta)["version"] + 1, body)

    return await in_thread(work)


routes = [
    Route("/article", find, methods=["GET"]),
    Route("/article", create, methods=["POST"]),
    Route("/article/count", count),
    Route("/article/{id}", get, methods=["GET"]),
    Route("/article/{id}", update, methods=["PUT"]),
]

if __name__ == "__main__":
    scopes.update(connection().execute("SELECT name, scope FROM scopes").fetchall())
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
