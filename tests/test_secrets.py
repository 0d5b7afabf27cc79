"""Passwords and keys appear in no error, log, answer or `repr`, whatever fails.

Each secret of a setting is a canary: a text whose pieces of four characters stand nowhere else. Whatever the program says
is searched for these pieces, as they are and percent-encoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict
from redis.asyncio.connection import parse_url
from yarl import URL

from app import main
from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from app.autocrud.resource_manager.storage_factory import MQCachedS3StorageFactory, RedisPgStorageFactory
from app.autocrud.secret import Secret, amqp_url, endpoint_url, hidden, postgres_url, quoted, redis_url
from app.aws_lambda import LambdaHandler
from app.settings import load
from tests.lambda_runtime import http_event
from tests.services import BUCKET

PIECE = 4
ARTICLE = {"title": "t", "content": "c", "author": "a"}


def pieces(canary: str) -> set[str]:
    """Return the pieces of a canary, as it is and as it stands in an address."""
    forms = (canary, quote(canary, safe=""))
    return {form[at : at + PIECE] for form in forms for at in range(len(form) - PIECE + 1)}


def leaks(text: str, *canaries: str) -> list[str]:
    return sorted(piece for canary in canaries for piece in pieces(canary) if piece in text)


# Addresses

ALPHABET = "XQZ7@/:#?%[]() {}&=+\"'\\\té"
SCHEMES = [
    (postgres_url, "postgresql://XU:{}@h.example:5432/d", conninfo_to_dict),
    (redis_url, "redis://XU:{}@h.example:6379/0", lambda text: dict(parse_url(text))),
    (amqp_url, "amqp://XU:{}@h.example:5672/", lambda text: {"host": URL(text).host, "password": URL(text).password}),
]
secrets = st.text(ALPHABET, min_size=1, max_size=24)


@pytest.mark.parametrize(("parse", "form", "driver"), SCHEMES, ids=["postgres", "redis", "amqp"])
@given(password=secrets)
@example("pa@ss7XQ")
def test_an_encoded_password_arrives_and_is_not_shown(parse, form, driver, password):
    secret = parse(form.format(quote(password, safe="")))
    assert driver(secret.reveal())["password"] == password
    shown = f"{secret} {secret!r} {[secret]} {secret.shown}"
    assert not leaks(shown, password)
    assert "h.example" in shown
    if len(password) >= PIECE:
        said = f"no: {password} / {quote(password, safe='')} / {secret.reveal()}"
        assert password not in secret.hide(said)


@pytest.mark.parametrize(("parse", "form", "driver"), SCHEMES, ids=["postgres", "redis", "amqp"])
@given(password=secrets)
@example("pa@ss7XQ")
@example("XQ/7ZZ")
@example("XQ#7ZZ")
@example("XQ?7ZZ")
@example("50%XQZ")
@example("XQ ZZ7")
def test_a_password_as_it_is_is_understood_alike_or_refused(parse, form, driver, password):
    """What is accepted has one meaning: no driver takes a part of the password for the host."""
    text = form.format(password)
    refused, secret = None, Secret("")
    try:
        secret = parse(text)
    except ConfigError as error:
        refused = error
    if refused is not None:
        assert "@ as %40" in refused.detail
        assert not leaks("".join(traceback.format_exception(refused)), password)
        assert refused.__context__ is None
        return
    assert driver(secret.reveal())["host"] == "h.example"
    assert not leaks(repr(secret), password)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (postgres_url, "postgresql://u:Zq7X@v9Kw@h/d"),
        (postgres_url, "postgresql://u:Zq7X/v9Kw@h/d"),
        (postgres_url, "postgresql://u:Zq7Xv9Kw"),
        (postgres_url, "u:Zq7Xv9Kw@h/d"),
        (postgres_url, "mysql://u:Zq7Xv9Kw@h/d"),
        (redis_url, "redis://:Zq7X#v9Kw@h/0"),
        (redis_url, "redis://:Zq7Xv9Kw@h/Zq7X"),
        (redis_url, "unix://u:Zq7X@v9Kw@/socket"),
        (amqp_url, "amqp://u:Zq7X?v9Kw@h"),
        (amqp_url, "amqp://u:Zq7X%v9Kw@h"),
        (functools.partial(endpoint_url, name="AWS_ENDPOINT_URL_S3"), "http://u:Zq7Xv9Kw@h:9000"),
        (functools.partial(endpoint_url, name="AWS_ENDPOINT_URL_S3"), "https://h:9000/?key=Zq7Xv9Kw"),
        (functools.partial(S3ObjectStore, "bucket"), "http://u:Zq7X@v9Kw@h:9000"),
    ],
)
def test_an_ambiguous_address_is_refused_and_not_quoted(parse, text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    said = "".join(traceback.format_exception(caught.value))
    assert not leaks(caught.value.detail, "Zq7Xv9Kw")
    assert "expected" in caught.value.detail
    assert not leaks(said.rpartition("ConfigError: ")[2], "Zq7Xv9Kw")


def test_equal_texts_are_equal_secrets():
    assert hidden("a") == Secret("a") != Secret("b")
    assert len({Secret("a"), Secret("a", "shown"), Secret("b")}) == 2
    assert Secret("a") != "a"
    assert hidden(None) is None


def test_libpq_words_are_taken_and_not_shown():
    secret = postgres_url(r"host=h user=u password='Zq7X \'v9Kw' dbname=d")
    assert conninfo_to_dict(secret.reveal())["password"] == "Zq7X 'v9Kw"  # noqa: S105 - an example
    assert not leaks(repr(secret), "Zq7X 'v9Kw")
    assert "v9Kw" not in secret.hide("it was Zq7X 'v9Kw")


def test_all_passwords_in_libpq_words_are_hidden():
    secret = postgres_url("host=h sslpassword=Kq7Xv9Kw user=u password='Zq7Xv9Kw'")
    assert secret.hide("wrong: Kq7Xv9Kw, 'Zq7Xv9Kw', Zq7Xv9Kw") == secret.hide("wrong: Zq7Xv9Kw, Zq7Xv9Kw, Kq7Xv9Kw")
    for password in ("Kq7Xv9Kw", "Zq7Xv9Kw"):
        assert password not in secret.hide(f"wrong: {password}")


@pytest.mark.parametrize("value", ["a" * 19, "Zq7Xv9Kw", "postgresql://u:p@h", ["Zq7Xv9Kw"], {"a": 1}, 123456])
def test_values_that_may_be_secrets_are_described(value):
    assert str(value) not in quoted(value)


# Settings

TOKEN = "Zq7Xv9Kw3Jp5Rt1Yb8Nc2Md6Fg4Hs0Lx"  # noqa: S105 - a canary
MISPLACED = [
    {"CRUDSTACK_AUTH": TOKEN},
    {"CRUDSTACK_AUTH": json.dumps({"mode": TOKEN})},
    {"CRUDSTACK_AUTH": json.dumps({"mode": "token", "token_sha256": TOKEN})},
    {"CRUDSTACK_AUTH": json.dumps({"mode": "token", "token": TOKEN})},
    {"CRUDSTACK_AUTH": json.dumps({"mode": "token", TOKEN: 1})},
    {"CRUDSTACK_AUTH": json.dumps({"mode": {"token": TOKEN}})},
    {"CRUDSTACK_AUTH": f'{{"mode": "{TOKEN}'},
    {"CRUDSTACK_STORAGE": TOKEN},
    {"CRUDSTACK_STORAGE": f"postgresql://u:{TOKEN}@h/d"},
    {"CRUDSTACK_STORAGE": json.dumps({"meta": f"postgresql://u:{TOKEN}@h/d", "resource": "s3"})},
    {"CRUDSTACK_STORAGE": json.dumps({"meta": "postgres", "resource": "s3", "password": TOKEN})},
    {"CRUDSTACK_STORAGE_OVERRIDES": json.dumps({"article": TOKEN})},
    {"CRUDSTACK_STORAGE_OVERRIDES": json.dumps({TOKEN: "memory"})},
    {"CRUDSTACK_STORAGE_OVERRIDES": json.dumps({TOKEN: "memry"})},
    {"CRUDSTACK_OUTPUTS": TOKEN},
    {"CRUDSTACK_OUTPUTS": f"postgresql://u:{TOKEN}@h/d"},
    {"CRUDSTACK_OUTPUTS": json.dumps({"version": 1, "storage": TOKEN})},
    {"CRUDSTACK_OUTPUTS": json.dumps({"version": TOKEN, "storage": "memory"})},
    {"CRUDSTACK_OUTPUTS": json.dumps({"version": 1, "storage": "memory", "pg_dsn": TOKEN})},
    {"CRUDSTACK_OUTPUTS": json.dumps({"version": 1, "storage": "memory", TOKEN: 1})},
    {
        "CRUDSTACK_OUTPUTS": json.dumps(
            {"version": 1, "storage": "full", "broker": {"endpoint": f"amqps://u:{TOKEN}@h", "secret_arn": "a"}}
        )
    },
    {"CRUDSTACK_CORS": f"https://u:{TOKEN}@app.example.org"},
    {"CRUDSTACK_HOSTS": f"u:{TOKEN}@app.example.org"},
    {"CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b", "CRUDSTACK_PREFIX": f"u:{TOKEN}@h"},
    *(
        {"CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b", name: f"http://u:{TOKEN}@127.0.0.1:9000"}
        for name in ("CRUDSTACK_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    ),
]


@pytest.mark.parametrize("environment", MISPLACED, ids=lambda one: " ".join(one)[-40:])
def test_a_secret_in_the_wrong_setting_is_not_quoted(environment):
    given = environment if "CRUDSTACK_OUTPUTS" in environment else {"CRUDSTACK_STORAGE": "memory"} | environment
    with pytest.raises(ConfigError) as caught:
        main.create_app(load(given))
    assert not leaks(caught.value.detail, TOKEN)


# Programs that fail

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
def test_a_server_that_cannot_be_reached(kind, way, tmp_path):
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


def test_s3_check_and_the_bucket_that_is_made(tmp_path):
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
    """Where real servers listen. The passwords of Redis and RabbitMQ are others than the canaries, PostgreSQL takes any."""
    hosts = {name: urlsplit(url).netloc.rpartition("@")[2] for name, url in (("pg", postgres), ("redis", valkey))}
    return hosts | {"amqp": urlsplit(rabbitmq).netloc.rpartition("@")[2], "s3": ministack_s3.url}


@pytest.fixture
def logged(caplog) -> Any:
    caplog.set_level(logging.DEBUG, "crudstack")
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(
        f"{record.getMessage()} {record.args!r} {''.join(traceback.format_exception(*record.exc_info)) if record.exc_info else ''}"
        for record in caplog.records
    )


async def asked(app: Any) -> str:
    """Return what the application answers, everywhere."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    answers = []
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for method, path in [
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
        ]:
            answer = await client.request(method, path, json=ARTICLE if method in ("POST", "PUT") else None)
            answers.append(f"{answer.status_code} {answer.headers} {answer.text}")
    return "\n".join(answers)


@pytest.mark.parametrize("tls", [False, True], ids=["password", "tls"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_refuses(kind, tls, servers, tmp_path, logged, monkeypatch, capfd):
    """A wrong password for Redis and RabbitMQ; TLS where the server speaks none."""
    given = environment(tmp_path, kind, **servers, tls=tls)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, given[name])
    settings = load(given | {"CRUDSTACK_PREFIX": tmp_path.name})
    app = main.create_app(settings)
    said = [await asked(app)]
    for manager in app.state.crud.managers.values():
        for work in (manager.open, manager.storage.health, manager.storage.degradations):
            try:
                await work()
            except Exception as error:
                said += ["".join(traceback.format_exception(error)), *everything(error)]
    said += [*walk([settings, app]), logged()]
    await app.state.crud.close()
    said += [*walk([settings, app]), logged(), *capfd.readouterr()]
    found = leaks("\n".join(said), *CANARY.values())
    assert not found, next(text for text in said if any(piece in text for piece in found))[:2000]


async def test_a_server_that_lets_in(servers, valkey, tmp_path, logged, monkeypatch):
    """With the right passwords, everything that the program holds is searched too, connections included."""
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
        said = [answers, *walk([settings, app]), logged()]
    finally:
        await app.state.crud.close()
    found = leaks("\n".join(said), *CANARY.values())
    broker = quote(urlsplit(os.environ["TEST_RABBITMQ"]).password or "", safe="")
    found += [text[:500] for text in said if broker in text]
    assert not found


class Parrot:
    """A server that knows no command and repeats what it was sent, as Redis does: a password among it."""

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
    parrot = Parrot()
    async with parrot as port:
        given = environment(tmp_path, KINDS[1], pg="", redis=f"127.0.0.1:{port}", amqp="", s3="http://127.0.0.1:1")
        app = main.create_app(load(given))
        said = [await asked(app)]
        for manager in app.state.crud.managers.values():
            with pytest.raises(StoreUnavailable) as caught:
                await manager.open()
            said += ["".join(traceback.format_exception(caught.value)), *everything(caught.value)]
        said += [*walk([app]), logged()]
        await app.state.crud.close()
    assert canary.encode() in b"".join(parrot.heard)  # it was repeated
    assert "unknown command" in logged()
    assert not leaks("\n".join(said), canary)


def test_a_function_that_cannot_reach_its_stores(tmp_path, monkeypatch, logged, capfd):
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
    said += ["".join(traceback.format_exception(caught.value)), *everything(caught.value), *walk([handler]), logged()]
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
    said = "\n".join(walk(made))
    assert "bucket" in said
    assert not leaks(said, *CANARY.values())


def everything(error: BaseException) -> Iterator[str]:
    """What can be read of an error, its causes and contexts."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield f"{one!r} {one} {one.args} {vars(one)}"
            todo += [one.__cause__, one.__context__]


def walk(roots: list[Any]) -> Iterator[str]:
    """What the objects that can be reached from others show of themselves. Secrets are the end of a way."""
    seen: dict[int, Any] = {}
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.BuiltinFunctionType | types.FrameType):
            continue
        seen[id(one)] = one
        try:
            yield f"{type(one).__name__} {one!r}"
            yield str(one)
        except Exception as error:  # whatever an object of a driver raises
            yield str(error)
        todo += _inside(one)
    assert len(seen) > 20


def _inside(one: Any) -> list[Any]:
    if isinstance(one, str | bytes | int | float | None | logging.Logger | Secret):
        return []
    found: list[Any] = []
    if isinstance(one, dict):
        found += [*one, *one.values()]
    elif isinstance(one, list | tuple | set | frozenset):
        found += one
    elif isinstance(one, functools.partial):
        found += [one.func, *one.args, *one.keywords.values()]
    elif isinstance(one, types.MethodType):
        found.append(one.__self__)
    elif isinstance(one, asyncio.Future) and one.done() and not one.cancelled():
        found.append(one.exception() or one.result())
    found += getattr(one, "__dict__", {}).values()
    names = [name for kind in type(one).__mro__ for name in _slots(kind)]
    for name in (*names, *getattr(one, "__struct_fields__", ())):
        with contextlib.suppress(Exception):  # an empty slot
            found.append(getattr(one, name))
    return found


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
