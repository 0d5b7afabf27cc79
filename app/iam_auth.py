"""Signing in to the stack's database, cache and broker with the role that the app runs under. No password is kept.

PostgreSQL and Valkey take a token that is signed here, without a request, and is good for 15 minutes. A new one is made
for each connection. An open connection to PostgreSQL outlives its token. ElastiCache ends a connection that signed in by
IAM after 12 hours, and the client reconnects. RabbitMQ has a password in Secrets Manager, which is read for each
connection.

botocore is on Lambda already. It is imported by the kinds that need it, and its signers alone: `boto3.client` costs ten
times as much.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from .autocrud.errors import ConfigError, StoreUnavailable
from .settings import Broker, Cache, Db, StackOutputs, TokenAuth

EXPIRES_S = 900
"""As long as AWS lets a token live."""


def postgres_dsn(db: Db, ca_file: str | None = None) -> str:
    """Without a password. Always with TLS; `ca_file`: what the server's certificate is checked with, if there is one."""
    tls = {"sslmode": "verify-full", "sslrootcert": ca_file} if ca_file else {"sslmode": "require"}
    return f"postgresql://{quote(db.user, safe='')}@{db.host}:{db.port}/{quote(db.name, safe='')}?{urlencode(tls)}"


def postgres_password(db: Db, region: str) -> Callable[[], str]:
    """What makes the token for a new connection, as `aws rds generate-db-auth-token` does."""
    url = f"https://{db.host}:{db.port}/?{urlencode({'Action': 'connect', 'DBUser': db.user})}"
    return lambda: _signed("rds-db", region, url)


def redis_url(cache: Cache) -> str:
    """Without a password."""
    return f"{'rediss' if cache.tls else 'redis'}://{quote(cache.user, safe='')}@{cache.host}:{cache.port}/0"


def redis_password(cache: Cache, region: str) -> Callable[[], str]:
    """What makes the token for a new connection, as ElastiCache and Valkey take it."""
    query = {"Action": "connect", "User": cache.user}
    if cache.serverless:
        query["ResourceType"] = "ServerlessCache"
    url = f"https://{cache.name}/?{urlencode(query)}"
    return lambda: _signed("elasticache", region, url)


def _signed(service: str, region: str, url: str) -> str:
    """A presigned request, without its scheme. StoreUnavailable without credentials."""
    from botocore.auth import SigV4QueryAuth
    from botocore.awsrequest import AWSRequest

    credentials = _session().get_credentials()
    if credentials is None:
        raise StoreUnavailable("there are no AWS credentials to sign in with")
    request = AWSRequest("GET", url)
    SigV4QueryAuth(credentials.get_frozen_credentials(), service, region, expires=EXPIRES_S).add_auth(request)
    return str(request.url).removeprefix("https://")


@functools.cache
def _session() -> Any:
    import botocore.session

    return botocore.session.get_session()


def api_token(outputs: StackOutputs) -> str:
    """The stack's API token, read with the credentials of whoever asks. ConfigError, StoreUnavailable."""
    if not isinstance(outputs.auth, TokenAuth) or outputs.bucket is None:
        raise ConfigError("this stack has no API token: its auth is another")
    token = _secret(f"{outputs.bucket}/api-token", outputs.region or "us-east-1", "the API token")
    if hashlib.sha256(token.encode()).hexdigest() != outputs.auth.token_sha256:
        raise ConfigError("the token in Secrets Manager is not the one that the stack's outputs name: run `pulumi up`")
    return token


def _secret(name: str, region: str, what: str) -> str:
    import boto3.session
    import botocore.exceptions

    try:
        # A session of its own: the default one may not be made by two threads at once.
        secrets = boto3.session.Session(region_name=region).client("secretsmanager")
        return str(secrets.get_secret_value(SecretId=name)["SecretString"])
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise StoreUnavailable(f"{what} cannot be read from Secrets Manager") from error


class _Login(Struct, frozen=True):
    username: str
    password: str

    def __repr__(self) -> str:
        return f"_Login({self.username!r})"


def amqp_url(broker: Broker, region: str) -> Callable[[], str]:
    """What makes the URL with the login in it, for a new connection. StoreUnavailable if the secret cannot be read."""
    scheme, _, host = broker.endpoint.partition("://")

    def made() -> str:
        try:
            login = msgspec.json.decode(_secret(broker.secret_arn, region, "the broker's login"), type=_Login)
        except msgspec.DecodeError:  # without its words, which may quote the secret
            raise ConfigError('the broker\'s secret is not {"username": ..., "password": ...}') from None
        return f"{scheme}://{quote(login.username, safe='')}:{quote(login.password, safe='')}@{host}"

    return made
