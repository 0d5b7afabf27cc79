"""Stacks of stage prod: mistakes do not delete resources with data, or resources that those need."""

from __future__ import annotations

import msgspec
import pytest

from infra.choices import Broker, Cache, Domain, Postgres
from infra.config import StackConfig
from tests.engine.engine import Engine, EngineStack
from tests.engine.test_life import assert_secrets_fit, assert_unchanged
from tests.infra.stacks import JWT

BUCKET, INSTANCE, CLUSTER = "aws:s3/bucket:Bucket", "aws:rds/instance:Instance", "aws:rds/cluster:Cluster"
VPC, API, URL = "aws:ec2/vpc:Vpc", "aws:apigatewayv2/api:Api", "aws:lambda/functionUrl:FunctionUrl"
SECRET = "aws:secretsmanager/secret:Secret"  # noqa: S105

PROD = {
    "s3-sqlite": StackConfig(stage="prod"),
    "function-url": StackConfig(stage="prod", edge="function-url"),
    "postgres-s3": StackConfig(stage="prod", storage="postgres-s3"),
    "full": StackConfig(stage="prod", storage="full", cors=["https://example.org"]),
    "aurora": StackConfig(stage="prod", storage="full", postgres=Postgres(mode="aurora", multi_az=True)),
}


def changed(config: StackConfig, **values: object) -> StackConfig:
    return msgspec.structs.replace(config, **values)


def up(engine: Engine, config: StackConfig) -> EngineStack:
    stack = engine.stack("prod", config)
    assert stack.up().error == ""
    return stack


def promises(engine: Engine, stack: EngineStack) -> dict[str, object]:
    """Return all that must stay the same: resources with data, their locations, the URL, and the token."""
    outputs = stack.outputs()
    kept = {name: outputs.get(name) for name in ("bucket", "api_url", "auth", "db")}
    data = {type_: sorted(engine.account.all(type_)) for type_ in (BUCKET, INSTANCE, CLUSTER, VPC, API, URL)}
    return {**kept, **data, "token": engine.account.current_secret(f"{token_secret(engine)}")}


def token_secret(engine: Engine) -> str:
    (found,) = [id for id in engine.account.all(SECRET) if "crudstack-prod-" in id and "/api-token" in id]
    return found


@pytest.mark.parametrize("name", PROD)
@pytest.mark.parametrize("preview", [True, False], ids=["preview", "skip-preview"])
def test_destroy_is_refused_and_the_next_up_serves_the_same(engine, name, preview):
    stack = up(engine, PROD[name])
    before, number = promises(engine, stack), len(engine.account.all())
    if preview:
        refused = stack.command("destroy", "--yes", check=False)
        assert "error: preview failed" in refused or "protected" in refused
        assert len(engine.account.all()) == number
    else:
        refused = stack.destroy()
        assert "because it is protected" in "".join(refused.diagnostics)
    assert stack.up().error == ""
    after = promises(engine, stack)
    assert after == before
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up())


@pytest.mark.parametrize("checks", [True, False], ids=["program", "engine alone"])
@pytest.mark.parametrize(
    ("name", "change", "key", "urn"),
    [
        ("s3-sqlite", {"edge": "function-url"}, "edge", "Api::crudstack-prod-api"),
        ("function-url", {"edge": "http-api"}, "edge", "FunctionUrl::crudstack-prod-url"),
        ("s3-sqlite", {"auth": "none"}, "auth", "Secret::crudstack-prod-token"),
        ("s3-sqlite", {"auth": JWT}, "auth", "Secret::crudstack-prod-token"),
        ("postgres-s3", {"storage": "s3-sqlite"}, "storage", "Instance::crudstack-prod-database"),
        ("full", {"storage": "cached-s3"}, "storage", "Instance::crudstack-prod-database"),
        ("full", {"postgres": Postgres(mode="aurora")}, "postgres.mode", "Instance::crudstack-prod-database"),
        ("aurora", {"postgres": Postgres()}, "postgres.mode", "Cluster::crudstack-prod-database"),
        ("postgres-s3", {"stage": "dev"}, "stage", "Bucket::crudstack-prod-data"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_change_that_would_lose_data_url_or_token_is_refused(engine, name, change, key, urn, checks):
    """The program refuses before any change. The engine alone refuses too, and loses no data, URL or token."""
    stack = up(engine, PROD[name])
    before, resources = promises(engine, stack), engine.account.all()
    stack.config, stack.checks_protection = changed(stack.config, **change), checks
    refused = stack.up()
    said = "".join([*refused.diagnostics, refused.error])
    assert refused.error != ""
    assert "pulumi state unprotect" in said
    if not checks:
        assert all(engine.account.all(type_).keys() >= set(before[type_]) for type_ in (BUCKET, INSTANCE, CLUSTER, VPC))
        assert engine.account.all(API).keys() | engine.account.all(URL).keys() >= {*before[API], *before[URL]}
        assert engine.account.current_secret(token_secret(engine)) == before["token"]
        return
    assert urn in said
    assert f"crudstack:{key} is" in said
    assert engine.account.all() == resources
    stack.config = PROD[name]
    assert_unchanged(stack.up())
    assert promises(engine, stack) == before


def test_the_command_of_the_refusal_permits_the_deletion(engine):
    stack = up(engine, PROD["s3-sqlite"])
    stack.config = changed(stack.config, edge="function-url")
    said = "".join(stack.up().diagnostics)
    command = said.partition("`pulumi ")[2].partition("`")[0].replace("'", "").split()
    assert command[:2] == ["state", "unprotect"]
    stack.command(*command[: command.index("--stack")], "--yes")
    done = stack.up()
    assert done.error == ""
    assert (len(engine.account.all(API)), len(engine.account.all(URL))) == (0, 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("s3-sqlite", {"memory_mb": 1024, "timeout_s": 20, "log_days": 90, "tags": {"team": "blue"}}),
        ("s3-sqlite", {"cors": ["https://example.org"]}),
        ("s3-sqlite", {"domain": Domain("api.example.org", "Z0123456789")}),
        ("full", {"cors": []}),
        ("full", {"cache": Cache(mode="nodes"), "broker": Broker(mode="cluster")}),
        ("full", {"storage": "postgres-s3"}),
        ("full", {"postgres": Postgres(proxy=True)}),
        ("full", {"postgres": Postgres(class_="db.t4g.small", storage_gb=40, multi_az=True)}),
        ("function-url", {"cors": ["https://example.org"], "timeout_s": 60, "snap_start": True}),
    ],
    ids=str,
)
def test_harmless_updates_are_accepted_and_can_be_reverted(engine, name, change):
    stack = up(engine, PROD[name])
    data = {type_: engine.account.all(type_).keys() for type_ in (BUCKET, INSTANCE, API, URL)}
    for config in (changed(PROD[name], **change), PROD[name]):
        stack.config = config
        done = stack.up()
        assert (done.error, done.diagnostics) == ("", [])
        assert {type_: engine.account.all(type_).keys() for type_ in data} == data
        assert_secrets_fit(engine, stack)
        assert_unchanged(stack.up())


def test_a_database_can_be_added_to_a_prod_stack(engine):
    stack = up(engine, PROD["s3-sqlite"])
    before = promises(engine, stack)
    stack.config = changed(stack.config, storage="full")
    assert stack.up().error == ""
    after = promises(engine, stack)
    assert {name: after[name] for name in ("bucket", "api_url", "auth", "token")} == {
        name: before[name] for name in ("bucket", "api_url", "auth", "token")
    }
    assert_secrets_fit(engine, stack)


def test_the_token_is_rotated_in_prod(engine):
    stack = up(engine, PROD["s3-sqlite"])
    seen = {engine.account.current_secret(token_secret(engine))}
    for generation in (2, 3, 4):
        stack.config = changed(stack.config, token_generation=generation)
        done = stack.up()
        assert (done.error, done.diagnostics) == ("", [])
        assert_secrets_fit(engine, stack)
        seen.add(engine.account.current_secret(token_secret(engine)))
        assert len(seen) == generation
        # A refresh or an aborted destroy does not restore an old token or create a new one.
        assert stack.refresh().error == ""
        assert_unchanged(stack.up())
        assert stack.destroy().error != ""
        assert stack.up().error == ""
        assert_secrets_fit(engine, stack)
        assert engine.account.current_secret(token_secret(engine)) in seen
        assert len(seen) == generation


def test_the_documented_commands_destroy_a_prod_stack(engine):
    """The database is deleted first, without Pulumi. Resources that are retained on purpose stay."""
    stack = up(engine, PROD["full"])
    stack.command("state", "unprotect", "--all", "--yes")
    (name,) = engine.account.all(INSTANCE)
    engine.account.change(INSTANCE, name, deletionProtection=False)
    engine.account.remove(INSTANCE, name)
    done = stack.destroy()
    assert done.error == ""
    kept = {key.partition(" ")[0].rpartition(":")[2] for key in engine.account.all()}
    assert kept == {
        "Bucket",
        "BucketLifecycleConfiguration",
        "BucketOwnershipControls",
        "BucketPolicy",
        "BucketPublicAccessBlock",
        "BucketServerSideEncryptionConfiguration",
        "BucketVersioning",
    }
