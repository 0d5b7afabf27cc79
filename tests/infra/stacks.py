"""The stacks that the tests look at: every kind in every stage, and what else changes the resources."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from app.settings import JwtAuth, Pair
from infra.choices import Broker, Cache, Domain, Postgres
from infra.config import KINDS, StackConfig
from infra.stack import build
from tests.infra.recorder import Recording, Resource, record

STAGES = ("dev", "prod", "local", "pr-7")
JWT = JwtAuth(issuer="https://login.example.org", audiences=["crudstack"])

CONFIGS: dict[str, StackConfig] = {
    **{f"{kind}-{stage}": StackConfig(storage=kind, stage=stage) for kind in KINDS for stage in STAGES},
    "pair-prod": StackConfig(storage=Pair(meta="redis-postgres", resource="cached-s3"), stage="prod"),
    "overrides-dev": StackConfig(
        storage_overrides={"session": "postgres-s3", "article": Pair(meta="s3-sqlite", resource="mq-cached-s3")}
    ),
    "function-url-dev": StackConfig(
        edge="function-url", auth="none", cors=["*"], timeout_s=60, snap_start=True, concurrency=5
    ),
    "function-url-prod": StackConfig(stage="prod", edge="function-url", token_generation=3),
    "everything-prod": StackConfig(
        storage="full",
        stage="prod",
        auth=JWT,
        cors=["https://www.example.org"],
        domain=Domain("api.example.org", "Z0123456789", "/v1"),
        postgres=Postgres(mode="aurora", multi_az=True, proxy=True),
        cache=Cache(mode="nodes"),
        broker=Broker(mode="cluster"),
        alarm_email="ops@example.org",
        budget_usd=50,
        tags={"team": "blue"},
        memory_mb=1024,
        ephemeral_mb=2048,
        concurrency=20,
        log_days=90,
    ),
}


@functools.cache
def recording(name: str) -> Recording:
    """Of the stack with this name. The zip is not there: nothing may look at it."""
    return record(lambda: build(CONFIGS[name], zip=Path("/nowhere/app.zip")))


def policies(stack: Recording) -> dict[str, list[dict[str, Any]]]:
    """The statements of each role, by the name of the role's policy."""
    return {
        policy.name: json.loads(policy.inputs["policy"])["Statement"]
        for policy in stack.all("aws:iam/rolePolicy:RolePolicy")
    }


def environment(function: Resource) -> dict[str, str]:
    found: dict[str, str] = function.inputs.get("environment", {}).get("variables", {})
    return found
