"""Every stack is created, updated without changes, refreshed and destroyed under Pulumi's engine."""

from __future__ import annotations

import hashlib
import json

import pytest

from app.settings import TokenAuth, parse_outputs
from infra.choices import Broker, Cache, Domain, Postgres
from infra.config import StackConfig
from tests.engine.engine import Engine, EngineStack
from tests.infra.stacks import CONFIGS, JWT
from tests.infra.test_stack import SNAPSHOTS

SECRET_VERSION = "aws:secretsmanager/secretVersion:SecretVersion"  # noqa: S105
BROKER = "aws:mq/broker:Broker"


def assert_unchanged(done) -> None:
    assert done.error == ""
    assert [step for step in done.steps if step.op not in ("same", "refresh", "read")] == []
    assert done.changes in ({}, {"refresh": done.changes.get("refresh")})


CHOICES = {
    "aurora": StackConfig(storage="full", postgres=Postgres(mode="aurora", multi_az=True)),
    "proxy": StackConfig(storage="postgres-s3", postgres=Postgres(proxy=True)),
    "aurora-proxy": StackConfig(storage="postgres-s3", postgres=Postgres(mode="aurora", proxy=True)),
    "cluster": StackConfig(storage="mq-cached-s3", broker=Broker(mode="cluster")),
    "nodes": StackConfig(storage="redis-postgres", cache=Cache(mode="nodes")),
    "jwt": StackConfig(auth=JWT, cors=["https://www.example.org"]),
    "domain": StackConfig(domain=Domain("api.example.org", "Z0123456789")),
}
"""Single choices, in addition to the recorded stacks. These stacks are not of stage prod, so they are destroyed."""


@pytest.mark.parametrize("name", [*CONFIGS, *CHOICES])
def test_a_stack_is_created_refreshed_and_destroyed(engine, name):
    config = CONFIGS.get(name) or CHOICES[name]
    stack = engine.stack("test", config)
    planned = stack.preview()
    assert planned.error == ""
    assert engine.account.all() == {}

    made = stack.up()
    assert made.error == ""
    assert made.changes == planned.changes
    assert made.changes.keys() == {"create"}
    if name in CONFIGS:
        registered = len((SNAPSHOTS / f"{name}.txt").read_text().splitlines()) + 1  # the stack itself
        assert made.changes["create"] == registered
    assert made.diagnostics == []

    # Refresh and update, in both orders: a refresh must read the same values that the program registers.
    assert_unchanged(stack.refresh())
    assert_unchanged(stack.up())
    assert_unchanged(stack.up(refresh=True))
    assert engine.provider.requests["Read", "aws:s3/bucket:Bucket"] == 2

    assert_outputs_fit(engine, stack, config)
    assert_state_tells_no_secret(engine, stack)
    if config.is_protected:
        assert_prod_refuses_to_go(engine, stack)
    else:
        gone = stack.destroy()
        assert gone.error == ""
        assert engine.account.all() == {}
        assert stack.exported()["deployment"].get("resources", []) == []


def assert_outputs_fit(engine: Engine, stack: EngineStack, config: StackConfig) -> None:
    """Assert that the app can decode the outputs, and that they name existing resources."""
    outputs = parse_outputs(json.dumps(stack.outputs()), "the outputs")
    assert (outputs.storage, outputs.storage_overrides) == (config.storage, config.storage_overrides)
    assert engine.account.get("aws:s3/bucket:Bucket", outputs.bucket)
    assert engine.account.get("aws:lambda/function:Function", outputs.function_name)
    told = engine.account.get("aws:lambda/function:Function", outputs.function_name)["environment"]["variables"]
    inside = parse_outputs(told["CRUDSTACK_OUTPUTS"], "the environment")
    assert (inside.auth, inside.db, inside.cache, inside.broker) == (
        outputs.auth,
        outputs.db,
        outputs.cache,
        outputs.broker,
    )
    assert_secrets_fit(engine, stack)


def assert_secrets_fit(engine: Engine, stack: EngineStack) -> None:
    """Assert that the outputs have the SHA-256 of the current token, and that the broker has its secret's password."""
    outputs = parse_outputs(json.dumps(stack.outputs()), "the outputs")
    if isinstance(outputs.auth, TokenAuth):
        (secret_id,) = [id for id in engine.account.all("aws:secretsmanager/secret:Secret") if "/api-token" in id]
        token = engine.account.current_secret(secret_id)
        assert hashlib.sha256(token.encode()).hexdigest() == outputs.auth.token_sha256
    if outputs.broker is not None:
        login = json.loads(engine.account.current_secret(outputs.broker.secret_arn))
        brokers = engine.account.all(BROKER)
        assert len(brokers) == 1
        for broker in brokers.values():
            assert broker["instances"][0]["endpoints"][0] == outputs.broker.endpoint
            assert broker["_untold"]["users"] == [login]


def secrets_of(engine: Engine) -> set[str]:
    """Return every secret of the account: the token, and the broker's password."""
    found = set()
    for version in engine.account.all(SECRET_VERSION).values():
        text = version["secretString"]
        found.add(json.loads(text)["password"] if text.startswith("{") else text)
    return found


def assert_state_tells_no_secret(engine: Engine, stack: EngineStack) -> None:
    """Assert that the state and all other files of Pulumi contain no secret in plain text."""
    secrets = secrets_of(engine)
    assert all(len(secret) >= 40 for secret in secrets)
    files = [
        path
        for part in ("state", "home", "pulumi-home", f"work-{stack.name}")
        for path in (engine.directory / part).rglob("*")
        if path.is_file()
    ]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, path
    exported = json.dumps(stack.exported())
    assert all(secret not in exported for secret in secrets)


def assert_prod_refuses_to_go(engine: Engine, stack: EngineStack) -> None:
    """Assert that destroy is refused, and that the next up changes nothing. test_protection.py checks more."""
    before = stack.outputs()
    refused = stack.destroy()
    assert "protected" in refused.error + "".join(refused.diagnostics)
    again = stack.up()
    assert again.error == ""
    after = stack.outputs()
    assert {name: after[name] for name in ("auth", "bucket", "api_url")} == {
        name: before[name] for name in ("auth", "bucket", "api_url")
    }
    assert after.get("db", {}) == before.get("db", {}) or "proxy" in before["db"]["host"]
    assert_secrets_fit(engine, stack)
