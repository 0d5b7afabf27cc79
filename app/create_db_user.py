"""Two Lambda functions that create the app's user in a new database. Only the master user can do that.

    outside   runs outside of the database's network. Reads the master user's password from its secret, and invokes
              `inside` with it.
    inside    runs in the network. Creates the user, which has IAM authentication and no password.

The Structs below are their events. Both return {"user": ...} and are idempotent. Their errors never contain the
password.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct
from typing_extensions import override

PAUSES_S = (1, 2, 4, 8, 15)
"""Seconds between attempts if AWS denies access: IAM is eventually consistent, and the role's policy is seconds old.

Both requests together wait for these 30 s at most: one policy allows both, and the function must end within 90 s.
"""
DENIED = ("AccessDenied", "AccessDeniedException")


class Database(Struct, frozen=True, kw_only=True):
    """A database, and the user to create in it."""

    host: str
    port: int
    database: str
    user: str
    """The name of the user to create."""


class Outside(Database, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The event of `outside`."""

    secret_arn: str
    """The secret of the master user, `{"username": ..., "password": ...}`."""
    inside: str
    """The name of the function that runs `inside`."""


class Inside(Database, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The event of `inside`: the login of the master user."""

    username: str
    password: str

    @override
    def __repr__(self) -> str:
        return f"Inside({self.user!r}, by {self.username!r})"


class Master(Struct, frozen=True):
    """The content of the master user's secret."""

    username: str
    password: str

    @override
    def __repr__(self) -> str:
        return f"Master({self.username!r})"


class BootstrapFailed(Exception):
    """The app's user could not be created."""


def outside(event: Any, _: Any) -> dict[str, str]:
    """Read the master user's secret and invoke `inside`. Raises BootstrapFailed with the reason if that fails."""
    import boto3

    asked = msgspec.convert(event, Outside)
    secrets, pauses = boto3.client("secretsmanager"), iter(PAUSES_S)
    secret = _permitted(lambda: secrets.get_secret_value(SecretId=asked.secret_arn), pauses)["SecretString"]
    try:
        master = msgspec.json.decode(secret, type=Master)
    except msgspec.DecodeError:  # without its text, which may quote the secret
        raise BootstrapFailed('the master user\'s secret is not {"username": ..., "password": ...}') from None
    handed = Inside(
        host=asked.host,
        port=asked.port,
        database=asked.database,
        user=asked.user,
        username=master.username,
        password=master.password,
    )
    functions, payload = boto3.client("lambda"), msgspec.json.encode(handed)
    answer = _permitted(lambda: functions.invoke(FunctionName=asked.inside, Payload=payload), pauses)
    told = answer["Payload"].read()
    if "FunctionError" in answer:
        reason = msgspec.json.decode(told).get("errorMessage", "it gave no reason")
        raise BootstrapFailed(f"{asked.inside}: {reason}".replace(master.password, "***"))
    return msgspec.json.decode(told, type=dict[str, str])


def _permitted(ask: Callable[[], Any], pauses: Iterator[float]) -> Any:
    """Return the response of AWS. Retries after each pause while access is denied; raises other errors at once."""
    from botocore.exceptions import ClientError

    while True:
        try:
            return ask()
        except ClientError as error:
            pause_s = next(pauses, None) if error.response.get("Error", {}).get("Code") in DENIED else None
            if pause_s is None:
                raise
        time.sleep(pause_s)


def inside(event: Any, _: Any) -> dict[str, str]:
    """Create the user. Raises BootstrapFailed with the reason if that fails."""
    import psycopg

    asked = msgspec.convert(event, Inside)
    try:
        with psycopg.connect(
            host=asked.host,
            port=asked.port,
            dbname=asked.database,
            user=asked.username,
            password=asked.password,
            sslmode="prefer" if asked.host in LOOPBACK else "require",
            connect_timeout=10,
        ) as connection:
            _make(connection, asked)
    except psycopg.Error as error:
        reason = str(error).partition("\n")[0].replace(asked.password, "***")
    else:
        return {"user": asked.user}
    # Outside of `except`, because the driver's error holds the password in an attribute.
    raise BootstrapFailed(f"the user {asked.user!r} could not be created: {reason}")


LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that are reached without a network; few servers there have a certificate."""


IDLE_SESSION_S = 600
"""Seconds after which the database closes an unused connection of the app's user. Frozen functions cannot close theirs.

The app closes an unused connection after MAX_IDLE_S, which is shorter, so it never uses one that the database has
closed.
"""


def _make(connection: Any, asked: Inside) -> None:
    """Create the user with IAM authentication and the rights to create tables and to use the schema `public`.

    The settings of its sessions are stored with the user: a pooler would lose settings that a session makes, and RDS
    Proxy pins a session that makes any.
    """
    from psycopg import sql

    from .autocrud.resource_manager.backends.postgres.pool import server_settings

    names = {"user": sql.Identifier(asked.user), "database": sql.Identifier(asked.database)}
    if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (asked.user,)).fetchone() is None:
        connection.execute(sql.SQL("CREATE ROLE {user} LOGIN").format(**names))
    for statement in (
        "ALTER ROLE {user} LOGIN",
        "GRANT rds_iam TO {user}",
        "GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {database} TO {user}",
        "GRANT ALL ON SCHEMA public TO {user}",
    ):
        connection.execute(sql.SQL(statement).format(**names))
    for name, value in (server_settings() | {"idle_session_timeout": str(IDLE_SESSION_S * 1000)}).items():
        setting = sql.SQL("ALTER ROLE {user} SET {name} = {value}")
        connection.execute(setting.format(**names, name=sql.Identifier(name), value=sql.Literal(value)))
