"""The app signs in to real servers with only a stack's outputs and its role.

Each server requires TLS, as on AWS, and accepts one password: the token of AWS's own library for the present time of a
clock that the tests set. The tests' builds of PostgreSQL and Valkey have no TLS, so a TLS proxy is in front of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import ssl
import uuid
from pathlib import Path

import boto3
import botocore.session
import httpx
import psycopg
import pytest
import redis
from botocore.model import ServiceId
from botocore.signers import RequestSigner

from app import create_db_user as bootstrap
from app import iam_auth as sign_in
from app import settings, wiring
from app.dev.local_s3 import make_bucket
from app.main import create_app
from tests.infra.deploy import certificates, resolved
from tests.infra.recorder import REGION
from tests.infra.stacks import recording
from tests.postgres import Postgres
from tests.rabbitmq import running
from tests.valkey import Valkey

ARTICLE = {"title": "0", "content": "", "author": "alice"}
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
"""The first bytes of a client of PostgreSQL that wants TLS.

https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
"""


class Clock:
    """The time for the signatures of the app and of AWS's library."""

    now = dt.datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 - as botocore has it

    def __call__(self, **_: object) -> dt.datetime:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("botocore.auth.get_current_datetime", clock)
    return clock


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def role(monkeypatch, ministack_s3, tls):
    """Set the function's environment: a role, an emulator of AWS, and the trusted certificates."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ministack_s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ministack_s3.secret_access_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", ministack_s3.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "ca.pem"))
    sign_in._session.cache_clear()
    yield ministack_s3
    sign_in._session.cache_clear()


@contextlib.asynccontextmanager
async def tls_proxy(tls: Path, to: int, *, asks: bytes = b""):
    """Run a proxy that accepts only TLS, in front of a server without TLS, and return its port.

    asks    the bytes that clients send before the TLS handshake
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls / "server.pem", tls / "server.key")
    tasks, writers = set(), set()

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def enter(reader, writer):
        tasks.add(asyncio.current_task())
        writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # a client that does not trust it disconnects
            if asks:
                assert await reader.readexactly(len(asks)) == asks
                writer.write(b"S")
                await writer.start_tls(context)
            theirs, ours = await asyncio.open_connection("127.0.0.1", to)
            writers.add(ours)
            await asyncio.gather(pump(reader, ours), pump(theirs, writer))

    server = await asyncio.start_server(enter, "127.0.0.1", 0, ssl=None if asks else context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*tasks)
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Database:
    """A PostgreSQL as on RDS: the app's user exists, and has no password of its own."""

    def __init__(self, server: Postgres, name: str, user: str) -> None:
        self.server, self.name, self.user = server, name, user
        for statement in (
            "CREATE ROLE rds_iam",
            "CREATE ROLE master LOGIN SUPERUSER PASSWORD 'm'",
            f"CREATE DATABASE {name}",
        ):
            self.run(statement)
        made = {"host": "127.0.0.1", "port": server.port, "database": name, "user": user}
        bootstrap.inside({**made, "username": "master", "password": "m"}, None)
        # As with IAM, the password is sent in clear text inside TLS.
        rules = [f"host all {user} 127.0.0.1/32 password", "host all crud 127.0.0.1/32 trust"]
        (server.data / "pg_hba.conf").write_text("\n".join(rules) + "\n")
        self.run("SELECT pg_reload_conf()")

    def run(self, statement: str) -> None:
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    def takes(self, token: str) -> None:
        """Accept only this password for new connections, and end the open ones."""
        self.run(f"ALTER ROLE {self.user} PASSWORD '{token}'")
        self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.user}'")

    def let_in(self, token: str) -> None:
        """Connect with this password. Fails if the server refuses it."""
        psycopg.connect(self.server.dsn, user=self.user, password=token, dbname=self.name).close()


class Store:
    """A Valkey as on ElastiCache. The app does not use its default user."""

    def __init__(self, directory: Path, user: str, access: str) -> None:
        self.server, self.user, self.access = Valkey(directory), user, access
        self.server.start()

    def takes(self, token: str) -> None:
        """Accept only this password for new connections, and end the open ones."""
        with self.server.client() as client:
            client.execute_command("ACL", "SETUSER", self.user, "reset", *self.access.split(), f">{token}")
            client.execute_command("CLIENT", "KILL", "USER", self.user)

    def let_in(self, token: str) -> None:
        with redis.Redis(port=self.server.port, username=self.user, password=token) as client:
            client.ping()

    def signed_in(self) -> int:
        with self.server.client() as client:
            return sum(each["user"] == self.user for each in client.client_list())


def database_token(db) -> str:
    return (
        boto3.session.Session()
        .client("rds", region_name=REGION)
        .generate_db_auth_token(db["host"], db["port"], db["user"], REGION)
    )


def cache_token(cache) -> str:
    """Return a token as https://docs.aws.amazon.com/AmazonElastiCache/latest/dg/auth-iam.html describes it."""
    session = botocore.session.get_session()
    service = (ServiceId("elasticache"), REGION, "elasticache", "v4")
    signer = RequestSigner(*service, session.get_credentials(), session.get_component("event_emitter"))
    url = f"https://{cache['name']}/?Action=connect&User={cache['user']}&ResourceType=ServerlessCache"
    asked = {"method": "GET", "url": url, "body": {}, "headers": {}, "context": {}}
    made = signer.generate_presigned_url(asked, "connect", expires_in=900, region_name=REGION)
    return made.removeprefix("https://")


class Here(dict):
    """Maps every unknown reference of the recorded stack to localhost."""

    def __missing__(self, reference: str) -> str:
        return "localhost"


@contextlib.contextmanager
def broker(directory: Path, tls: Path):
    """Return the outputs of the broker. Its login is in Secrets Manager."""
    with running(directory, tls) as server:
        login = json.dumps({"username": "crud", "password": server.key})
        secrets = boto3.session.Session().client("secretsmanager", region_name=REGION)
        arn = secrets.create_secret(Name=f"broker-{server.port}", SecretString=login)["ARN"]
        yield {"endpoint": f"amqps://localhost:{server.tls_port}", "secret_arn": arn}


@pytest.fixture(params=["redis-postgres", pytest.param("full", marks=pytest.mark.rabbitmq)])
def stack(request):
    return recording(f"{request.param}-dev")


@pytest.fixture
def outputs(stack, role):
    bucket = f"own-{uuid.uuid4().hex[:12]}"
    make_bucket(bucket, role.url, REGION)
    data = f"aws_s3_bucket.{stack.one('aws:s3/bucket:Bucket').name}"
    return resolved(stack.outputs, Here({f"{data}.bucket": bucket, f"{data}.region": REGION}))


@pytest.fixture
def database(outputs):
    server = Postgres()
    try:
        yield Database(server, outputs["db"]["name"], outputs["db"]["user"])
    finally:
        server.remove()


@pytest.fixture
def store(stack, outputs, tmp_path_factory):
    access = stack.one("aws:elasticache/user:User").inputs["accessString"]
    store = Store(tmp_path_factory.mktemp("store"), outputs["cache"]["user"], access)
    yield store
    store.server.stop()


async def test_the_app_signs_in(stack, outputs, clock, database, store, tls, tmp_path, monkeypatch):
    monkeypatch.setattr(wiring, "RDS_CERTIFICATES", tls / "ca.pem")  # certificates that the deployer provides
    async with contextlib.AsyncExitStack() as there:
        db, cache = outputs["db"], outputs["cache"]
        db["port"] = await there.enter_async_context(tls_proxy(tls, database.server.port, asks=SSL_REQUEST))
        cache["port"] = await there.enter_async_context(tls_proxy(tls, store.server.port))
        if "broker" in outputs:
            outputs["broker"] = there.enter_context(broker(tmp_path, tls))
        client = await there.enter_async_context(app(stack, outputs))

        database.takes(database_token(db))
        store.takes(cache_token(cache))
        made = await client.post("/article", json=ARTICLE)
        assert made.status_code == 201, made.text
        assert await degradations(client) == []
        assert store.signed_in() > 0

        old = database_token(db), cache_token(cache)
        clock.now += dt.timedelta(hours=1)  # the connections have ended, and the tokens have expired
        database.takes(database_token(db))
        store.takes(cache_token(cache))
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            database.let_in(old[0])
        with pytest.raises(redis.AuthenticationError):
            store.let_in(old[1])
        path = made.headers["location"]
        changed = await client.patch(path, json={"title": "1"})
        assert changed.status_code == 200, changed.text
        assert (await client.get(f"{path}/data")).json()["title"] == "1"
        assert await degradations(client) == []
        assert store.signed_in() > 0


@contextlib.asynccontextmanager
async def app(stack, outputs):
    """Run the app with these outputs and a function's environment, and return a client of it."""
    told = {"CRUDSTACK_OUTPUTS": json.dumps(outputs), "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    app = create_app(settings.load(told), idle_work=False)
    token = stack.one("aws:secretsmanager/secretVersion:SecretVersion", "token-1").inputs["secretString"]
    signed_in = {"authorization": f"Bearer {token}"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app", headers=signed_in) as client:
        try:
            yield client
        finally:
            await app.state.crud.close()


async def degradations(client: httpx.AsyncClient) -> list[str]:
    """Return the degradations of the stores, once there are none or after 5 s."""
    for _ in range(50):
        ready = (await client.get("/readyz")).json()
        assert ready["status"] == "ready", ready
        found = [each for model in ready["models"].values() for each in model["impairments"]]
        if not found:
            return []
        await asyncio.sleep(0.1)
    return found
