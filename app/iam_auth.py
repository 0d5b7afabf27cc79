"""IAM authentication to the stack's database, cache and broker with the role of the app. No password is stored.

PostgreSQL and Valkey accept a signed token that is valid for 15 minutes. Each new connection gets a new token, which is
signed locally. An open connection to PostgreSQL outlives its token. ElastiCache ends a connection with IAM
authentication after 12 hours, and the client reconnects. RabbitMQ has a password in Secrets Manager, which is read for
each connection.

botocore is part of the Lambda runtime. It is imported only if it is needed. Tokens are signed without `boto3.client`,
which takes ten times as long.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct
from typing_extensions import override

from .autocrud.errors import ConfigError, StoreUnavailable
from .settings import Broker, CacheServer, Db, StackOutputs, TokenAuth

EXPIRES_S = 900
"""Seconds that a token is valid, which is the maximum of AWS."""


def postgres_dsn(db: Db, ca_file: str | None = None) -> str:
    """Return the address of the database without a password, with TLS.

    ca_file  the CA certificates to verify the server with; without it, the connection is encrypted but not verified
    """
    tls = {"sslmode": "verify-full", "sslrootcert": ca_file} if ca_file else {"sslmode": "require"}
    return f"postgresql://{quote(db.user, safe='')}@{db.host}:{db.port}/{quote(db.name, safe='')}?{urlencode(tls)}"


def postgres_password(db: Db, region: str) -> Callable[[], str]:
    """Return a function that signs the token for a new connection, like `aws rds generate-db-auth-token`."""
    url = f"https://{db.host}:{db.port}/?{urlencode({'Action': 'connect', 'DBUser': db.user})}"
    return lambda: _signed("rds-db", region, url)


def redis_url(cache: CacheServer) -> str:
    """Return the address of the cache without a password."""
    return f"{'rediss' if cache.tls else 'redis'}://{quote(cache.user, safe='')}@{cache.host}:{cache.port}/0"


def redis_password(cache: CacheServer, region: str) -> Callable[[], str]:
    """Return a function that signs the token for a new connection to ElastiCache."""
    query = {"Action": "connect", "User": cache.user}
    if cache.serverless:
        query["ResourceType"] = "ServerlessCache"
    url = f"https://{cache.name}/?{urlencode(query)}"
    return lambda: _signed("elasticache", region, url)


def _signed(service: str, region: str, url: str) -> str:
    """Return a presigned request without its scheme. Raises StoreUnavailable if there are no AWS credentials."""
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
    """Return the stack's API token from Secrets Manager, read with the ambient credentials.

    Raises ConfigError if the stack has no API token, or if the token does not match the SHA-256 in the stack's outputs.
    Raises StoreUnavailable if the token cannot be read.
    """
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
        # A new session, because two threads must not create the default one at the same time.
        secrets = boto3.session.Session(region_name=region).client("secretsmanager")
        return str(secrets.get_secret_value(SecretId=name)["SecretString"])
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise StoreUnavailable(f"{what} cannot be read from Secrets Manager") from error


class _Login(Struct, frozen=True):
    username: str
    password: str

    @override
    def __repr__(self) -> str:
        return f"_Login({self.username!r})"


def amqp_url(broker: Broker, region: str) -> Callable[[], str]:
    """Return a function that reads the login and returns the URL with it, for a new connection.

    It raises StoreUnavailable if the secret cannot be read, and ConfigError if the secret has another form.
    """
    scheme, _, host = broker.endpoint.partition("://")

    def made() -> str:
        try:
            login = msgspec.json.decode(_secret(broker.secret_arn, region, "the broker's login"), type=_Login)
        except msgspec.DecodeError:  # without its text, which may quote the secret
            raise ConfigError('the broker\'s secret is not {"username": ..., "password": ...}') from None
        return f"{scheme}://{quote(login.username, safe='')}:{quote(login.password, safe='')}@{host}"

    return made
