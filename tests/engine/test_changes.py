"""The effect of changing each config key of an existing stack. No change replaces or deletes a resource with data."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import msgspec
import pytest

from infra.choices import Broker, Cache, Domain, Postgres
from infra.config import StackConfig
from tests.engine.test_life import assert_secrets_fit, assert_unchanged
from tests.engine.wire import UNKNOWN
from tests.infra.stacks import JWT

DATA = ("Bucket ", "Instance ", "Cluster ", "ClusterInstance ")


class Change(NamedTuple):
    before: StackConfig
    key: str
    value: Any
    updated: AbstractSet[str] = frozenset()
    """As "Function api", without the stack's name."""
    replaced: AbstractSet[str] = frozenset()
    created: AbstractSet[str] = frozenset()
    deleted: AbstractSet[str] = frozenset()


S3, FULL = StackConfig(), StackConfig(storage="full")
DOMAIN = Domain("api.example.org", "Z0123456789")
OF_DOMAIN = {
    "Certificate domain",
    "CertificateValidation domain",
    "Record validation",
    "Record domain",
    "DomainName domain",
    "ApiMapping domain",
}
FUNCTION, ALIAS = "Function api", "Alias api"
VERSION = {FUNCTION, ALIAS}
"""A change of the function publishes a new version, and the alias is moved to it."""
OUTPUTS = {*VERSION, "Function backup"}
"""Both functions of a stack with a network know its outputs."""

CHANGES = {
    "storage": Change(S3, "storage", "cached-s3", updated=VERSION),
    "storage_overrides": Change(S3, "storage_overrides", {"article": "cached-s3"}, updated=VERSION),
    "auth": Change(S3, "auth", "none", updated=VERSION, deleted={"Secret token", "SecretVersion token-1"}),
    "auth jwt": Change(
        S3,
        "auth",
        JWT,
        updated={*VERSION, "Route all"},
        created={"Authorizer jwt", "Route healthz"},
        deleted={"Secret token", "SecretVersion token-1"},
    ),
    "token_generation": Change(
        S3, "token_generation", 2, updated=VERSION, created={"SecretVersion token-2"}, deleted={"SecretVersion token-1"}
    ),
    "edge": Change(
        S3,
        "edge",
        "function-url",
        updated={"MetricAlarm 5xx"},
        created={"FunctionUrl url", "Permission url", "Permission by-url"},
        deleted={
            "Api api",
            "Integration function",
            "Route all",
            "Stage all",
            "Permission api",
            "LogGroup access",
        },
    ),
    "memory_mb": Change(S3, "memory_mb", 1024, updated=VERSION),
    "ephemeral_mb": Change(S3, "ephemeral_mb", 1024, updated=VERSION),
    "timeout_s": Change(S3, "timeout_s", 20, updated={*VERSION, "MetricAlarm duration"}),
    "concurrency": Change(S3, "concurrency", 5, updated={FUNCTION}),
    "snap_start": Change(S3, "snap_start", True, updated=VERSION),
    "cors": Change(
        S3,
        "cors",
        ["https://example.org"],
        updated={*VERSION, "Api api"},
        created={"BucketCorsConfiguration data"},
    ),
    "domain": Change(S3, "domain", DOMAIN, updated={"Api api"}, created=OF_DOMAIN),
    "domain.base_path": Change(
        msgspec.structs.replace(S3, domain=DOMAIN),
        "domain",
        Domain("api.example.org", "Z0123456789", "/v1"),
        updated={*VERSION, "ApiMapping domain"},
    ),
    "postgres.class": Change(
        FULL,
        "postgres",
        Postgres(class_="db.t4g.small"),
        updated={FUNCTION, "Instance database", "MetricAlarm database-connections"},
    ),
    "postgres.storage_gb": Change(
        FULL, "postgres", Postgres(storage_gb=40), updated={"Instance database", "MetricAlarm database-storage"}
    ),
    "postgres.multi_az": Change(FULL, "postgres", Postgres(multi_az=True), updated={"Instance database"}),
    "postgres.proxy": Change(
        FULL,
        "postgres",
        Postgres(proxy=True),
        updated={*VERSION, "RolePolicy api", "SecurityGroupEgressRule api-to-postgres"},
        replaced={"SecurityGroupIngressRule postgres-from-api"},
        created={
            "Proxy proxy",
            "ProxyDefaultTargetGroup proxy",
            "ProxyTarget proxy",
            "Role proxy",
            "RolePolicy proxy",
            "SecurityGroup proxy",
            "SecurityGroupEgressRule proxy-to-postgres",
            "SecurityGroupIngressRule postgres-from-proxy",
        },
    ),
    "cache.max_gb": Change(FULL, "cache", Cache(max_gb=2), updated={"ServerlessCache cache"}),
    "cache.mode": Change(
        FULL,
        "cache",
        Cache(mode="nodes"),
        updated={*OUTPUTS, "RolePolicy api", "RolePolicy backup"},
        created={"ReplicationGroup cache", "SubnetGroup cache", "MetricAlarm cache-memory"},
        deleted={"ServerlessCache cache", "MetricAlarm cache-throttled"},
    ),
    "broker.instance": Change(FULL, "broker", Broker(instance="mq.m7g.large"), updated={"Broker broker"}),
    "broker.mode": Change(
        FULL,
        "broker",
        Broker(mode="cluster"),
        updated={*OUTPUTS, "MetricAlarm broker-cpu", "MetricAlarm broker-messages"},
        replaced={"Broker broker"},
    ),
    "broker.version": Change(
        FULL,
        "broker",
        Broker(version="3.13"),
        updated={*OUTPUTS, "MetricAlarm broker-cpu", "MetricAlarm broker-messages"},
        replaced={"Broker broker"},
    ),
    "log_days": Change(S3, "log_days", 90, updated={"LogGroup api", "LogGroup access"}),
    "alarm_email": Change(S3, "alarm_email", "ops@example.org", created={"TopicSubscription alarms"}),
    "budget_usd": Change(
        msgspec.structs.replace(S3, alarm_email="ops@example.org"), "budget_usd", 50.0, created={"Budget budget"}
    ),
}


def test_every_key_is_changed_once():
    others = {"stage", "tags"}  # they have tests of their own below
    assert {change.key for change in CHANGES.values()} == set(StackConfig.__struct_fields__) - others


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_changes_only_the_expected_resources(engine, created, name):
    change = CHANGES[name]
    stack = created(change.before)
    stack.config = msgspec.structs.replace(change.before, **{change.key: change.value})
    planned = stack.preview()
    done = stack.up()
    assert (done.error, done.diagnostics) == ("", [])

    def named(*ops: str) -> set[str]:
        return {each.replace("crudstack-dev-", "") for each in done.changed(*ops)}

    assert named("update") == change.updated
    assert named("replace") == change.replaced
    assert named("create") == change.created
    assert named("delete") == change.deleted
    assert not any(each.startswith(DATA) for each in named("replace", "delete"))
    assert planned.changes == done.changes
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up(refresh=True))
    # The change can be reverted.
    stack.config = change.before
    back = stack.up()
    assert (back.error, back.diagnostics) == ("", [])
    assert not any(each.startswith(DATA) for each in back.changed("replace", "delete"))
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up())


def test_a_change_of_tags_updates_everything_that_has_tags(engine, created):
    stack = created(FULL)
    stack.config = msgspec.structs.replace(FULL, tags={"team": "blue"})
    done = stack.up()
    assert (done.error, done.changed("replace", "create", "delete")) == ("", set())
    assert {change for step in done.of("update") for change in step.changed} <= {"tags", "tagsAll"}
    assert all(each["tags"]["team"] == "blue" for each in engine.account.all().values() if each.get("tags"))


def test_a_change_of_the_stage_replaces_every_resource(engine, created):
    """docs/deploy.md warns of that. In prod the change is refused."""
    stack = created(FULL)
    old = engine.account.all()
    stack.config = msgspec.structs.replace(FULL, stage="pr-7")
    done = stack.up()
    assert done.error == ""
    assert set(engine.account.all()) & set(old) == set()


def test_the_preview_shows_no_token_that_up_does_not_use(engine):
    stack = engine.stack("test", S3)
    assert stack.preview().outputs["auth"]["token_sha256"] == UNKNOWN
    assert stack.up().error == ""
    sha256 = stack.outputs()["auth"]["token_sha256"]
    again = stack.preview()
    assert again.outputs["auth"]["token_sha256"] == sha256


def test_aws_upgrades_its_valkey_and_nothing_is_replaced(engine, created):
    group = "aws:elasticache/replicationGroup:ReplicationGroup"
    stack = created(msgspec.structs.replace(FULL, cache=Cache(mode="nodes")))
    (name,) = engine.account.all(group)
    engine.account.change(group, name, engineVersion="8.1")
    assert stack.refresh().error == ""
    assert_unchanged(stack.up())


def test_a_deleted_secret_is_made_again_and_the_broker_follows(engine, created):
    version = "aws:secretsmanager/secretVersion:SecretVersion"
    stack = created(StackConfig(storage="mq-cached-s3"))
    (broken,) = [id for id in engine.account.all(version) if "-broker-" in id]
    old = engine.account.get(version, broken)["secretString"]
    engine.account.remove(version, broken)
    assert stack.up(refresh=True).error == ""
    (made,) = [id for id in engine.account.all(version) if "-broker-" in id]
    assert engine.account.get(version, made)["secretString"] != old
    assert_secrets_fit(engine, stack)


@pytest.mark.parametrize("change", [{"mode": "cluster"}, {"version": "3.13", "instance": "mq.m5.large"}], ids=str)
def test_a_broker_that_is_replaced_after_a_refresh_has_the_password_of_its_secret(engine, created, change):
    stack = created(StackConfig(storage="mq-cached-s3"))
    assert_unchanged(stack.refresh())
    stack.config = msgspec.structs.replace(stack.config, broker=Broker(**change))
    done = stack.up()
    assert (done.error, len(done.of("replace"))) == ("", 1)
    assert_secrets_fit(engine, stack)
