"""The app's user in a new database: created on a real PostgreSQL, with a stand-in for AWS."""

from __future__ import annotations

import io
import json
import sys
import types
import uuid
from urllib.parse import urlsplit

import psycopg
import pytest
from botocore.exceptions import ClientError

from app import create_db_user as bootstrap
from app.autocrud.resource_manager.backends.postgres import pool

MASTER = "master-secret"


@pytest.fixture
def database(postgres):
    """Create a database as RDS does: its master user is not a superuser, and the role for IAM authentication exists."""
    name = f"boot_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DO $$ BEGIN CREATE ROLE rds_iam; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        connection.execute(
            f"CREATE ROLE {name}_master LOGIN CREATEROLE CREATEDB PASSWORD '{MASTER}';"
            f" GRANT rds_iam TO {name}_master WITH ADMIN OPTION".encode()
        )
        connection.execute(f"CREATE DATABASE {name} OWNER {name}_master".encode())
    return name


def event(postgres: str, name: str, **changed) -> dict[str, object]:
    server = urlsplit(postgres)
    return {
        "host": server.hostname,
        "port": server.port,
        "database": name,
        "user": f"{name}_app",
        "username": f"{name}_master",
        "password": MASTER,
        **changed,
    }


def test_the_user_is_created_once_and_has_the_rights_of_the_app(postgres, database):
    for _ in range(2):
        assert bootstrap.inside(event(postgres, database), None) == {"user": f"{database}_app"}
    server = urlsplit(postgres)
    with psycopg.connect(host=server.hostname, port=server.port, dbname=database, user=f"{database}_app") as connection:
        connection.execute('CREATE TABLE "meta_article" (id text PRIMARY KEY)')
        connection.execute("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        assert connection.execute("SELECT pg_has_role('rds_iam', 'member')").fetchone() == (True,)
        rights = connection.execute("SELECT rolsuper, rolcanlogin FROM pg_roles WHERE rolname = current_user")
        assert rights.fetchone() == (False, True)


def test_sessions_of_the_user_have_the_settings_of_the_app(postgres, database):
    """The settings are stored with the user, so the app sends no SET. RDS Proxy would pin a session that sends SET."""
    for _ in range(2):
        bootstrap.inside(event(postgres, database), None)
    server = urlsplit(postgres)
    dsn = f"postgresql://{database}_app@{server.hostname}:{server.port}/{database}"
    with psycopg.connect(dsn) as connection:
        found = connection.execute("SELECT name, setting FROM pg_settings WHERE source = 'user'").fetchall()
    assert dict(found) == {**pool.server_settings(), "idle_session_timeout": "600000"}
    assert pool.MAX_IDLE_S < bootstrap.IDLE_SESSION_S


def test_a_user_with_a_difficult_name(postgres, database):
    name = f'{database} "; DROP ROLE x; --'
    assert bootstrap.inside(event(postgres, database, user=name), None) == {"user": name}


@pytest.mark.parametrize("wrong", [{"port": 1}, {"database": "nowhere"}, {"username": "missing"}])
def test_an_error_names_the_reason_without_a_password(postgres, database, wrong):
    with pytest.raises(bootstrap.BootstrapFailed, match="could not be created") as raised:
        bootstrap.inside(event(postgres, database, **wrong), None)
    assert MASTER not in str(raised.value)


class Aws:
    """The two clients of boto3 that `outside` uses. They answer as AWS documents it."""

    def __init__(self, inside, secret: str) -> None:
        self.inside, self.secret, self.asked = inside, secret, []
        self.denied: list[str | None] = []
        """Error codes for the next requests. None: the request succeeds."""

    def _refuse(self, operation: str) -> None:
        if self.denied and (code := self.denied.pop(0)) is not None:
            raise ClientError({"Error": {"Code": code, "Message": "not authorized"}}, operation)

    def client(self, name: str):
        return {"secretsmanager": self, "lambda": self}[name]

    def get_secret_value(self, **given):
        self.asked.append(given)
        self._refuse("GetSecretValue")
        return {"SecretString": self.secret}

    def invoke(self, **given):
        self.asked.append({"FunctionName": given["FunctionName"]})
        self._refuse("Invoke")
        try:
            answer, failed = self.inside(json.loads(given["Payload"]), None), {}
        except Exception as error:
            answer = {"errorMessage": f"{error} {MASTER}", "errorType": type(error).__name__}
            failed = {"FunctionError": "Unhandled"}
        return {"StatusCode": 200, "Payload": io.BytesIO(json.dumps(answer).encode()), **failed}


@pytest.fixture
def aws(monkeypatch, database):
    def use(inside=bootstrap.inside, secret=None):
        given = secret or json.dumps({"username": f"{database}_master", "password": MASTER})
        made = Aws(inside, given)
        monkeypatch.setitem(sys.modules, "boto3", types.SimpleNamespace(client=made.client))
        return made

    return use


def outside(postgres: str, name: str) -> dict[str, object]:
    given = event(postgres, name)
    del given["username"], given["password"]
    return {**given, "secret_arn": "arn:aws:secretsmanager:x", "inside": "boot-inside"}


def test_outside_hands_the_secret_to_inside(postgres, database, aws):
    used = aws()
    assert bootstrap.outside(outside(postgres, database), None) == {"user": f"{database}_app"}
    assert used.asked == [{"SecretId": "arn:aws:secretsmanager:x"}, {"FunctionName": "boot-inside"}]


@pytest.fixture
def waited(monkeypatch):
    """Record the pauses of `outside`, in seconds, in place of waiting."""
    pauses: list[float] = []
    monkeypatch.setattr(bootstrap.time, "sleep", pauses.append)
    return pauses


def test_outside_waits_until_its_role_is_effective(postgres, database, aws, waited):
    """IAM is eventually consistent. For some seconds, each service may deny what a new policy allows."""
    used = aws()
    used.denied = ["AccessDeniedException", "AccessDenied", None, "AccessDeniedException", None]
    assert bootstrap.outside(outside(postgres, database), None) == {"user": f"{database}_app"}
    secret, invoked = {"SecretId": "arn:aws:secretsmanager:x"}, {"FunctionName": "boot-inside"}
    assert used.asked == [secret, secret, secret, invoked, invoked]
    assert waited == [1, 2, 4]


@pytest.mark.parametrize("allowed", [[], [None]], ids=["the secret", "the invocation"])
def test_outside_gives_up_within_its_time(postgres, database, aws, waited, allowed):
    """Both requests together may wait 30 s. The function has 90 s, and `inside` takes up to 60 s of them."""
    used = aws()
    used.denied = [*allowed, *["AccessDeniedException"] * 100]
    with pytest.raises(ClientError, match="AccessDenied"):
        bootstrap.outside(outside(postgres, database), None)
    assert sum(waited) == 30
    assert sorted(waited) == waited


def test_outside_fails_at_once_if_it_is_another_error(postgres, database, aws, waited):
    used = aws()
    for denied in (["ResourceNotFoundException"], [None, "TooManyRequestsException"]):
        used.denied = denied
        with pytest.raises(ClientError, match=denied[-1]):
            bootstrap.outside(outside(postgres, database), None)
    assert waited == []


def test_outside_fails_without_the_password(postgres, database, aws):
    def broken(*_):
        raise RuntimeError("no route to the database")

    aws(inside=broken)
    with pytest.raises(bootstrap.BootstrapFailed, match="boot-inside: no route to the database") as raised:
        bootstrap.outside(outside(postgres, database), None)
    assert MASTER not in str(raised.value)
    aws(secret=f'"{MASTER}"')
    with pytest.raises(bootstrap.BootstrapFailed) as raised:
        bootstrap.outside(outside(postgres, database), None)
    assert MASTER not in str(raised.value)
    assert raised.value.__cause__ is None
