"""No error, log line, response or `repr` of a running program contains a secret, whatever fails.

Each secret of a setting is a canary: a text whose pieces of four characters occur nowhere else. Everything that the
program prints is searched for these pieces, plain and percent-encoded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import traceback
import types
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
import redis

from app import main
from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.storage_factory import MQCachedS3StorageFactory, RedisPgStorageFactory
from app.aws_lambda import LambdaHandler
from app.settings import load
from tests.lambda_runtime import http_event
from tests.secret_leaks import TOKEN, leaks, texts_of_error, texts_of_objects
from tests.services import BUCKET

ARTICLE = {"title": "t", "content": "c", "author": "a"}

CANARY = {
    "CRUDSTACK_PG_DSN": "Wq3@Ze7/Ux",
    "CRUDSTACK_REDIS_URL": "Jk8#Hy2?Vb",
    "CRUDSTACK_AMQP_URL": "Gd5%Tn9@Cm",
    "AWS_SECRET_ACCESS_KEY": "Pz6Lw1Kf4Yr0Bj8Ds3Xg7",
    "AWS_SESSION_TOKEN": "Oi2Nu5Mh9Ea6Qt1",
    "HTTPS_PROXY": "Vy4Sx8Ro3",
}
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("crudstack").setLevel(logging.DEBUG)
from app.cli import main
main()
"""
ADDRESSES = {
    "refused": {"pg": "127.0.0.1:1", "redis": "127.0.0.1:1", "amqp": "127.0.0.1:1", "s3": "http://127.0.0.1:1"},
    "unknown": dict.fromkeys(("pg", "redis", "amqp"), "nowhere.invalid") | {"s3": "https://nowhere.invalid"},
}


def environment(directory: Path, storage: str, pg: str, redis: str, amqp: str, s3: str, tls: bool = False) -> dict:
    def login(name: str) -> str:
        return quote(CANARY[name], safe="")

    return {
        "CRUDSTACK_STORAGE": storage,
        "CRUDSTACK_DATA_DIR": str(directory),
        "CRUDSTACK_BUCKET": BUCKET,
        "CRUDSTACK_PG_DSN": f"postgresql://crud:{login('CRUDSTACK_PG_DSN')}@{pg}/postgres{'?sslmode=require' * tls}",
        "CRUDSTACK_REDIS_URL": f"{'rediss' if tls else 'redis'}://:{login('CRUDSTACK_REDIS_URL')}@{redis}/0",
        "CRUDSTACK_AMQP_URL": f"{'amqps' if tls else 'amqp'}://crud:{login('CRUDSTACK_AMQP_URL')}@{amqp}/",
        "CRUDSTACK_S3_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": CANARY["AWS_SECRET_ACCESS_KEY"],
        "AWS_SESSION_TOKEN": CANARY["AWS_SESSION_TOKEN"],
        "PATH": os.environ["PATH"],
    }


def crudstack(given: dict, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=120)


KINDS = [
    '{"meta": "postgres", "resource": "disk"}',
    '{"meta": "redis", "resource": "disk"}',
    "redis-postgres",
    "s3-sqlite",
    "mq-cached-s3",
    "full",
]


@pytest.mark.parametrize("way", ADDRESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unreachable_server(kind, way, tmp_path):
    done = crudstack(environment(tmp_path, kind, **ADDRESSES[way]), "serve", "--port", "0")
    assert done.returncode == 2, done.stderr
    assert not leaks(done.stdout + done.stderr, *CANARY.values()), done.stderr


def test_a_proxy_with_a_password(tmp_path):
    given = environment(tmp_path, "s3-sqlite", **ADDRESSES["unknown"])
    given |= dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), f"http://u:{CANARY['HTTPS_PROXY']}@127.0.0.1:1")
    for command in (
        ["serve", "--port", "0"],
        ["serve", "--port", "0", "--make-bucket"],
        ["s3-check", f"s3://{BUCKET}"],
    ):
        done = crudstack(given, *command)
        assert done.returncode in (1, 2), done.stderr
        assert not leaks(done.stdout + done.stderr, *CANARY.values()), done.stderr


def test_s3_check_and_make_bucket(tmp_path):
    given = environment(tmp_path, "s3-sqlite", **ADDRESSES["refused"])
    for command in (["serve", "--port", "0", "--make-bucket"], ["s3-check", f"s3://{BUCKET}"]):
        done = crudstack(given, *command)
        assert done.returncode in (1, 2), done.stderr
        assert not leaks(done.stdout + done.stderr, *CANARY.values()), done.stderr
    given |= {"CRUDSTACK_S3_ENDPOINT_URL": f"http://u:{TOKEN}@127.0.0.1:1"}
    for command in (["serve", "--port", "0"], ["s3-check", f"s3://{BUCKET}"]):
        done = crudstack(given, *command)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert not leaks(done.stderr, TOKEN)


# Applications that run


@pytest.fixture
def servers(postgres, valkey, rabbitmq, ministack_s3) -> dict[str, str]:
    """Return the addresses of real servers. Their passwords differ from the canaries; PostgreSQL accepts any."""
    hosts = {name: urlsplit(url).netloc.rpartition("@")[2] for name, url in (("pg", postgres), ("redis", valkey))}
    return hosts | {"amqp": urlsplit(rabbitmq).netloc.rpartition("@")[2], "s3": ministack_s3.url}


def traceback_of(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""


@pytest.fixture
def logged(caplog) -> Any:
    caplog.set_level(logging.DEBUG, "crudstack")
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(
        f"{record.getMessage()} {record.args!r} {traceback_of(record)}" for record in caplog.records
    )


async def asked(app: Any, *, at_once: bool = False) -> str:
    """Return all responses of the application to requests to each route, one after the other or all at once."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    turns = asyncio.Semaphore(100 if at_once else 1)

    async def answer(method: str, path: str) -> str:
        async with turns:
            body = ARTICLE if method in ("POST", "PUT") else None
            answer = await client.request(method, path, json=body)
            return f"{answer.status_code} {answer.headers} {answer.text}"

    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        requests = [
            ("GET", "/readyz"),
            ("POST", "/article"),
            ("PUT", "/article/x"),
            ("GET", "/article/x"),
            ("GET", "/article"),
            ("GET", "/article/count"),
            ("GET", "/article/x/revisions"),
            ("DELETE", "/article/x"),
            ("POST", "/article/x/purge"),
            ("GET", "/readyz"),
        ]
        return "\n".join(await asyncio.gather(*(answer(*request) for request in requests)))


@pytest.mark.parametrize("tls", [False, True], ids=["password", "tls"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_refuses_the_connection(kind, tls, servers, tmp_path, logged, monkeypatch, capfd):
    """Redis and RabbitMQ get a wrong password, or TLS, which the servers do not support."""
    given = environment(tmp_path, kind, **servers, tls=tls)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, given[name])
    settings = load(given | {"CRUDSTACK_PREFIX": tmp_path.name})
    app = main.create_app(settings)
    said = [await asked(app, at_once=True)]  # most wait until they give up
    managers = app.state.crud.managers.values()
    works = [work for one in managers for work in (one.open, one.storage.health, one.storage.degradations)]
    for error in await asyncio.gather(*(work() for work in works), return_exceptions=True):
        if isinstance(error, BaseException):
            said += ["".join(traceback.format_exception(error)), *texts_of_error(error)]
    said += [*texts_of_objects([settings, app]), logged()]
    await app.state.crud.close()
    said += [*texts_of_objects([settings, app]), logged(), *capfd.readouterr()]
    found = leaks("\n".join(said), *CANARY.values())
    assert not found, next(text for text in said if any(piece in text for piece in found))[:2000]


async def test_a_server_that_accepts_the_connection(servers, valkey, tmp_path, logged, monkeypatch):
    """With the right passwords, all objects of the program are searched too, including connections."""
    with redis.Redis.from_url(valkey) as client:
        client.acl_setuser(
            "canary", enabled=True, passwords=[f"+{CANARY['CRUDSTACK_REDIS_URL']}"], keys="*", categories=["+@all"]
        )
    given = environment(tmp_path, "full", **servers)
    given["CRUDSTACK_REDIS_URL"] = given["CRUDSTACK_REDIS_URL"].replace("//:", "//canary:")
    given["CRUDSTACK_AMQP_URL"] = os.environ["TEST_RABBITMQ"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, given[name])
    settings = load(given | {"CRUDSTACK_PREFIX": tmp_path.name})
    app = main.create_app(settings)
    try:
        answers = await asked(app)
        assert "\n200 " in answers, answers
        said = [answers, *texts_of_objects([settings, app]), logged()]
    finally:
        await app.state.crud.close()
    found = leaks("\n".join(said), *CANARY.values())
    broker = quote(urlsplit(os.environ["TEST_RABBITMQ"]).password or "", safe="")
    found += [text[:500] for text in said if broker in text]
    assert not found


class EchoServer:
    """A server that knows no command, and repeats the words of each command in its error, like Redis."""

    async def __aenter__(self) -> int:
        self.heard: list[bytes] = []
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.heard.append(data)
            words = [word.decode() for word in data.split(b"\r\n") if word and word[:1] not in b"*$"]
            said = " ".join(f"'{word}'" for word in words[1:])
            writer.write(f"-ERR unknown command '{words[0]}', with args beginning with: {said}\r\n".encode())
        writer.close()


async def test_a_redis_that_repeats_the_password(tmp_path, logged):
    canary = CANARY["CRUDSTACK_REDIS_URL"]
    server = EchoServer()
    async with server as port:
        given = environment(tmp_path, KINDS[1], pg="", redis=f"127.0.0.1:{port}", amqp="", s3="http://127.0.0.1:1")
        app = main.create_app(load(given))
        said = [await asked(app)]
        for manager in app.state.crud.managers.values():
            with pytest.raises(StoreUnavailable) as caught:
                await manager.open()
            said += ["".join(traceback.format_exception(caught.value)), *texts_of_error(caught.value)]
        said += [*texts_of_objects([app]), logged()]
        await app.state.crud.close()
    assert canary.encode() in b"".join(server.heard)  # the server repeated the password
    assert "unknown command" in logged()
    assert not leaks("\n".join(said), canary)


def test_a_lambda_function_with_unreachable_stores(tmp_path, monkeypatch, logged, capfd):
    given = environment(tmp_path, "full", **ADDRESSES["refused"]) | {"CRUDSTACK_AUTH": "none"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, given[name])
    handler = LambdaHandler(load(given))
    context = types.SimpleNamespace(aws_request_id="1", get_remaining_time_in_millis=lambda: 20_000)
    said = []
    for method, path in (("GET", "/readyz"), ("POST", "/article"), ("GET", "/article/x")):
        answer = handler(http_event(method, path, json_body=ARTICLE if method == "POST" else None), context)
        assert answer["statusCode"] == 503
        said.append(str(answer))
    with pytest.raises(StoreUnavailable) as caught:
        handler({"crudstack": "maintain"}, context)
    said += [
        "".join(traceback.format_exception(caught.value)),
        *texts_of_error(caught.value),
        *texts_of_objects([handler]),
        logged(),
    ]
    said += capfd.readouterr()
    assert not leaks("\n".join(said), *CANARY.values())
    handler._loop.run_until_complete(handler._crud.close())
    handler._loop.close()
    asyncio.set_event_loop(None)


def test_factories_show_no_secret():
    key = CANARY["AWS_SECRET_ACCESS_KEY"]
    login = quote(CANARY["CRUDSTACK_PG_DSN"], safe="")
    addresses = f"redis://:{login}@h/0", f"postgresql://u:{login}@h/d"
    made = [
        RedisPgStorageFactory(*addresses, s3_bucket="b", s3_access_key="k", s3_secret_key=key),
        MQCachedS3StorageFactory(
            {"bucket": "b", "access_key_id": "k", "secret_access_key": key}, "cache", f"amqp://u:{login}@h"
        ),
    ]
    made += [factory.build("article") for factory in made]
    said = "\n".join(texts_of_objects(made))
    assert "bucket" in said
    assert not leaks(said, *CANARY.values())
