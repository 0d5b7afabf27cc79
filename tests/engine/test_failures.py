"""After an update that failed or was killed, the next `pulumi up` succeeds, and the secrets match."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time

import msgspec
import pytest

from app.settings import TokenAuth, parse_outputs
from infra.choices import Broker
from infra.config import StackConfig
from tests.engine.checkout import Checkout, end_group, session
from tests.engine.test_life import assert_secrets_fit, assert_unchanged

FULL = StackConfig(storage="full")
FAILING = (
    "aws:s3/bucket:Bucket::",
    "aws:secretsmanager/secret:Secret::crudstack-dev-token",
    "aws:secretsmanager/secretVersion:SecretVersion::crudstack-dev-token-1",
    "aws:secretsmanager/secret:Secret::crudstack-dev-broker",
    "aws:secretsmanager/secretVersion:SecretVersion::crudstack-dev-broker",
    "aws:mq/broker:Broker::",
    "aws:rds/instance:Instance::",
    "aws:lambda/invocation:Invocation::",
    "aws:elasticache/serverlessCache:ServerlessCache::",
    "aws:lambda/function:Function::crudstack-dev-api",
    "aws:lambda/alias:Alias::",
    "aws:apigatewayv2/stage:Stage::",
    "aws:cloudwatch/metricAlarm:MetricAlarm::crudstack-dev-errors",
)


@pytest.mark.parametrize("urn", FAILING)
def test_up_succeeds_after_a_resource_could_not_be_created(engine, urn):
    stack = engine.stack("test", FULL)
    engine.faults.set(create=urn)
    failed = stack.up()
    assert "the test lets it fail" in "".join(failed.diagnostics)
    engine.faults.clear()
    assert stack.up().error == ""
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up())
    assert stack.destroy().error == ""
    assert engine.account.all() == {}


@pytest.mark.parametrize("urn", ["SecretVersion::crudstack-dev-token-2", "Function::crudstack-dev-api"])
@pytest.mark.parametrize("fault", ["create", "update"])
def test_up_completes_a_failed_rotation(engine, created, urn, fault):
    stack = created(StackConfig())
    stack.config = StackConfig(token_generation=2)
    engine.faults.set(**{fault: urn})
    stack.up()
    engine.faults.clear()
    assert stack.up().error == ""
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up())


@pytest.mark.parametrize("fault", ["create", "delete", "update"])
def test_up_completes_a_failed_replacement_of_the_broker(engine, created, fault):
    stack = created(StackConfig(storage="mq-cached-s3"))
    stack.config = msgspec.structs.replace(stack.config, broker=Broker(mode="cluster"))
    engine.faults.set(**{fault: "Function::crudstack-dev-api" if fault == "update" else "aws:mq/broker:Broker"})
    assert stack.up().error != ""
    engine.faults.clear()
    assert stack.up().error == ""
    assert_secrets_fit(engine, stack)
    assert_unchanged(stack.up())


@pytest.mark.parametrize("fault", ["delete"])
def test_destroy_completes_after_a_failed_destroy(engine, created, fault):
    stack = created(FULL)
    engine.faults.set(**{fault: "aws:ec2/vpc:Vpc"})
    assert stack.destroy().error != ""
    engine.faults.clear()
    assert stack.destroy().error == ""
    assert engine.account.all() == {}


# With the real CLI, whose parts are processes that can be killed


@pytest.fixture
def checkout(tmp_path, cli) -> Checkout:
    """Return a project with a stack of kind mq-cached-s3, which has two secrets. No resource exists yet."""
    made = Checkout(tmp_path, cli, storage="mq-cached-s3")
    made.run("pulumi stack init dev && pulumi config set aws:region eu-central-1")
    made.run("pulumi config set storage mq-cached-s3")
    return made


PARTS = {
    "program": "pulumi-language-python-exec --monitor",
    "provider": "-m tests.engine.provider",
    "engine": "pulumi up",
}
MOST_S = {"program": 3, "provider": 6, "engine": 8}
"""The longest delay between the start of a part and its kill: about as long as the part runs."""


def kill(part: str, leader: int, after_s: float) -> bool:
    """Kill a part of a running `pulumi up` with SIGKILL, `after_s` after its start. Return False if it ended before."""
    deadline = time.monotonic() + 60
    while (pid := find(part, leader)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pid is not None, f"{part} never ran"
    time.sleep(after_s)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def find(part: str, leader: int) -> int | None:
    """Return the process of a part of the `pulumi up` that leads this session."""
    return next((pid for pid, command in session(leader).items() if PARTS[part] in command), None)


@pytest.mark.parametrize("part", PARTS)
def test_up_succeeds_after_kills(checkout, part):
    """Each part of an update is killed at random moments. `cancel` and `up` follow, as docs/deploy.md says."""
    moments = random.Random(part)
    checkout.faults.set(latency_s=0.05)
    killed, most_s = 0, MOST_S[part]
    while killed < 3:
        running = checkout.start("exec pulumi up --yes --skip-preview --non-interactive")
        try:
            if kill(part, running.pid, moments.uniform(0, most_s)):
                killed += 1
            else:
                most_s /= 2  # the part had ended before, because less was left to do than the last time
            said, _ = running.communicate(timeout=120)
        finally:
            end_group(running)
        if "Traceback" in said:
            # The last traceback is that of a program whose engine has ended, and never shows an error of infra/.
            assert "infra/" not in said.rpartition("Traceback")[2], said
        checkout.mend_state()
        checkout.run("pulumi cancel --yes || true")
    checkout.faults.clear()
    forget_orphans(checkout)
    checkout.run("pulumi up --yes --skip-preview")
    assert_fits(checkout)
    checkout.run("pulumi up --yes --skip-preview --expect-no-changes")


def forget_orphans(checkout: Checkout) -> None:
    """Remove resources that exist but are not in the state, as docs/deploy.md tells the user to do."""
    known = checkout.run("pulumi stack export")
    for key in checkout.account.all():
        type_, _, id = key.partition(" ")
        if f'"id": "{id}"' not in known:
            checkout.account.remove(type_, id)


def assert_fits(checkout: Checkout) -> None:
    outputs = parse_outputs(checkout.run("pulumi stack output --json"), "the outputs")
    (secret,) = [id for id in checkout.account.all("aws:secretsmanager/secret:Secret") if "/api-token" in id]
    token = checkout.account.current_secret(secret)
    assert isinstance(outputs.auth, TokenAuth)
    assert hashlib.sha256(token.encode()).hexdigest() == outputs.auth.token_sha256
    (broker,) = checkout.account.all("aws:mq/broker:Broker").values()
    assert broker["_untold"]["users"] == [json.loads(checkout.account.current_secret(outputs.broker.secret_arn))]


@pytest.mark.parametrize("urn", ["aws:mq/broker:Broker", "SecretVersion::crudstack-dev-broker", "Bucket::"])
def test_up_succeeds_after_the_provider_exited_before_its_answer(checkout, urn):
    """The resource exists, but is not in the state. The next update creates another one and loses no secret."""
    checkout.faults.set(cut=urn)
    checkout.run("pulumi up --yes --skip-preview", code=1)
    checkout.faults.clear()
    checkout.run("pulumi up --yes --skip-preview")
    forget_orphans(checkout)
    assert_fits(checkout)
