"""Passwords in addresses and settings are not shown or quoted, and ambiguous addresses are refused."""

from __future__ import annotations

import functools
import json
import traceback
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict
from redis.asyncio.connection import parse_url
from yarl import URL

from app import main
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from app.autocrud.secret import Secret, amqp_url, endpoint_url, hidden, postgres_url, quoted, redis_url
from app.settings import load
from tests.secret_leaks import PIECE, TOKEN, leaks

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
def test_an_encoded_password_reaches_the_driver_and_is_not_shown(parse, form, driver, password):
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
def test_an_unencoded_password_has_one_meaning_or_is_refused(parse, form, driver, password):
    """If the address is accepted, no driver reads a part of the password as the host."""
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


def test_a_libpq_connection_string_is_accepted_and_not_shown():
    secret = postgres_url(r"host=h user=u password='Zq7X \'v9Kw' dbname=d")
    assert conninfo_to_dict(secret.reveal())["password"] == "Zq7X 'v9Kw"  # noqa: S105 - an example
    assert not leaks(repr(secret), "Zq7X 'v9Kw")
    assert "v9Kw" not in secret.hide("it was Zq7X 'v9Kw")


def test_all_passwords_in_a_libpq_connection_string_are_hidden():
    secret = postgres_url("host=h sslpassword=Kq7Xv9Kw user=u password='Zq7Xv9Kw'")
    assert secret.hide("wrong: Kq7Xv9Kw, 'Zq7Xv9Kw', Zq7Xv9Kw") == secret.hide("wrong: Zq7Xv9Kw, Zq7Xv9Kw, Kq7Xv9Kw")
    for password in ("Kq7Xv9Kw", "Zq7Xv9Kw"):
        assert password not in secret.hide(f"wrong: {password}")


@pytest.mark.parametrize("value", ["a" * 19, "Zq7Xv9Kw", "postgresql://u:p@h", ["Zq7Xv9Kw"], {"a": 1}, 123456])
def test_values_that_may_be_secrets_are_not_quoted(value):
    assert str(value) not in quoted(value)


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
