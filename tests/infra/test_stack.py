"""The Pulumi program, run without AWS: what each kind registers in each stage, and that every rule about it notices when it is broken."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pulumi
import pytest
from pulumi import ResourceTransformationResult
from pulumi.runtime import rpc

from infra import artifact
from infra.artifact import ROOT
from infra.choices import Postgres
from infra.components import StackContext
from infra.components.bucket import READ, WRITE, DataBucket
from infra.components.token import _labelled
from infra.config import KINDS, StackConfig
from infra.grants import policy
from infra.stack import build, package
from tests.infra import recorder
from tests.infra.planting import another, change, nested, on, output, statement, told, without
from tests.infra.recorder import record
from tests.infra.rules import RULES
from tests.infra.stacks import CONFIGS, STAGES, environment, policies, recording

SNAPSHOTS = Path(__file__).with_name("snapshots")
UPDATE = "CRUDSTACK_UPDATE_SNAPSHOTS"

COUNTS = {"s3-sqlite": 34, "cached-s3": 34, "postgres-s3": 71, "redis-postgres": 79, "mq-cached-s3": 59, "full": 92}
"""Resources of a kind, the stack itself and the components included."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_holds_for_every_stack(rule, name):
    assert list(rule(recording(name), CONFIGS[name])) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_deprecated(name):
    assert recording(name).warnings == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tree_of_resources(name):
    """If a change is meant: CRUDSTACK_UPDATE_SNAPSHOTS=1 .venv/bin/python -m pytest tests/infra/test_stack.py, and look at the difference."""
    tree, file = recording(name).tree(), SNAPSHOTS / f"{name}.txt"
    if os.environ.get(UPDATE):
        file.write_text(tree)
    assert file.read_text() == tree, f"{file} differs; {UPDATE}=1 writes it"


def test_there_are_no_other_snapshots():
    assert {path.stem for path in SNAPSHOTS.iterdir()} == CONFIGS.keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_how_many_resources_a_kind_is(kind, stage):
    assert len(recording(f"{kind}-{stage}").resources) == COUNTS[kind]


BUCKET, FUNCTION, STAGE = "aws:s3/bucket:Bucket", "aws:lambda/function:Function", "aws:apigatewayv2/stage:Stage"
INSTANCE, CLUSTER, ALARM = (
    "aws:rds/instance:Instance",
    "aws:rds/cluster:Cluster",
    "aws:cloudwatch/metricAlarm:MetricAlarm",
)
NODES, BROKER, USER = (
    "aws:elasticache/replicationGroup:ReplicationGroup",
    "aws:mq/broker:Broker",
    "aws:elasticache/user:User",
)
VERSION, LIFECYCLE = (
    "aws:secretsmanager/secretVersion:SecretVersion",
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration",
)
INGRESS, PERMISSION = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule", "aws:lambda/permission:Permission"
S3, FULL, ALL, URL = "s3-sqlite-dev", "full-dev", "everything-prod", "function-url-prod"

PLANTED = {
    "arguments_fit_the_sdk": [
        (S3, change(FUNCTION, memorySize="512")),
        (S3, change(FUNCTION, timeout=True)),
        (S3, change(FUNCTION, memory=512)),
        (S3, change(FUNCTION, role=...)),
        (S3, change(FUNCTION, architectures="arm64")),
        (S3, change(FUNCTION, code="app.zip")),
        (S3, nested(FUNCTION, "ephemeralStorage", to={"sise": 512})),
        (S3, nested(FUNCTION, "loggingConfig", "logFormat", to=...)),
        (S3, nested(FUNCTION, "environment", "variables", "CRUDSTACK_OUTPUTS", to={})),
        (S3, nested(LIFECYCLE, "rules", 1, "noncurrentVersionExpiration", to={"days": 1})),
        (ALL, nested(CLUSTER, "serverlessv2ScalingConfiguration", "maxCapacity", to="4")),
        (ALL, nested("aws:rds/clusterInstance:ClusterInstance", "engine", to="oracle")),
        (ALL, nested(NODES, "userGroupIds", to="users")),
    ],
    "names_are_unique_and_everything_is_in_a_component": [
        (S3, another(BUCKET, "crudstack-dev-data")),
        (S3, on(BUCKET, parent="urn:pulumi:test::crudstack::pulumi:pulumi:Stack::crudstack-test")),
        (S3, on("crudstack:aws:HttpApi", registered=False)),
    ],
    "only_what_the_storage_needs_is_there": [
        (S3, another("aws:ec2/vpc:Vpc")),
        (S3, another(INSTANCE)),
        (S3, another(USER)),
        (S3, another(BROKER)),
        (FULL, without(BROKER)),
        (
            "postgres-s3-dev",
            nested("aws:ec2/vpcEndpoint:VpcEndpoint", "vpcEndpointType", to="Interface"),
        ),
    ],
    "outputs_are_what_the_app_reads": [
        (S3, output(bukket="x")),
        (S3, output(bucket=None)),
        (S3, output(api_url=None)),
        (S3, output(storage="postgres-s3")),
        (S3, output(version=2)),
        (S3, output(auth={"mode": "token", "token_sha256": "short"})),
        (S3, told(region=None)),
        (S3, told(db={"host": "x", "name": "y", "user": "z"})),
        (FULL, told(broker=None)),
        (FULL, told(broker={"endpoint": "amqps://user:password@host", "secret_arn": "x"})),
        (FULL, output(cache={"host": "x", "user": "y", "name": "z"})),
    ],
    "secrets_stay_where_they_belong": [
        (S3, lambda stack: stack.secret_outputs.add("auth")),
        (S3, on(FUNCTION, secrets={"environment"})),
        (S3, on(VERSION, secrets=set())),
        (S3, lambda stack: told(auth=stack.one(VERSION).inputs["secretString"])(stack)),
        (S3, change(VERSION, secretString="short")),
        (S3, change(VERSION, secretStringWo="x", secretStringWoVersion=1)),
        (S3, on(VERSION, ignored=["versionStages"])),
        (FULL, lambda stack: output(broker=json.loads(stack.one(VERSION, "broker").inputs["secretString"]))(stack)),
        (FULL, change(USER, authenticationMode={"type": "password", "passwords": ["x"]})),
        (FULL, change(INSTANCE, manageMasterUserPassword=...)),
        (FULL, change(INSTANCE, masterPassword="x")),
    ],
    "buckets_are_complete": [
        *(
            (S3, without(f"aws:s3/{name}:{name[0].upper()}{name[1:]}"))
            for name in (
                "bucketOwnershipControls",
                "bucketPublicAccessBlock",
                "bucketVersioning",
                "bucketServerSideEncryptionConfiguration",
                "bucketLifecycleConfiguration",
                "bucketPolicy",
            )
        ),
        (S3, change(BUCKET, acl="public-read")),
        (S3, change("aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock", restrictPublicBuckets=False)),
        (
            S3,
            nested(
                "aws:s3/bucketOwnershipControls:BucketOwnershipControls", "rule", "objectOwnership", to="ObjectWriter"
            ),
        ),
        (S3, nested("aws:s3/bucketVersioning:BucketVersioning", "versioningConfiguration", "status", to="Suspended")),
        (S3, lambda stack: stack.one(LIFECYCLE).inputs["rules"].pop(0)),
        (S3, lambda stack: stack.one(LIFECYCLE).inputs["rules"].pop(1)),
        (S3, lambda stack: stack.one(LIFECYCLE).inputs["rules"].pop(2)),
        (
            S3,
            change(
                "aws:s3/bucketPolicy:BucketPolicy",
                policy='{"Statement": [{"Effect": "Allow", "Principal": "*", "Condition": {}}]}',
            ),
        ),
    ],
    "roles_may_do_what_they_must_and_no_more": [
        (S3, statement(3, Action=["s3:*"])),
        (S3, statement(3, Resource=["*"])),
        (S3, statement(3, Resource=["arn:aws:s3:::*/data/*"])),
        (S3, statement(3, Resource=["bucket/*"])),
        (S3, statement(3, Sid="Log")),
        (S3, statement(3, Effect="Deny")),
        (S3, another("aws:iam/rolePolicyAttachment:RolePolicyAttachment")),
        (S3, change("aws:iam/role:Role", managedPolicyArns=["arn:aws:iam::aws:policy/AdministratorAccess"])),
        (S3, change("aws:iam/role:Role", assumeRolePolicy='{"Statement": [{"Principal": {"AWS": "*"}}]}')),
    ],
    "logs_without_a_limit_are_named_where_the_limit_is_set": [
        (ALL, change("aws:elasticache/replicationGroup:ReplicationGroup", logDeliveryConfigurations=[{}])),
    ],
    "functions_are_for_lambda_and_log_for_a_while": [
        (S3, change("aws:cloudwatch/logGroup:LogGroup", retentionInDays=...)),
        (S3, change(FUNCTION, runtime="python3.12")),
        (S3, change(FUNCTION, architectures=["x86_64"])),
        (S3, change(FUNCTION, loggingConfig=...)),
        (S3, change(FUNCTION, tracingConfig={"mode": "PassThrough"})),
        (S3, change(FUNCTION, timeout=3)),
        (S3, change(FUNCTION, handler="app.main.handler")),
        (S3, told(prefix="x" * 3500)),
        (S3, nested(FUNCTION, "environment", "variables", "PASSWORD", to="x")),
        (S3, change("aws:cloudwatch/eventTarget:EventTarget", input="{}")),
        (FULL, change(FUNCTION, "-api", reservedConcurrentExecutions=...)),
    ],
    "calls_come_by_the_edge": [
        (S3, change(PERMISSION, "-api", principal="*")),
        (S3, on(PERMISSION, "-api", depends={})),
        (S3, on(PERMISSION, "-maintain", depends={})),
        (S3, change(STAGE, defaultRouteSettings=...)),
        (S3, change(STAGE, accessLogSettings=...)),
        (S3, change("aws:cloudwatch/logGroup:LogGroup", "-access", namePrefix="crudstack-dev-access-")),
        (S3, change("aws:apigatewayv2/route:Route", authorizationType="JWT")),
        (S3, change("aws:apigatewayv2/api:Api", corsConfiguration={"allowOrigins": ["*"]})),
        (ALL, change("aws:apigatewayv2/route:Route", "-all", authorizationType="NONE")),
        (ALL, without("aws:apigatewayv2/route:Route")),
        (ALL, change("aws:apigatewayv2/route:Route", "-healthz", authorizationType="JWT")),
        (ALL, change("aws:apigatewayv2/route:Route", "-healthz", routeKey="ANY /healthz/{proxy+}")),
        (ALL, change("aws:apigatewayv2/api:Api", disableExecuteApiEndpoint=...)),
        (ALL, change("aws:apigatewayv2/apiMapping:ApiMapping", apiMappingKey=...)),
        (ALL, output(base_path="/v2")),
        ("function-url-dev", change("aws:lambda/functionUrl:FunctionUrl", cors=...)),
        ("function-url-dev", change(PERMISSION, "-url", functionUrlAuthType=...)),
    ],
    "nothing_comes_in_from_outside": [
        (FULL, change(INGRESS, cidrIpv4="0.0.0.0/0")),
        (FULL, on(INGRESS, depends={})),
        (FULL, change(INGRESS, fromPort=0)),
        (FULL, change(INGRESS, ipProtocol="-1")),
        (FULL, change("aws:ec2/securityGroup:SecurityGroup", ingress=[{}])),
        (FULL, change("aws:ec2/defaultSecurityGroup:DefaultSecurityGroup", egress=[{}])),
        (FULL, another("aws:ec2/internetGateway:InternetGateway")),
        (FULL, another("aws:ec2/natGateway:NatGateway")),
        (FULL, change("aws:ec2/subnet:Subnet", mapPublicIpOnLaunch=True)),
    ],
    "databases_are_closed_and_kept": [
        *(
            (FULL, change(INSTANCE, **{name: ...}))
            for name in (
                "storageEncrypted",
                "iamDatabaseAuthenticationEnabled",
                "manageMasterUserPassword",
                "backupRetentionPeriod",
                "publiclyAccessible",
            )
        ),
        (FULL, change(INSTANCE, deletionProtection=True)),
        (FULL, change(INSTANCE, skipFinalSnapshot=False)),
        ("full-prod", change(INSTANCE, deletionProtection=False)),
        ("full-prod", change(INSTANCE, skipFinalSnapshot=True)),
        ("full-prod", change(INSTANCE, backupRetentionPeriod=1)),
        (FULL, change("aws:rds/parameterGroup:ParameterGroup", parameters=[])),
        (FULL, change("aws:lambda/invocation:Invocation", input='{"password": "x"}')),
        (ALL, change(CLUSTER, storageEncrypted=False)),
        (ALL, change("aws:rds/clusterInstance:ClusterInstance", publiclyAccessible=True)),
        (ALL, change("aws:rds/clusterParameterGroup:ClusterParameterGroup", parameters=[])),
        (ALL, change("aws:rds/proxy:Proxy", requireTls=False)),
        (ALL, change("aws:rds/proxy:Proxy", defaultAuthScheme="NONE")),
    ],
    "caches_and_brokers_are_closed": [
        *(
            (ALL, change(NODES, **{name: ...}))
            for name in (
                "transitEncryptionEnabled",
                "transitEncryptionMode",
                "atRestEncryptionEnabled",
                "userGroupIds",
                "securityGroupIds",
            )
        ),
        (ALL, change(NODES, numCacheClusters=1)),
        (ALL, on(NODES, ignored=[])),
        (ALL, change(BROKER, subnetIds=["one"])),
        (FULL, change("aws:elasticache/serverlessCache:ServerlessCache", userGroupId=...)),
        (FULL, change("aws:elasticache/serverlessCache:ServerlessCache", securityGroupIds=[])),
        (FULL, change(USER, userName="somebody")),
        (FULL, change(BROKER, publiclyAccessible=True)),
        (FULL, change(BROKER, securityGroups=[])),
        (FULL, change(BROKER, logs={"general": True, "audit": True})),
        (FULL, change(BROKER, subnetIds=["one", "two"])),
    ],
    "prod_keeps_and_the_others_leave_nothing": [
        (S3, on(BUCKET, protect=True)),
        (S3, change(BUCKET, forceDestroy=False)),
        (S3, change("aws:secretsmanager/secret:Secret", recoveryWindowInDays=30)),
        ("s3-sqlite-pr-7", on(BUCKET, retain=True)),
        ("s3-sqlite-prod", on(BUCKET, protect=False)),
        ("s3-sqlite-prod", on(BUCKET, retain=False)),
        ("s3-sqlite-prod", change(BUCKET, forceDestroy=True)),
        ("full-prod", on(INSTANCE, protect=False)),
        (ALL, on(CLUSTER, retain=False)),
        *(
            ("full-prod", on(type, suffix, protect=False))
            for type, suffix in (
                ("aws:ec2/vpc:Vpc", ""),
                ("aws:ec2/subnet:Subnet", "-1"),
                ("aws:ec2/securityGroup:SecurityGroup", "-database"),
                ("aws:rds/subnetGroup:SubnetGroup", ""),
                ("aws:rds/parameterGroup:ParameterGroup", ""),
                ("aws:secretsmanager/secret:Secret", "-token"),
                (VERSION, "-token-1"),
                ("aws:apigatewayv2/api:Api", ""),
                ("aws:apigatewayv2/integration:Integration", ""),
                ("aws:apigatewayv2/route:Route", ""),
                (STAGE, ""),
            )
        ),
        (ALL, on("aws:rds/clusterParameterGroup:ClusterParameterGroup", protect=False)),
        (ALL, on("aws:apigatewayv2/route:Route", "-preflight", protect=True)),
        ("full-prod", on(BROKER, protect=True)),
        ("full-prod", on("aws:ec2/subnet:Subnet", retain=True)),
        ("mq-cached-s3-prod", on("aws:ec2/vpc:Vpc", protect=True)),
        ("s3-sqlite-prod", on(FUNCTION, protect=True)),
        (URL, on(FUNCTION, protect=False)),
        (URL, on("aws:lambda/alias:Alias", protect=False)),
        (URL, on("aws:lambda/functionUrl:FunctionUrl", protect=False)),
        (URL, on(VERSION, "-token-2", protect=True)),
        (URL, on(VERSION, "-token-2", depends={"": []})),
        (URL, change(VERSION, "-token-2", versionStages=["AWSCURRENT", "sha256-x"])),
        (URL, change(VERSION, "-token-3", versionStages=["sha256-x"])),
        (URL, lambda stack: stack.resources.remove(stack.one(VERSION, "-token-2"))),
    ],
    "all_is_tagged_watched_and_budgeted": [
        (S3, change(BUCKET, tags={})),
        (ALL, change(BUCKET, tags={"crudstack:stage": "prod"})),
        *(
            (S3, lambda stack, name=name: stack.resources.remove(stack.one(ALARM, name)))
            for name in ("errors", "throttles", "duration", "5xx")
        ),
        (S3, on(ALARM, depends={})),
        (FULL, lambda stack: [stack.resources.remove(each) for each in stack.all(ALARM) if "database" in each.name]),
        (FULL, lambda stack: stack.resources.remove(stack.one(ALARM, "cache-throttled"))),
        (FULL, lambda stack: [stack.resources.remove(each) for each in stack.all(ALARM) if "broker" in each.name]),
        (ALL, lambda stack: stack.resources.remove(stack.one(ALARM, "cache-memory-2"))),
        (ALL, change(ALARM, "cache-memory", dimensions={"ReplicationGroupId": "crudstack-prod-cache"})),
        (ALL, without("aws:sns/topicSubscription:TopicSubscription")),
        (ALL, without("aws:budgets/budget:Budget")),
    ],
}


def test_every_rule_has_something_planted():
    assert set(PLANTED) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    ("rule", "name", "plant"),
    [
        pytest.param(rule, name, plant, id=f"{rule.__name__}-{number}")
        for rule in RULES
        for number, (name, plant) in enumerate(PLANTED[rule.__name__])
    ],
)
def test_every_rule_notices_what_is_planted(rule, name, plant):
    stack = copy.deepcopy(recording(name))
    plant(stack)
    assert list(rule(stack, CONFIGS[name])) != []


# Links


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("prefix", ["", "data/", "tenants/a/"])
def test_what_a_link_to_the_bucket_allows(access, prefix):
    def program():
        grant = DataBucket(StackContext("crudstack-dev", False, {})).grant(access, prefix)
        return {"policy": policy(grant.statements), "prefix": grant.outputs["prefix"]}

    outputs = record(program).outputs
    listed, used = json.loads(outputs["policy"])["Statement"]
    bucket = "${aws_s3_bucket.crudstack-dev-data.arn}"
    assert used["Action"] == list({"read": READ, "write": WRITE}[access])
    assert used["Resource"] == [f"{bucket}/{prefix}*"]
    assert (listed["Action"], listed["Resource"]) == (["s3:ListBucket"], [bucket])
    assert listed.get("Condition") == ({"StringLike": {"s3:prefix": f"{prefix}*"}} if prefix else None)
    assert outputs["prefix"] == prefix
    if access == "read":
        assert not any(word in action for action in used["Action"] for word in ("Put", "Delete", "Abort"))


@pytest.mark.parametrize(
    ("access", "prefix"), [("admin", ""), ("read", "*"), ("write", "a?/"), ("write", "${aws:username}/")]
)
def test_a_link_that_would_allow_more_is_refused(access, prefix):
    def program():
        DataBucket(StackContext("crudstack-dev", False, {})).grant(access, prefix)
        return {}

    with pytest.raises(ValueError, match="expected"):
        record(program)


@pytest.mark.parametrize("kind", KINDS)
def test_the_role_of_the_function_is_the_sum_of_its_links(kind):
    expected = {"Log", "Trace", "ListData", "UseData"}
    needs = StackConfig(storage=kind).servers
    expected |= {"BeInTheNetwork"} if needs else set()
    expected |= {
        {"postgres": "SignInToDatabase", "cache": "SignInToCache", "broker": "ReadBrokerSecret"}[need] for need in needs
    }
    found = policies(recording(f"{kind}-dev"))
    of_the_network = found.get("crudstack-dev-api-network", [])  # a policy of its own, of the same role
    assert {statement["Sid"] for statement in (*found["crudstack-dev-api"], *of_the_network)} == expected


def test_the_functions_that_make_the_database_user_may_do_that_alone():
    roles = policies(recording("postgres-s3-dev"))
    inside = (*roles["crudstack-dev-bootstrap-inside"], *roles["crudstack-dev-bootstrap-inside-network"])
    assert {statement["Sid"] for statement in inside} == {"Log", "Trace", "BeInTheNetwork"}
    outside = {statement["Sid"]: statement for statement in roles["crudstack-dev-bootstrap-outside"]}
    assert outside.keys() == {"Log", "Trace", "ReadMasterSecret", "Invoke"}
    assert outside["ReadMasterSecret"]["Resource"] == [
        "${aws_db_instance.crudstack-dev-database.master_user_secret[0].secret_arn}"
    ]
    assert outside["Invoke"]["Resource"] == ["${aws_lambda_function.crudstack-dev-bootstrap-inside.arn}"]


def test_the_app_is_told_the_database_user_when_it_is_there():
    stack = recording("postgres-s3-dev")
    bootstrap = stack.one("aws:lambda/invocation:Invocation")
    assert bootstrap.urn in stack.one(FUNCTION, "-api").depends["environment"]
    assert stack.one(INSTANCE).urn in bootstrap.depends["input"]


def test_iam_is_told_the_arn_of_a_database_user(monkeypatch):
    """The other recordings have no real ARNs in them."""
    arn = "arn:aws:rds:eu-central-1:123456789012:db:crudstack-dev-database-1a2b3c4"
    proxy = "arn:aws:rds:eu-central-1:123456789012:db-proxy:prx-0a1b2c3d4e5f"
    filled = recorder.made

    def made(resource):
        known = {INSTANCE: {"arn": arn, "resourceId": "db-ABC"}, "aws:rds/proxy:Proxy": {"arn": proxy}}
        return filled(resource) | known.get(resource.type, {})

    monkeypatch.setattr(recorder, "made", made)
    for settings, id in ((Postgres(), "db-ABC"), (Postgres(proxy=True), "prx-0a1b2c3d4e5f")):
        config = StackConfig(storage="postgres-s3", postgres=settings)
        roles = policies(record(lambda config=config: build(config, zip=Path("app.zip"))))
        (statement,) = [each for each in roles["crudstack-dev-api"] if each["Sid"] == "SignInToDatabase"]
        assert statement["Resource"] == [f"arn:aws:rds-db:eu-central-1:123456789012:dbuser:{id}/crudstack_app"]
    assert roles["crudstack-dev-proxy"][0]["Resource"] == [
        "arn:aws:rds-db:eu-central-1:123456789012:dbuser:db-ABC/crudstack_app"
    ]


# Secrets


def test_the_token_is_drawn_by_each_run_and_used_by_the_one_that_makes_it():
    first, second = (record(lambda: build(StackConfig(), zip=Path("app.zip"))).one(VERSION) for _ in range(2))
    assert first.inputs["secretString"] != second.inputs["secretString"]
    for version in (first, second):
        digest = hashlib.sha256(version.inputs["secretString"].encode()).hexdigest()
        assert version.inputs["versionStages"] == ["AWSCURRENT", f"sha256-{digest}"]
        assert set(version.ignored) == {"secretString", "versionStages"}


def test_a_preview_does_not_show_the_sha256_of_a_token_that_no_update_will_use(monkeypatch):
    """The engine answers for a planned resource with what is known already; the version's id is not."""
    registered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = registered(self, request)
        if request.type == VERSION:
            answer.object.update({"versionId": rpc.UNKNOWN})
        return answer

    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    stack = record(lambda: build(StackConfig(), zip=Path("app.zip")), preview=True)
    assert stack.outputs["auth"]["token_sha256"] == rpc.UNKNOWN
    digest = stack.one(VERSION).inputs["versionStages"][1].removeprefix("sha256-")
    assert digest not in json.dumps([stack.outputs, stack.one(FUNCTION).inputs])


def test_a_version_without_its_label_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("infra.components.token.LABEL", "sha1-")
    with pytest.raises(pulumi.RunError, match="raise crudstack:token_generation by one"):
        _labelled(["AWSCURRENT", "sha256-x"])


def test_the_function_knows_the_token_by_the_label_that_is_in_the_state(monkeypatch):
    """The state is what Pulumi answers with when it ignores changes: the labels of the run that made the version."""
    kept = "5" * 64
    answered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = answered(self, request)
        if request.type == VERSION:
            answer.object.update({"versionStages": ["AWSCURRENT", f"sha256-{kept}"]})
        return answer

    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    stack = record(lambda: build(StackConfig(), zip=Path("app.zip")))
    assert stack.outputs["auth"] == {"mode": "token", "token_sha256": kept}
    assert json.loads(environment(stack.one(FUNCTION))["CRUDSTACK_OUTPUTS"])["auth"]["token_sha256"] == kept


def test_another_generation_of_the_token_is_another_version_of_the_secret():
    names = {
        record(lambda n=n: build(StackConfig(token_generation=n), zip=Path("app.zip"))).one(VERSION).name
        for n in (1, 2)
    }
    assert names == {"crudstack-dev-token-1", "crudstack-dev-token-2"}


def test_without_a_token_there_is_no_secret():
    stack = recording("function-url-dev")
    assert stack.outputs["auth"] == {"mode": "none"}
    assert not stack.all(VERSION)


def test_the_broker_has_the_password_that_its_secret_holds(monkeypatch):
    """Of whichever run: here the state answers with that of an earlier one, as it does when changes are ignored."""
    kept = {"username": "crudstack", "password": "k" * 43}
    registered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = registered(self, request)
        if request.type == VERSION and request.name.endswith("-broker"):
            sealed = {rpc._special_sig_key: rpc._special_secret_sig, "value": json.dumps(kept)}
            answer.object.update({"secretString": sealed})
        return answer

    own = recording(FULL)
    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    later = record(lambda: build(CONFIGS[FULL], zip=Path("app.zip")))
    assert later.one(BROKER).inputs["users"] == [kept]
    assert later.one(BROKER).secrets == {"users"}
    (user,) = own.one(BROKER).inputs["users"]
    assert json.loads(own.one(VERSION, "broker").inputs["secretString"]) == user
    assert 12 <= len(user["password"]) <= 250
    assert "," not in user["password"]


def test_a_broker_follows_its_secret_and_its_version():
    first, second = (record(lambda: build(CONFIGS[FULL], zip=Path("app.zip"))) for _ in range(2))
    for stack in (first, second):
        broker, version = stack.one(BROKER), stack.one(VERSION, "broker")
        assert version.urn in broker.depends["users"]
        (user,) = broker.inputs["users"]
        # Another password replaces the broker, and nothing else about the secret does.
        assert broker.trigger == hashlib.sha256(user["password"].encode()).hexdigest()
        assert broker.replaced_by == ["engineVersion"]
        # A refresh may leave a broker without users in the state; what is ignored would come from there.
        assert (broker.ignored, version.ignored) == ([], ["secretString"])
    assert first.one(BROKER).trigger != second.one(BROKER).trigger


def test_permissions_for_the_network_outlive_the_security_group():
    """Lambda takes its interfaces away with the function's own permissions, after the function is gone."""
    stack = recording("full-dev")
    named = {(one.type, one.name): one for one in stack.resources}
    for function in ("api", "bootstrap-inside"):
        allowed = named["aws:iam/rolePolicy:RolePolicy", f"crudstack-dev-{function}-network"]
        group = named["aws:ec2/securityGroup:SecurityGroup", f"crudstack-dev-{function}"]
        assert allowed.urn in group.depends[""]


# The program itself


def test_it_asks_nobody_and_changes_nothing(monkeypatch):
    """Neither a preview nor an update: what the engine is told is all there is."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connects"))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("it writes"))
    monkeypatch.setattr(artifact, "build", lambda *_, **__: pytest.fail("it builds"))
    for preview in (True, False):
        stack = record(lambda: build(StackConfig(storage="full"), zip=Path("/nowhere/app.zip")), preview=preview)
        assert stack.types[FUNCTION] == 3


def test_two_programs_run_after_each_other_and_one_that_waits_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(recorder, "LIMIT_S", 0.2)

    def program():
        return {
            "never": pulumi.Output.from_input(pulumi.Output.all().apply(lambda _: __import__("asyncio").Event().wait()))
        }

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        record(program)
    assert time.monotonic() - began < 10
    assert record(lambda: {"answer": 42}).outputs == {"answer": 42}


def test_what_fails_in_the_program_fails_here():
    def program():
        raise LookupError("planted")

    with pytest.raises(LookupError, match="planted"):
        record(program)


def test_a_transform_changes_the_resources_of_its_component():
    def larger(resource):
        if resource.type_ == "aws:s3/bucket:Bucket":
            return ResourceTransformationResult({**resource.props, "bucket_prefix": "mine-"}, resource.opts)
        return None

    stack = record(lambda: build(StackConfig(), zip=Path("app.zip"), transforms={"DataBucket": larger}))
    assert stack.one(BUCKET).inputs["bucketPrefix"] == "mine-"
    assert stack.one(BUCKET).inputs["tags"] == {"crudstack:stage": "dev"}


def test_the_zip_has_the_drivers_that_the_kinds_need(monkeypatch):
    asked = []

    def pretended(out, *, requirements):
        asked.append((out.name, [path.name for path in requirements]))
        assert all(path.exists() for path in requirements)
        return artifact.Artifact(out, "00ff", 1, 1, {})

    monkeypatch.setattr(artifact, "build", pretended)
    for kind in ("s3-sqlite", "postgres-s3", "full"):
        package(StackConfig(storage=kind))
    assert asked == [
        ("lambda.zip", ["app.txt"]),
        ("lambda-postgres.zip", ["app.txt", "app-postgres.txt"]),
        (
            "lambda-amqp-postgres-redis.zip",
            ["app.txt", *(f"app-{extra}.txt" for extra in ("amqp", "postgres", "redis"))],
        ),
    ]


MAIN = ROOT / "infra/__main__.py"


def run_main(monkeypatch, directory, config, state="{}"):
    """Run the program as Pulumi does. `state`: what `pulumi stack export` prints. The developer's CLI is not called."""
    cli = directory / "pulumi"
    cli.write_text(f"#!/bin/sh\ncat <<'STATE'\n{state}\nSTATE\n")
    cli.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(artifact, "build", lambda out, **_: artifact.Artifact(out, "00ff", 1, 1, {}))
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    monkeypatch.setattr(sys, "path", list(sys.path))
    program = compile(MAIN.read_text(), str(MAIN), "exec")

    def run():
        exec(program, {"__name__": "__main__", "__file__": str(MAIN)})  # noqa: S102 - as Pulumi does
        return {}

    return record(run)


@pytest.fixture
def ended(monkeypatch):
    """The errors that the engine was told, and what was registered before."""
    said, registered, register = [], [], recorder.Monitor.RegisterResource
    monkeypatch.setattr(pulumi.log, "error", said.append)
    monkeypatch.setattr(
        recorder.Monitor,
        "RegisterResource",
        lambda self, request: (registered.append(request.type), register(self, request))[1],
    )
    return said, registered


def test_the_program_reads_its_config_and_exports_what_the_app_reads(monkeypatch, tmp_path):
    stack = run_main(
        monkeypatch,
        tmp_path,
        {"aws:region": "eu-central-1", "crudstack:storage": "cached-s3", "crudstack:memory_mb": "1024"},
    )
    assert stack.one(FUNCTION).inputs["memorySize"] == 1024
    assert stack.outputs.keys() == {
        *(
            "version",
            "storage",
            "storage_overrides",
            "stage",
            "cors",
            "region",
            "api_url",
            "function_name",
            "bucket",
            "prefix",
            "auth",
        ),
    }


def test_a_wrong_key_ends_the_program_with_one_sentence_before_anything_is_registered(monkeypatch, tmp_path, ended):
    said, registered = ended
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, tmp_path, {"crudstack:memory": "1024"})
    # Pulumi's language hosts take 32 for: the error was shown. After any other code they add a line of their own.
    assert end.value.code == 32
    (error,) = said
    assert error.startswith("crudstack:memory is no setting; there are storage, ")
    assert "\n" not in error
    assert registered == ["pulumi:pulumi:Stack"]


def test_an_update_that_would_delete_what_is_protected_ends_before_anything_is_registered(monkeypatch, tmp_path, ended):
    said, registered = ended
    api = {"urn": "urn:pulumi:test::crudstack::aws:apigatewayv2/api:Api::crudstack-prod-api", "protect": True}
    state = {"deployment": {"resources": [{**api, "type": "aws:apigatewayv2/api:Api"}]}}
    with pytest.raises(SystemExit) as end:
        run_main(
            monkeypatch, tmp_path, {"crudstack:stage": "prod", "crudstack:edge": "function-url"}, json.dumps(state)
        )
    assert end.value.code == 32
    (error,) = said
    assert error.startswith("crudstack:edge is function-url: ")
    assert f"pulumi state unprotect '{api['urn']}' --stack test`" in error
    assert registered == ["pulumi:pulumi:Stack"]


def test_a_missing_package_ends_the_program_with_the_command_that_installs_it():
    without = "import runpy, sys; sys.modules['pulumi_aws'] = None; runpy.run_path('.', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without], cwd=MAIN.parent, capture_output=True, text=True, check=False)
    said = f"error: pulumi_aws cannot be imported by {sys.executable}: run `make setup-infra`, then this again\n"
    assert (done.returncode, done.stdout, done.stderr) == (32, "", said)


def test_the_program_finds_this_checkout_even_where_it_is_not_installed(tmp_path):
    """Pulumi runs the directory as a script, in that directory."""
    shown = "import runpy, sys; runpy.run_path('.', run_name='other')"
    copy_ = tmp_path / "checkout"
    for name in ("app", "infra"):
        (copy_ / name).mkdir(parents=True)
    (copy_ / "infra/__main__.py").write_text(MAIN.read_text())
    (copy_ / "app/__init__.py").write_text("import sys; print('found', __file__); sys.exit(7)")
    done = subprocess.run(
        [sys.executable, "-c", shown], cwd=copy_ / "infra", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, f"found {copy_ / 'app/__init__.py'}\n")
