"""The rules about stacks: each holds for every stack, and each notices when it is broken."""

from __future__ import annotations

import copy
import json

import pytest

from tests.infra.planting import another, change, nested, on, output, statement, told, without
from tests.infra.rules import RULES
from tests.infra.stacks import CONFIGS, recording

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
CORS = "aws:s3/bucketCorsConfiguration:BucketCorsConfiguration"
INGRESS, PERMISSION = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule", "aws:lambda/permission:Permission"
S3, FULL, ALL, URL = "s3-sqlite-dev", "full-dev", "everything-prod", "function-url-prod"


def change_call(stack):
    """Let the schedule call the function for backups."""
    stack.one(PERMISSION, "-maintain").depends["function"] = [stack.one(FUNCTION, "-backup").urn]


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
        (S3, lambda stack: stack.one(LIFECYCLE).inputs["rules"].pop(3)),
        (S3, nested(LIFECYCLE, "rules", 3, "filter", "prefix", to="export/")),
        (S3, nested(LIFECYCLE, "rules", 3, "noncurrentVersionExpiration", to=...)),
        (ALL, without(CORS)),
        (ALL, nested(CORS, "corsRules", 0, "allowedOrigins", to=["*"])),
        (ALL, nested(CORS, "corsRules", 0, "allowedMethods", to=["GET", "HEAD", "PUT", "DELETE"])),
        (ALL, nested(CORS, "corsRules", 0, "allowedHeaders", to=["content-type"])),
        (ALL, nested(CORS, "corsRules", 0, "exposeHeaders", to=[])),
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
        (FULL, change(FUNCTION, "-backup", timeout=60)),
        (FULL, change(FUNCTION, "-backup", handler="app.handler.handler")),
        (FULL, lambda stack: stack.resources.remove(stack.one(FUNCTION, "-backup"))),
        (FULL, change_call),
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
        (FULL, change(USER, userName="another")),
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
        (ALL, on(CORS, protect=True)),
        (ALL, on(CORS, retain=True)),
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_holds_for_every_stack(rule, name):
    assert list(rule(recording(name), CONFIGS[name])) == []
