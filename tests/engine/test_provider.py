"""The provider of the tests is as strict as the real one."""

from __future__ import annotations

import json

import pulumi
import pulumi_aws as aws
import pytest

from infra.config import StackConfig
from tests.engine.account import Account, AwsError

BUCKET = "aws:s3/bucket:Bucket"


def plan(engine, program):
    stack = engine.stack("test", StackConfig())
    stack.program = program
    return stack


def test_a_write_only_argument_fails_after_a_refresh(engine):
    """The bridge's Read returns null for it, but the validator requires it together with its version.

    Therefore the program has no write-only arguments.
    """

    def program():
        secret = aws.secretsmanager.Secret("one")
        options = pulumi.ResourceOptions(ignore_changes=["secret_string_wo"])
        arguments = {"secret_string_wo": pulumi.Output.secret("a-password"), "secret_string_wo_version": 1}
        aws.secretsmanager.SecretVersion("one", secret_id=secret.id, **arguments, opts=options)
        return {}

    stack = plan(engine, program)
    assert stack.up().error == ""
    assert stack.up().changes == {}
    assert stack.refresh().error == ""
    refused = stack.up()
    assert any(
        "all of `secret_string_wo,secret_string_wo_version` must be specified" in said for said in refused.diagnostics
    )


def test_read_answers_from_the_account_and_not_from_the_request(engine):
    stack = plan(engine, lambda: {"name": aws.s3.Bucket("one", tags={"team": "blue"}).bucket})
    assert stack.up().error == ""
    name = stack.outputs()["name"]
    engine.account.change(BUCKET, name, tags={"team": "red"})
    refreshed = stack.refresh()
    assert refreshed.changes == {"update": 1}
    (state,) = [each for each in stack.exported()["deployment"]["resources"] if each["type"] == BUCKET]
    assert (state["inputs"]["tags"], state["outputs"]["tags"]) == ({"team": "red"}, {"team": "red"})
    mended = stack.up()
    assert (mended.changes, mended.of("update")[0].changed) == ({"update": 1}, ["tags"])
    assert engine.account.get(BUCKET, name)["tags"] == {"team": "blue"}
    engine.account.remove(BUCKET, name)
    assert stack.up(refresh=True).changes["create"] == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: aws.s3.Bucket("one", bucket="Upper"), "'Upper'"),
        (lambda: aws.iam.Role("one", assume_role_policy="{}", name="x" * 65), "at most 64"),
        (lambda: aws.sns.Topic("one", tags={"aws:x": "y"}), "no name of a tag"),
        (lambda: aws.sns.Topic("one", tags={"x": "a,b"}), "no value of a tag"),
        (lambda: aws.acm.Certificate("one", domain_name="x" * 61 + ".org", validation_method="DNS"), "64 characters"),
        (
            lambda: aws.elasticache.User(
                "one",
                engine="valkey",
                user_id="a",
                user_name="b",
                access_string="on",
                authentication_mode={"type": "iam"},
            ),
            "must be equal",
        ),
        (
            lambda: aws.mq.Broker(
                "one",
                engine_type="RabbitMQ",
                engine_version="4.2",
                host_instance_type="mq.m5.large",
                users=[{"username": "x", "password": "a,password-0123456789"}],
            ),
            "none of ,:=",
        ),
        (lambda: aws.ec2.Vpc("one", cidr_block=10), "expected str"),
    ],
)
def test_check_refuses_what_the_real_validators_refuse(engine, make, reason):
    stack = plan(engine, lambda: make() and {})
    refused = stack.preview()
    assert any(reason in said for said in refused.diagnostics), refused.diagnostics


def test_a_broker_is_not_upgraded_in_place_from_3_to_4(engine):
    version = ["3.13"]

    def program():
        users = [{"username": "x", "password": pulumi.Output.secret("a-long-password")}]
        aws.mq.Broker(
            "one", engine_type="RabbitMQ", engine_version=version[0], host_instance_type="mq.m7g.medium", users=users
        )
        return {}

    stack = plan(engine, program)
    assert stack.up().error == ""
    version[0] = "4.2"
    assert any("in place upgrades" in said for said in stack.up().diagnostics)


def test_a_valkey_that_aws_upgraded_is_replaced_unless_its_version_is_ignored(engine):
    """A version below that of the state is a downgrade and forces a new cache (elasticache/engine_version.go)."""
    group = "aws:elasticache/replicationGroup:ReplicationGroup"

    def program():
        aws.elasticache.ReplicationGroup("one", description="x", engine="valkey", engine_version="8.0")
        return {}

    stack = plan(engine, program)
    assert stack.up().error == ""
    (name,) = engine.account.all(group)
    engine.account.change(group, name, engineVersion="8.1")
    assert stack.up(refresh=True).of("replace", "create-replacement") != []


def test_the_account_refuses_what_aws_refuses(tmp_path):
    account = Account(tmp_path)
    vpc, subnet, stage = "aws:ec2/vpc:Vpc", "aws:ec2/subnet:Subnet", "aws:apigatewayv2/stage:Stage"
    account.create(vpc, "vpc-0123456789a", {"cidrBlock": "10.0.0.0/24"})
    account.create(subnet, "subnet-0123456789a", {"vpcId": "vpc-0123456789a"})
    with pytest.raises(AwsError, match="exists already"):
        account.create(vpc, "vpc-0123456789a", {})
    with pytest.raises(AwsError, match="DependencyViolation"):
        account.delete(vpc, "vpc-0123456789a")
    account.delete(subnet, "subnet-0123456789a")
    account.delete(vpc, "vpc-0123456789a")
    with pytest.raises(AwsError, match="does not exist"):
        account.delete(vpc, "vpc-0123456789a")
    with pytest.raises(AwsError, match="vpc-0123456789a does not exist"):
        account.create(subnet, "subnet-0123456789b", {"vpcId": "vpc-0123456789a"})
    alias = "arn:aws:lambda:eu-central-1:123456789012:function:api-0123456:live"
    for _ in range(2):  # the id follows from the name, so the second alias has the same id
        account.create("aws:lambda/alias:Alias", alias, {"name": "live", "arn": alias})
        account.remove("aws:lambda/alias:Alias", alias)
    account.create("aws:rds/instance:Instance", "db-1", {"deletionProtection": True})
    with pytest.raises(AwsError, match="cannot delete protected"):
        account.delete("aws:rds/instance:Instance", "db-1")
    group = "arn:aws:logs:eu-central-1:123456789012:log-group:{}access-{}"
    for number in range(100):
        log = {"accessLogSettings": {"destinationArn": group.format("/aws/vendedlogs/", number)}}
        account.create(stage, f"vended-{number}", log)
    with pytest.raises(AwsError, match="insufficient permissions to enable logging"):
        for number in range(100):
            log = {"accessLogSettings": {"destinationArn": group.format("", number)}}
            account.create(stage, f"other-{number}", log)


def test_a_label_moves_to_the_version_that_takes_it(tmp_path):
    account, version = Account(tmp_path), "aws:secretsmanager/secretVersion:SecretVersion"
    for number, labels in enumerate((["AWSCURRENT", "one"], ["AWSCURRENT", "two"], ["three"])):
        content = {"secretId": "s", "versionStages": labels, "secretString": str(number)}
        account.create(version, f"v{number}", content)
    stages = {id: each["versionStages"] for id, each in account.all(version).items()}
    assert stages == {"v0": ["AWSPREVIOUS", "one"], "v1": ["AWSCURRENT", "two"], "v2": ["three"]}
    assert account.current_secret("s") == "1"


def test_state_is_encrypted_and_exported_without_secrets(engine):
    def program():
        secret = aws.secretsmanager.Secret("one")
        aws.secretsmanager.SecretVersion(
            "one", secret_id=secret.id, secret_string=pulumi.Output.secret("planted-value")
        )
        return {"open": "planted-output"}

    stack = plan(engine, program)
    assert stack.up().error == ""
    exported = json.dumps(stack.exported())
    assert ("planted-value" in exported, "planted-output" in exported) == (False, True)
