"""Sign in with a role: the tokens equal those of AWS's own library, and the broker's secret is in a Secrets Manager."""

from __future__ import annotations

import datetime as dt
import json

import boto3
import botocore.session
import pytest
from botocore.model import ServiceId
from botocore.signers import RequestSigner

from app import iam_auth as sign_in
from app.autocrud.errors import ConfigError, StoreUnavailable
from app.settings import Broker, CacheServer, Db

DB = Db(host="db.example.com", port=5433, name="app", user="crud+app")
CACHE = CacheServer(host="cache-0.example.com", user="crud-app", name="my-cache", serverless=False)
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "s/e+c", "AWS_SESSION_TOKEN": "tok/en=="}


@pytest.fixture
def role(monkeypatch):
    """Set credentials as Lambda does, and a clock with a fixed time."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "botocore.auth.get_current_datetime",
        lambda **_: dt.datetime(2026, 1, 2, 3, 4, 5),  # noqa: DTZ001 - as botocore has it
    )
    sign_in._session.cache_clear()
    yield
    sign_in._session.cache_clear()


@pytest.mark.usefixtures("role")
def test_the_token_for_the_database_equals_that_of_boto3():
    client = boto3.session.Session(region_name="eu-west-1").client(
        "rds"
    )  # the default session remembers the keys of other tests
    expected = client.generate_db_auth_token(DB.host, DB.port, DB.user, "eu-west-1")
    assert sign_in.postgres_password(DB, "eu-west-1")() == expected


@pytest.mark.usefixtures("role")
@pytest.mark.parametrize("serverless", [False, True])
def test_the_token_for_the_cache_is_signed_as_aws_documents_it(serverless):
    """The page is https://docs.aws.amazon.com/AmazonElastiCache/latest/dg/auth-iam.html."""
    cache = CacheServer(host="h", user=CACHE.user, name=CACHE.name, serverless=serverless)
    session = botocore.session.get_session()
    signer = RequestSigner(
        ServiceId("elasticache"),
        "eu-west-1",
        "elasticache",
        "v4",
        session.get_credentials(),
        session.get_component("event_emitter"),
    )
    url = f"https://{CACHE.name}/?Action=connect&User={CACHE.user}"
    url += "&ResourceType=ServerlessCache" if serverless else ""
    asked = {"method": "GET", "url": url, "body": {}, "headers": {}, "context": {}}
    expected = signer.generate_presigned_url(asked, "connect", expires_in=900, region_name="eu-west-1")
    assert sign_in.redis_password(cache, "eu-west-1")() == expected.removeprefix("https://")


def test_addresses_have_no_password_and_always_require_tls():
    assert sign_in.postgres_dsn(DB) == "postgresql://crud%2Bapp@db.example.com:5433/app?sslmode=require"
    assert sign_in.postgres_dsn(DB, "/x/ca.pem").endswith("?sslmode=verify-full&sslrootcert=%2Fx%2Fca.pem")
    assert sign_in.redis_url(CACHE) == "rediss://crud-app@cache-0.example.com:6379/0"


def test_missing_credentials_are_named(monkeypatch):
    monkeypatch.setattr(sign_in, "_session", type("Session", (), {"get_credentials": lambda _: None}))
    with pytest.raises(StoreUnavailable, match="no AWS credentials"):
        sign_in.postgres_password(DB, "eu-west-1")()


@pytest.fixture
def secrets(ministack_s3, monkeypatch):
    """Run a Secrets Manager."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", ministack_s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "local")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "local")
    return boto3.client("secretsmanager", region_name="us-east-1")


def test_the_login_of_the_broker_is_read_for_each_connection(secrets):
    arn = secrets.create_secret(Name="broker-1", SecretString='{"username": "u", "password": "p/1"}')["ARN"]
    make = sign_in.amqp_url(Broker(endpoint="amqps://b.example.com:5671", secret_arn=arn), "us-east-1")
    assert make() == "amqps://u:p%2F1@b.example.com:5671"
    secrets.put_secret_value(SecretId=arn, SecretString='{"username": "u", "password": "p2"}')
    assert make() == "amqps://u:p2@b.example.com:5671"
    secrets.put_secret_value(SecretId=arn, SecretString=json.dumps("a-secret"))
    with pytest.raises(ConfigError, match="the broker's secret is not") as raised:
        make()
    assert "a-secret" not in str(raised.value)
    nowhere = sign_in.amqp_url(Broker(endpoint="amqps://b:5671", secret_arn=f"{arn}-x"), "us-east-1")
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        nowhere()
