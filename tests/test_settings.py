"""Settings, wiring and the command line: a wrong or missing setting gives one sentence and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import msgspec
import pytest

from app import main, wiring
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.errors import describe
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryDiskStorageFactory
from app.autocrud.testing.model import Item, manage
from app.settings import JwtAuth, NoAuth, TokenAuth, load
from tests.services import BUCKET


def factory(tmp_path, **environment):
    return wiring.storage_factory(load({"CRUDSTACK_DATA_DIR": str(tmp_path)} | environment))


BACKENDS = {
    "CRUDSTACK_BUCKET": "b",
    "CRUDSTACK_PG_DSN": "postgresql://u:secret@h/d",
    "CRUDSTACK_REDIS_URL": "redis://:secret@h/0",
    "CRUDSTACK_AMQP_URL": "amqp://u:secret@h",
}


@pytest.mark.parametrize(
    ("storage", "meta", "resource"),
    [
        ("memory", MemoryMetaStore, MemoryResourceStore),
        ("disk", DiskMetaStore, DiskResourceStore),
        ("memory-disk", MemoryMetaStore, DiskResourceStore),
        ("s3-sqlite", S3SqliteMetaStore, S3ResourceStore),
        ("postgres-s3", PostgresMetaStore, S3ResourceStore),
        ("redis-postgres", FastSlowMetaStore, S3ResourceStore),
        ("cached-s3", S3SqliteMetaStore, CachedS3ResourceStore),
        ("mq-cached-s3", S3SqliteMetaStore, MQCachedS3ResourceStore),
        ("full", FastSlowMetaStore, MQCachedS3ResourceStore),
        ('{"meta": "memory", "resource": "memory"}', MemoryMetaStore, MemoryResourceStore),
        ('{"meta": "memory", "resource": "cached-s3"}', S3SqliteMetaStore, CachedS3ResourceStore),
        ('{"meta": "disk", "resource": "s3"}', DiskMetaStore, S3ResourceStore),
        ('{"meta": "redis", "resource": "disk"}', RedisMetaStore, DiskResourceStore),
        ('{"meta": "postgres", "resource": "disk"}', PostgresMetaStore, DiskResourceStore),
        ('{"meta": "redis-postgres", "resource": "disk"}', FastSlowMetaStore, DiskResourceStore),
    ],
)
def test_each_storage_kind_and_pair_opens_its_stores(tmp_path, storage, meta, resource):
    outputs = {"version": 1, "storage": json.loads(storage) if storage.startswith("{") else storage, "bucket": "b"}
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    beside = {name: value for name, value in BACKENDS.items() if name != "CRUDSTACK_BUCKET"}
    for environment in (
        {**BACKENDS, "CRUDSTACK_STORAGE": storage},
        {**beside, "CRUDSTACK_OUTPUTS": json.dumps(outputs)},
        {**beside, "CRUDSTACK_OUTPUTS": str(tmp_path / "outputs.json")},
        {
            **BACKENDS,
            "CRUDSTACK_STORAGE": "memory",
            "CRUDSTACK_STORAGE_OVERRIDES": json.dumps({"m": outputs["storage"]}),
        },
    ):
        made = factory(tmp_path, **environment).build("m")
        assert (type(made.meta_store), type(made.resource_store)) == (meta, resource)


def test_redis_postgres_without_a_bucket_keeps_bodies_on_disk(tmp_path):
    beside = {name: value for name, value in BACKENDS.items() if name != "CRUDSTACK_BUCKET"}
    settings = load({**beside, "CRUDSTACK_STORAGE": "redis-postgres", "CRUDSTACK_DATA_DIR": str(tmp_path)})
    assert type(wiring.storage_factory(settings).build("m").resource_store) is DiskResourceStore
    assert not wiring.needs_s3(settings)


@pytest.mark.parametrize(
    ("storage", "same"),
    [("memory-disk", MemoryDiskStorageFactory), ("disk", DiskStorageFactory)],
)
async def test_a_factory_opens_the_store_of_the_kind_of_its_name(tmp_path, storage, same):
    written = manage(factory(tmp_path, CRUDSTACK_STORAGE=storage))
    await written.create(Item(text="here"), resource_id="1")
    await written.close()
    read = manage(same(tmp_path))
    assert (await read.get("1")).data == Item(text="here")
    await read.close()


def test_a_model_may_have_another_storage_kind(tmp_path):
    environment = {"CRUDSTACK_STORAGE": "disk", "CRUDSTACK_STORAGE_OVERRIDES": '{"user": "memory"}'}
    app = main.create_app(load(environment | {"CRUDSTACK_DATA_DIR": str(tmp_path)}))
    durable = {name: manager.storage.durable for name, manager in app.state.crud.managers.items()}
    assert durable == {"article": True, "airport": True, "user": False}


@pytest.mark.parametrize(
    ("package", "extra", "storage"),
    [
        ("obstore", "s3", "s3-sqlite"),
        ("redis", "redis", '{"meta": "redis", "resource": "disk"}'),
        ("psycopg", "postgres", "postgres-s3"),
        ("aio_pika", "s3,amqp", "mq-cached-s3"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, package, extra, storage):
    program = f"import sys; sys.modules[{package!r}] = None; from app.cli import main; main()"
    environment = {**BACKENDS, "CRUDSTACK_STORAGE": storage, "CRUDSTACK_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program, "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    expected = f"crudstack: the package {package} is missing: install crudstack[{extra}]\n"
    assert (done.returncode, done.stderr) == (2, expected)


WRONG = [
    ({}, "CRUDSTACK_STORAGE is not set"),
    (
        {"CRUDSTACK_STORAGE": "tape"},
        (
            "'tape': expected one of s3-sqlite, postgres-s3, redis-postgres, cached-s3, mq-cached-s3, full, disk,"
            " memory-disk, memory"
        ),
    ),
    ({"CRUDSTACK_STORAGE": "disk"}, "CRUDSTACK_DATA_DIR is not set"),
    ({"CRUDSTACK_STORAGE": "postgres-s3", "CRUDSTACK_BUCKET": "b"}, "CRUDSTACK_PG_DSN is not set"),
    (
        {"CRUDSTACK_STORAGE": "postgres-s3", "CRUDSTACK_PG_DSN": "postgresql://u:secret@h/d"},
        "CRUDSTACK_BUCKET is not set",
    ),
    ({**BACKENDS, "CRUDSTACK_STORAGE": "redis-postgres", "CRUDSTACK_REDIS_URL": ""}, "CRUDSTACK_REDIS_URL is not set"),
    ({**BACKENDS, "CRUDSTACK_STORAGE": "full", "CRUDSTACK_PG_DSN": ""}, "CRUDSTACK_PG_DSN is not set"),
    ({**BACKENDS, "CRUDSTACK_STORAGE": "mq-cached-s3", "CRUDSTACK_AMQP_URL": ""}, "CRUDSTACK_AMQP_URL is not set"),
    (
        {**BACKENDS, "CRUDSTACK_STORAGE": "redis-postgres", "CRUDSTACK_REDIS_URL": "h:secret"},
        "redis_url cannot be read",
    ),
    ({**BACKENDS, "CRUDSTACK_STORAGE": '{"meta": "postgres", "resource": "memory"}'}, "is no pair that keeps"),
    (
        {
            "CRUDSTACK_STORAGE": "postgres-s3",
            "CRUDSTACK_BUCKET": "b",
            "CRUDSTACK_PG_DSN": "postgresql://u:secret@h:x:y/d z",
        },
        "the address of PostgreSQL cannot be read",
    ),
    ({"CRUDSTACK_STORAGE": "s3-sqlite"}, "CRUDSTACK_BUCKET is not set"),
    (
        {"CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b", "CRUDSTACK_S3_ENDPOINT_URL": "localhost:9000"},
        "expected a URL",
    ),
    (
        {**BACKENDS, "CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_S3_PUBLIC_URL": "https://key:secret@s3.example.org"},
        "CRUDSTACK_S3_PUBLIC_URL holds an @",
    ),
    (
        {"CRUDSTACK_STORAGE": '{"meta": "disk", "resource": "memory"}', "CRUDSTACK_DATA_DIR": "x"},
        "is no pair that keeps",
    ),
    (
        {"CRUDSTACK_STORAGE": "memry"},
        'a pair as JSON, like {"meta": "postgres", "resource": "s3"}; did you mean memory?',
    ),
    ({"CRUDSTACK_STORAGE": '{"meta": "disk"}'}, "CRUDSTACK_STORAGE has no 'resource': expected one of cached-s3, disk"),
    (
        {"CRUDSTACK_STORAGE": '{"meta": "Postgress", "resource": "s3"}'},
        (
            "CRUDSTACK_STORAGE.meta is 'Postgress': expected one of disk, memory, postgres, redis, redis-postgres,"
            " s3-sqlite; did you mean postgres?"
        ),
    ),
    ({"CRUDSTACK_STORAGE": '{"metta": "disk", "resource": "s3"}'}, "expected meta, resource; did you mean meta?"),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_STORAGE_OVERRIDES": '{"user": "s3sqlite"}'},
        "CRUDSTACK_STORAGE_OVERRIDES.user is 's3sqlite'",
    ),
    (
        {
            "CRUDSTACK_STORAGE": "memory",
            "CRUDSTACK_STORAGE_OVERRIDES": '{"user": {"meta": "redis", "resource": "s33"}}',
        },
        (
            "CRUDSTACK_STORAGE_OVERRIDES.user.resource is 's33': expected one of cached-s3, disk, memory, mq-cached-s3,"
            " s3; did you mean s3?"
        ),
    ),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_STORAGE_OVERRIDES": "[]"},
        'Expected `object`, got `array`; expected JSON like {"session": "memory"}',
    ),
    *(
        ({**BACKENDS, "CRUDSTACK_STORAGE": "full", "CRUDSTACK_PREFIX": prefix}, "expected names of letters")
        for prefix in ("a//b", "../x", "été/", "a{b}/", "x*", "/a")
    ),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_STORAGE_OVERRIDES": "{"}, "CRUDSTACK_STORAGE_OVERRIDES is not JSON"),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_STORAGE_OVERRIDES": '{"planet": "memory"}'},
        "names the model 'planet'",
    ),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_STORAGE_OVERRIDES": '{"users": "memory"}'},
        "there are article, airport, user; did you mean user?",
    ),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_DATADIR": "x"}, "did you mean CRUDSTACK_DATA_DIR?"),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_OUTPUTS": "{}"}, "both set"),
    ({"CRUDSTACK_OUTPUTS": '{"version": 2, "storage": "memory"}'}, "CRUDSTACK_OUTPUTS.version is 2: expected 1"),
    ({"CRUDSTACK_OUTPUTS": '{"version": 1}'}, "CRUDSTACK_OUTPUTS has no 'storage'"),
    ({"CRUDSTACK_OUTPUTS": '{"version": 1, "storage": "memory", "x": 1}'}, "CRUDSTACK_OUTPUTS has 'x'"),
    ({"CRUDSTACK_OUTPUTS": "/nowhere/outputs.json"}, "cannot be read"),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": "a-secret-token"}, "CRUDSTACK_AUTH: expected none, or JSON"),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "magic"}'},
        "CRUDSTACK_AUTH.mode is 'magic': expected one of none, token, jwt",
    ),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": ["x"]}'}, "CRUDSTACK_AUTH.mode is ['x']"),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": "{}"}, "CRUDSTACK_AUTH has no 'mode': expected one of none"),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "token"}'}, "CRUDSTACK_AUTH has no 'token_sha256'"),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "token", "token_sha265": "a-secret-token"}'},
        "CRUDSTACK_AUTH has 'token_sha265', which is unknown: expected mode, token_sha256; did you mean token_sha256?",
    ),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "token", "token_sha256": "a-secret-token"}'},
        "`$.token_sha256`; expected JSON like",
    ),
    (
        {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "jwt", "issuer": "x", "audiences": []}'},
        "`$.audiences`",
    ),
    ({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": '{"mode": "none", "x": 1}'}, "has 'x', which is unknown"),
]


@pytest.mark.parametrize(("environment", "says"), WRONG)
def test_a_wrong_setting_is_named(environment, says):
    with pytest.raises(ConfigError) as raised:
        main.create_app(load(environment))
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", NoAuth()),
        ('{"mode": "none"}', NoAuth()),
        ('{"mode": "token", "token_sha256": "%s"}' % ("0f" * 32), TokenAuth(token_sha256="0f" * 32)),
        ('{"mode": "jwt", "issuer": "i", "audiences": ["a"]}', JwtAuth(issuer="i", audiences=["a"])),
    ],
)
def test_the_authentication_is_read(given, expected):
    assert load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": given}).outputs.auth == expected
    outputs = {"version": 1, "storage": "memory", "auth": msgspec.to_builtins(expected)}
    assert load({"CRUDSTACK_OUTPUTS": json.dumps(outputs)}).outputs.auth == expected
    assert load({"CRUDSTACK_STORAGE": "memory"}).outputs.auth is None


def crudstack(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["serve"], {}),
        (["serve", "--storage", "tape"], {}),
        (["serve", "--storage", "memry"], {"CRUDSTACK_STORAGE": "disk"}),
        (["serve", "--port", "70000"], {"CRUDSTACK_STORAGE": "memory"}),
        (["serve", "--prot", "1"], {"CRUDSTACK_STORAGE": "memory"}),
        (["fly"], {}),
        (["serve", "--host", "256.0.0.1"], {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": "none"}),
        (["serve", "--host", "0.0.0.0"], {"CRUDSTACK_STORAGE": "memory"}),  # noqa: S104 - it is refused
        (["serve", "--host", "::"], {"CRUDSTACK_STORAGE": "memory"}),
        (["serve", "--host", "some.host"], {"CRUDSTACK_STORAGE": "memory"}),
        (["serve"], {"CRUDSTACK_STORAGE": "disk", "CRUDSTACK_DATA_DIR": "/proc/nothing"}),
        (["serve"], {"CRUDSTACK_STORAGE": "memory-disk", "CRUDSTACK_DATA_DIR": "/proc/nothing"}),
    ],
)
def test_the_command_line_fails_with_one_sentence(arguments, environment):
    done = crudstack(*arguments, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("crudstack: ")
    assert "--storage" not in arguments or done.stderr.startswith(f"crudstack: --storage is {arguments[2]!r}: expected")


@pytest.mark.parametrize("said", ["{}?sslmode=verify-full", "postgresql://alice@nowhere.invalid/data"])
def test_an_unreachable_database_is_reported_in_one_sentence(said, postgres, tmp_path):
    """This includes an event loop that ends while a task still tries to connect."""
    done = crudstack(
        *("serve", "--port", "0"),
        CRUDSTACK_STORAGE='{"meta": "postgres", "resource": "disk"}',
        CRUDSTACK_PG_DSN=said.format(postgres),
        CRUDSTACK_DATA_DIR=str(tmp_path),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("crudstack: the database cannot be reached")
    assert done.stderr.endswith("); do its address and credentials fit?\n")
    assert done.stderr.count("\n") == 1


def test_a_password_that_redis_refuses_is_reported_in_one_sentence(valkey, tmp_path):
    done = crudstack(
        *("serve", "--port", "0"),
        CRUDSTACK_STORAGE='{"meta": "redis", "resource": "disk"}',
        CRUDSTACK_REDIS_URL=with_another_password(valkey),
        CRUDSTACK_DATA_DIR=str(tmp_path),
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "invalid username-password pair" in done.stderr
    assert done.stderr.endswith("); do its address and credentials fit?\n")


def with_another_password(url: str) -> str:
    return re.sub(r":[^/:@]+@", ":another@", url)


def log_at_start(directory, expected, *arguments: str, **environment: str) -> str:
    """Start a server, wait until it serves and has logged the expected text, and return its log."""
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0", *arguments]
    log = directory / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert any(line.startswith("docs at ") for line in server.stdout)
        deadline = time.monotonic() + 20
        while expected not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    return log.read_text()


def test_an_optional_server_that_is_unreachable_is_reported_at_start(database, valkey, tmp_path):
    url = with_another_password(valkey)
    environment = {"CRUDSTACK_PG_DSN": database, "CRUDSTACK_REDIS_URL": url, "CRUDSTACK_DATA_DIR": str(tmp_path)}
    why = "invalid username-password pair"
    logged = log_at_start(tmp_path, why, CRUDSTACK_STORAGE="redis-postgres", **environment)
    assert logged.count(why) == logged.count("\n") == 1


def test_an_unreachable_broker_is_reported_at_start(ministack_s3, tmp_path):
    environment = {
        "CRUDSTACK_STORAGE": "mq-cached-s3",
        "CRUDSTACK_BUCKET": BUCKET,
        "CRUDSTACK_PREFIX": tmp_path.name,
        "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
        "CRUDSTACK_AMQP_URL": "amqp://u:secret@127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
    }
    logged = log_at_start(tmp_path, "RabbitMQ", **environment)
    assert logged.startswith("RabbitMQ cannot be used: ")
    assert (logged.count("\n"), "secret" in logged) == (1, False)


def test_models_that_are_not_durable_are_reported_once(tmp_path):
    logged = log_at_start(tmp_path, "durable", CRUDSTACK_STORAGE="memory")
    assert logged == "not durable, gone when the process ends: article, airport, user\n"


def test_models_in_redis_are_not_said_to_end_with_the_process(valkey, tmp_path):
    given = {"CRUDSTACK_REDIS_URL": valkey, "CRUDSTACK_DATA_DIR": str(tmp_path), "CRUDSTACK_PREFIX": tmp_path.name}
    logged = log_at_start(tmp_path, "durable", CRUDSTACK_STORAGE='{"meta": "redis", "resource": "disk"}', **given)
    assert logged == "not durable, may be lost when the server of the store ends: article, airport, user\n"


def test_missing_aws_keys_are_named():
    asked = (
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 2ms - 403\n\n"
        "Debug source: ..."
    )
    assert describe(ValueError(asked)).startswith(
        "no AWS credentials found: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
    assert describe(ValueError("another\nDebug source: ...")) == "another"


def test_a_port_in_use_is_refused(serve, tmp_path):
    server = serve("memory", tmp_path)
    done = crudstack("serve", "--port", server.url.rpartition(":")[2], CRUDSTACK_STORAGE="memory")
    assert (done.returncode, "Address already in use" in done.stderr) == (2, True)


def test_a_second_owner_is_refused(serve, tmp_path):
    serve("memory-disk", tmp_path)
    done = crudstack("serve", "--port", "0", CRUDSTACK_STORAGE="memory-disk", CRUDSTACK_DATA_DIR=str(tmp_path))
    assert (done.returncode, "in use by another process" in done.stderr) == (2, True)


def test_help_names_each_option():
    text = crudstack("serve", "--help").stdout
    for option in ("--host", "--port", "--storage", "--access-log"):
        assert option in text
