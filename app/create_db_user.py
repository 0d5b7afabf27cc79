"""Two functions that make the app's user in a new database, which nobody but the database's master user could do.

    outside   not in the database's network. Reads the master user's password from its secret, and hands it to the other one.
    inside    in the network. Makes the user, who signs in with tokens of IAM and has no password.

What each is given stands below. Both answer {"user": ...}; doing it again changes nothing. No error of theirs holds the password.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

PAUSES_S = (1, 2, 4, 8, 15)
"""Seconds between attempts if AWS denies access: IAM is eventually consistent, and the role's policy is seconds old.

Both requests together wait for these 30 s at most, since one policy allows both, and the function must end in 90 s.
"""
DENIED = ("AccessDenied", "AccessDeniedException")


class Database(Struct, frozen=True, kw_only=True):
    host: str
    port: int
    database: str
    user: str
    """To be made."""


class Outside(Database, frozen=True, kw_only=True, forbid_unknown_fields=True):
    secret_arn: str
    """Of `{"username": ..., "password": ...}`, the master user's."""
    inside: str
    """The name of the other function."""


class Inside(Database, frozen=True, kw_only=True, forbid_unknown_fields=True):
    username: str
    password: str
    """The master user's."""

    def __repr__(self) -> str:
        return f"Inside({self.user!r}, by {self.username!r})"


class Master(Struct, frozen=True):
    username: str
    password: str

    def __repr__(self) -> str:
        return f"Master({self.username!r})"


class BootstrapFailed(Exception):
    """The app's user could not be made."""


def outside(event: Any, _: Any) -> dict[str, str]:
    """See above. `event`: Outside."""
    import boto3

    asked = msgspec.convert(event, Outside)
    secrets, pauses = boto3.client("secretsmanager"), iter(PAUSES_S)
    secret = _permitted(lambda: secrets.get_secret_value(SecretId=asked.secret_arn), pauses)["SecretString"]
    try:
        master = msgspec.json.decode(secret, type=Master)
    except msgspec.DecodeError:  # without its words, which may quote the secret
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
        reason = msgspec.json.decode(told).get("errorMessage", "it does not say why")
        raise BootstrapFailed(f"{asked.inside}: {reason}".replace(master.password, "***"))
    return msgspec.json.decode(told, type=dict[str, str])


def _permitted(ask: Callable[[], Any], pauses: Iterator[float]) -> Any:
    """Return the answer of AWS, asking again after each pause while access is denied. Other errors are raised at once."""
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
    """See above. `event`: Inside."""
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
    # Outside of `except`: the driver's error holds the password in an attribute.
    raise BootstrapFailed(f"the user {asked.user!r} could not be made: {reason}")


LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Where nobody is in between, and few servers have a certificate."""


IDLE_SESSION_S = 600
"""After how long the database closes an unused connection of the app's user. Frozen functions keep theirs otherwise.

The app closes its own after MAX_IDLE_S, which is shorter, so it never uses one that the database has closed.
"""


def _make(connection: Any, asked: Inside) -> None:
    """Make the user with what it needs: to sign in by IAM, to make tables, and to have schema `public` to itself.

    The settings of its sessions are attributes of the user, because a session's own would be lost in a pooler; RDS Proxy
    pins a session that has any.
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
