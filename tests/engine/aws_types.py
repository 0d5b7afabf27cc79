"""The rules of the tests' provider for each type of AWS resource: names, replacement, computed outputs, limits.

The sources are terraform-provider-aws (the schema's ForceNew, Sensitive and WriteOnly, its validators and Read
functions) and AWS's documentation. A comment names the place where a rule is not obvious.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ACCOUNT_ID = "123456789012"
REGION = "eu-central-1"
NO_PROPERTIES: tuple[str, ...] = ()

Properties = dict[str, Any]
Made = Callable[[Properties, str], tuple[str, Properties]]
"""(inputs, random lower-case hexadecimal digits) -> (id, outputs that AWS computes)."""


@dataclass(frozen=True, kw_only=True)
class AwsType:
    """A type of resource. Property names are those on the wire, camelCase."""

    made: Made
    named: str = ""
    """The property that the provider derives from the logical name if it is not given."""
    longest: int = 64
    """The maximum length of that name, in characters."""
    letters: str = r"[A-Za-z0-9_./-]+"
    """A regular expression that the name matches."""
    replaces: tuple[str, ...] = NO_PROPERTIES
    """Properties whose change replaces the resource (ForceNew), beside `named`."""
    computed_on_update: tuple[str, ...] = NO_PROPERTIES
    """Outputs that are unknown in the preview of an update that publishes a version."""
    write_only: tuple[str, ...] = NO_PROPERTIES
    """Arguments that are null in the state and absent from answers of Read."""
    sensitive: tuple[str, ...] = NO_PROPERTIES
    """Outputs that hold a secret, whatever the inputs said."""
    untold: tuple[str, ...] = NO_PROPERTIES
    """Properties that AWS stores and does not return. Read keeps their values of the state."""
    put: bool = False
    """Whether Create overwrites an existing resource, as AWS requests named Put do."""
    forgotten: tuple[str, ...] = NO_PROPERTIES
    """Lists that AWS stores and does not return. Read empties them, and Diff ignores them."""
    held_by: tuple[str, ...] = NO_PROPERTIES
    """Properties of other resources. AWS does not delete this resource while one of them names it."""


def arn(service: str, rest: str, region: str = REGION, account: str = ACCOUNT_ID) -> str:
    return f"arn:aws:{service}:{region}:{account}:{rest}"


def _plain(*, id: str = "", arn_of: str = "") -> Made:
    """Return a Made: the id is a property (or made up), and the ARN is that of a service."""

    def made(given: Properties, random: str) -> tuple[str, Properties]:
        own = str(given[id]) if id else random
        return own, {"arn": arn(*arn_of.split(" ", 1)).format(own)} if arn_of else {}

    return made


def _bucket(given: Properties, _: str) -> tuple[str, Properties]:
    name = given["bucket"]
    regional = f"{name}.s3.{REGION}.amazonaws.com"
    return name, {
        "arn": f"arn:aws:s3:::{name}",
        "region": REGION,
        "bucketRegion": REGION,
        "hostedZoneId": "Z21DNDUVLTQW6Q",
        "bucketDomainName": f"{name}.s3.amazonaws.com",
        "bucketRegionalDomainName": regional,
    }


def _role(given: Properties, random: str) -> tuple[str, Properties]:
    name = given["name"]
    return name, {"arn": arn("iam", f"role/{name}", ""), "uniqueId": "AROA" + random.upper()[:17]}


def _invoke_arn(function: str) -> str:
    return arn("apigateway", f"path/2015-03-31/functions/{function}/invocations", account="lambda")


def _function(given: Properties, _: str) -> tuple[str, Properties]:
    own = arn("lambda", f"function:{given['name']}")
    return given["name"], {
        "arn": own,
        "version": "1",
        "qualifiedArn": f"{own}:1",
        "sourceCodeSize": 1,
        "lastModified": "2026-01-01T00:00:00.000+0000",
        "invokeArn": _invoke_arn(own),
    }


def _alias(given: Properties, _: str) -> tuple[str, Properties]:
    function = given["functionName"].rpartition(":")[2]
    own = arn("lambda", f"function:{function}:{given['name']}")
    return own, {"arn": own, "invokeArn": _invoke_arn(own)}


def _function_url(given: Properties, random: str) -> tuple[str, Properties]:
    return f"{given['functionName']}/{given.get('qualifier', '')}", {
        "functionUrl": f"https://{random}.lambda-url.{REGION}.on.aws/",
        "urlId": random,
        "functionArn": arn("lambda", f"function:{given['functionName']}"),
    }


def _invocation(given: Properties, random: str) -> tuple[str, Properties]:
    event = json.loads(given["input"])
    return f"{given['functionName']}_$LATEST_{random}", {"result": json.dumps({"user": event.get("user")})}


def _api(_: Properties, random: str) -> tuple[str, Properties]:
    own = random[:10]
    return own, {
        "apiEndpoint": f"https://{own}.execute-api.{REGION}.amazonaws.com",
        "arn": arn("apigateway", f"/apis/{own}", account=""),
        "executionArn": arn("execute-api", own),
    }


def _stage(given: Properties, _: str) -> tuple[str, Properties]:
    return f"{given['apiId']}/{given['name']}", {
        "arn": arn("apigateway", f"/apis/{given['apiId']}/stages/{given['name']}", account=""),
        "executionArn": arn("execute-api", f"{given['apiId']}/{given['name']}"),
        "invokeUrl": f"https://{given['apiId']}.execute-api.{REGION}.amazonaws.com/",
    }


def _domain_name(given: Properties, random: str) -> tuple[str, Properties]:
    own = given["domainName"]
    return own, {
        "arn": arn("apigateway", f"/domainnames/{own}", account=""),
        "domainNameConfiguration": {
            **given["domainNameConfiguration"],
            "targetDomainName": f"d-{random[:10]}.execute-api.{REGION}.amazonaws.com",
            "hostedZoneId": "Z1U9ULNL0V5AJ3",
        },
    }


def _certificate(given: Properties, random: str) -> tuple[str, Properties]:
    own = arn("acm", f"certificate/{random}")
    validation = {
        "domainName": given["domainName"],
        "resourceRecordName": f"_{random}.{given['domainName']}.",
        "resourceRecordType": "CNAME",
        "resourceRecordValue": f"_{random}.acm-validations.aws.",
    }
    return own, {"arn": own, "status": "PENDING_VALIDATION", "domainValidationOptions": [validation]}


def _record(given: Properties, _: str) -> tuple[str, Properties]:
    name = str(given["name"]).rstrip(".")
    return f"{given['zoneId']}_{name}_{given['type']}", {"fqdn": name}


def _secret(given: Properties, random: str) -> tuple[str, Properties]:
    own = arn("secretsmanager", f"secret:{given['name']}-{random[:6]}")
    return own, {"arn": own}


def _secret_version(given: Properties, random: str) -> tuple[str, Properties]:
    version = f"terraform-{random}"
    stages = given.get("versionStages") or ["AWSCURRENT"]
    own = given["secretId"]
    return f"{own}|{version}", {"arn": own, "secretArn": own, "versionId": version, "versionStages": stages}


def _master_secret(kind: str, random: str) -> Properties:
    own = arn("secretsmanager", f"secret:rds!{kind}-{random}")
    return {"masterUserSecrets": [{"secretArn": own, "kmsKeyId": "k", "secretStatus": "active"}]}


def _instance(given: Properties, random: str) -> tuple[str, Properties]:
    name, own = given["identifier"], f"db-{random.upper()}"
    host = f"{name}.{random[:12]}.{REGION}.rds.amazonaws.com"
    return own, {
        "arn": arn("rds", f"db:{name}"),
        "address": host,
        "endpoint": f"{host}:5432",
        "port": 5432,
        "resourceId": own,
        "engineVersionActual": "17.6",
        "status": "available",
        **_master_secret("db", random),
    }


def _cluster(given: Properties, random: str) -> tuple[str, Properties]:
    name = given["clusterIdentifier"]
    return name, {
        "arn": arn("rds", f"cluster:{name}"),
        "endpoint": f"{name}.cluster-{random[:12]}.{REGION}.rds.amazonaws.com",
        "clusterResourceId": f"cluster-{random.upper()}",
        **_master_secret("cluster", random),
    }


def _proxy(given: Properties, random: str) -> tuple[str, Properties]:
    endpoint = f"{given['name']}.proxy-{random[:12]}.{REGION}.rds.amazonaws.com"
    return given["name"], {"arn": arn("rds", f"db-proxy:prx-{random[:17]}"), "endpoint": endpoint}


def _serverless_cache(given: Properties, random: str) -> tuple[str, Properties]:
    name = given["name"]
    address = f"{name}-{random[:6]}.serverless.euc1.cache.amazonaws.com"
    return name, {
        "arn": arn("elasticache", f"serverlesscache:{name}"),
        "fullEngineVersion": "8.1",
        "status": "available",
        "endpoints": [{"address": address, "port": 6379}],
    }


def _replication_group(given: Properties, random: str) -> tuple[str, Properties]:
    name = given["replicationGroupId"]
    address = f"master.{name}.{random[:6]}.euc1.cache.amazonaws.com"
    return name, {"arn": arn("elasticache", f"replicationgroup:{name}"), "primaryEndpointAddress": address}


def _broker(given: Properties, random: str) -> tuple[str, Properties]:
    own = f"b-{random}"
    host = f"{own}.mq.{REGION}.on.aws"
    instance = {"endpoints": [f"amqps://{host}:5671"], "consoleUrl": f"https://{host}", "ipAddress": ""}
    return own, {"arn": arn("mq", f"broker:{given['brokerName']}:{own}"), "instances": [instance]}


_BESIDE_BUCKET = AwsType(made=_plain(id="bucket"), replaces=("bucket",), put=True)
_RULE = AwsType(made=_plain(), replaces=("securityGroupId",))
_PARAMETERS = AwsType(
    made=_plain(id="name", arn_of="rds pg:{}"),
    named="name",
    longest=255,
    replaces=("family", "description"),
    held_by=("parameterGroupName", "dbClusterParameterGroupName"),
)

TYPES: dict[str, AwsType] = {
    "aws:acm/certificate:Certificate": AwsType(made=_certificate, replaces=("domainName", "validationMethod")),
    "aws:acm/certificateValidation:CertificateValidation": AwsType(
        made=_plain(), replaces=("certificateArn", "validationRecordFqdns")
    ),
    "aws:apigatewayv2/api:Api": AwsType(made=_api, named="name", longest=128, replaces=("protocolType",)),
    "aws:apigatewayv2/apiMapping:ApiMapping": AwsType(made=_plain(), replaces=("apiId", "domainName")),
    "aws:apigatewayv2/authorizer:Authorizer": AwsType(made=_plain(), named="name", longest=128, replaces=("apiId",)),
    "aws:apigatewayv2/domainName:DomainName": AwsType(made=_domain_name, replaces=("domainName",)),
    "aws:apigatewayv2/integration:Integration": AwsType(
        made=_plain(), replaces=("apiId", "integrationType", "connectionType")
    ),
    "aws:apigatewayv2/route:Route": AwsType(made=_plain(), replaces=("apiId",)),
    "aws:apigatewayv2/stage:Stage": AwsType(made=_stage, replaces=("apiId", "name")),
    "aws:budgets/budget:Budget": AwsType(made=_plain(id="name"), named="name", longest=100),
    "aws:cloudwatch/eventRule:EventRule": AwsType(
        made=_plain(id="name", arn_of="events rule/{}"), named="name", put=True
    ),
    "aws:cloudwatch/eventTarget:EventTarget": AwsType(made=_plain(), named="targetId", replaces=("rule",)),
    "aws:cloudwatch/logGroup:LogGroup": AwsType(
        made=_plain(id="name", arn_of="logs log-group:{}"), named="name", longest=512, replaces=("namePrefix",)
    ),
    "aws:cloudwatch/metricAlarm:MetricAlarm": AwsType(
        made=_plain(id="name", arn_of="cloudwatch alarm:{}"), named="name", longest=255, put=True
    ),
    "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup": AwsType(made=_plain(), replaces=("vpcId",)),
    "aws:ec2/routeTable:RouteTable": AwsType(made=_plain(), replaces=("vpcId",), held_by=("routeTableIds",)),
    "aws:ec2/routeTableAssociation:RouteTableAssociation": AwsType(made=_plain(), replaces=("subnetId",)),
    "aws:ec2/securityGroup:SecurityGroup": AwsType(
        made=_plain(),
        named="name",
        longest=255,
        replaces=("vpcId", "description"),
        held_by=("securityGroupIds", "securityGroups", "vpcSecurityGroupIds", "referencedSecurityGroupId"),
    ),
    "aws:ec2/subnet:Subnet": AwsType(
        made=_plain(), replaces=("vpcId", "cidrBlock", "availabilityZone"), held_by=("subnetIds", "vpcSubnetIds")
    ),
    "aws:ec2/vpc:Vpc": AwsType(made=_plain(arn_of="ec2 vpc/{}"), replaces=("cidrBlock",), held_by=("vpcId",)),
    "aws:ec2/vpcEndpoint:VpcEndpoint": AwsType(
        made=lambda _, random: (f"vpce-{random[:17]}", {"prefixListId": f"pl-{random[:8]}", "state": "available"}),
        replaces=("vpcId", "serviceName", "vpcEndpointType"),
    ),
    "aws:elasticache/replicationGroup:ReplicationGroup": AwsType(
        made=_replication_group,
        named="replicationGroupId",
        longest=40,
        letters=r"[a-zA-Z][a-zA-Z0-9-]*",
        replaces=("port", "atRestEncryptionEnabled", "subnetGroupName", "engineVersion"),
    ),
    "aws:elasticache/serverlessCache:ServerlessCache": AwsType(
        made=_serverless_cache, named="name", longest=40, replaces=("subnetIds", "kmsKeyId")
    ),
    "aws:elasticache/subnetGroup:SubnetGroup": AwsType(
        made=_plain(id="name"), named="name", longest=255, held_by=("subnetGroupName",)
    ),
    "aws:elasticache/user:User": AwsType(
        made=_plain(id="userId", arn_of="elasticache user:{}"),
        replaces=("userId", "userName", "engine"),
        held_by=("userIds",),
    ),
    "aws:elasticache/userGroup:UserGroup": AwsType(
        made=_plain(id="userGroupId", arn_of="elasticache usergroup:{}"),
        replaces=("userGroupId",),
        held_by=("userGroupId", "userGroupIds"),
    ),
    "aws:iam/role:Role": AwsType(made=_role, named="name", held_by=("role",)),
    "aws:iam/rolePolicy:RolePolicy": AwsType(
        made=lambda given, _: (f"{given['role']}:{given['name']}", {}),
        named="name",
        longest=128,
        replaces=("role",),
        put=True,
    ),
    "aws:lambda/alias:Alias": AwsType(made=_alias, replaces=("name", "functionName")),
    # The zip is on this machine, and AWS tells only its hash.
    "aws:lambda/function:Function": AwsType(
        made=_function,
        named="name",
        replaces=("packageType",),
        computed_on_update=("version", "qualifiedArn", "lastModified"),
        untold=("code",),
    ),
    "aws:lambda/functionUrl:FunctionUrl": AwsType(made=_function_url, replaces=("functionName", "qualifier")),
    "aws:lambda/invocation:Invocation": AwsType(
        made=_invocation, replaces=("functionName", "input", "qualifier", "triggers")
    ),
    "aws:lambda/permission:Permission": AwsType(
        made=_plain(id="statementId"),
        named="statementId",
        longest=100,
        replaces=(
            "action",
            "function",
            "principal",
            "qualifier",
            "sourceArn",
            "functionUrlAuthType",
            "invokedViaFunctionUrl",
        ),
    ),
    # Amazon MQ lists no users of RabbitMQ, so Read may leave an empty list; DiffSuppressFunc hides that (mq/broker.go).
    "aws:mq/broker:Broker": AwsType(
        made=_broker,
        named="brokerName",
        longest=50,
        letters=r"[0-9A-Za-z_-]+",
        replaces=("deploymentMode", "engineType", "subnetIds", "publiclyAccessible", "storageType"),
        sensitive=("users",),
        forgotten=("users",),
    ),
    "aws:rds/cluster:Cluster": AwsType(
        made=_cluster,
        named="clusterIdentifier",
        longest=63,
        replaces=("engine", "masterUsername", "databaseName", "storageEncrypted", "kmsKeyId", "dbSubnetGroupName"),
        held_by=("clusterIdentifier",),
    ),
    "aws:rds/clusterInstance:ClusterInstance": AwsType(
        made=lambda given, _: (given["identifier"], {"arn": arn("rds", f"db:{given['identifier']}")}),
        named="identifier",
        longest=63,
        replaces=("clusterIdentifier", "engine", "dbSubnetGroupName"),
    ),
    "aws:rds/clusterParameterGroup:ClusterParameterGroup": _PARAMETERS,
    "aws:rds/instance:Instance": AwsType(
        made=_instance,
        named="identifier",
        longest=63,
        replaces=("engine", "username", "dbName", "storageEncrypted", "kmsKeyId"),
    ),
    "aws:rds/parameterGroup:ParameterGroup": _PARAMETERS,
    "aws:rds/proxy:Proxy": AwsType(made=_proxy, named="name", longest=63, replaces=("engineFamily", "vpcSubnetIds")),
    "aws:rds/proxyDefaultTargetGroup:ProxyDefaultTargetGroup": AwsType(
        made=lambda given, random: (
            given["dbProxyName"],
            {"name": "default", "arn": arn("rds", f"target-group:prx-tg-{random[:17]}")},
        ),
        replaces=("dbProxyName",),
    ),
    "aws:rds/proxyTarget:ProxyTarget": AwsType(
        made=lambda given, random: (f"{given['dbProxyName']}/default/RDS_INSTANCE/{random[:8]}", {}),
        replaces=("dbProxyName", "targetGroupName", "dbInstanceIdentifier", "dbClusterIdentifier"),
    ),
    "aws:rds/subnetGroup:SubnetGroup": AwsType(
        made=_plain(id="name", arn_of="rds subgrp:{}"), named="name", longest=255, held_by=("dbSubnetGroupName",)
    ),
    "aws:route53/record:Record": AwsType(made=_record, replaces=("zoneId", "name", "type"), put=True),
    "aws:s3/bucket:Bucket": AwsType(made=_bucket, named="bucket", longest=63, letters=r"[a-z0-9][a-z0-9.-]*"),
    "aws:s3/bucketCorsConfiguration:BucketCorsConfiguration": _BESIDE_BUCKET,
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration": _BESIDE_BUCKET,
    "aws:s3/bucketOwnershipControls:BucketOwnershipControls": _BESIDE_BUCKET,
    "aws:s3/bucketPolicy:BucketPolicy": _BESIDE_BUCKET,
    "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock": _BESIDE_BUCKET,
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration": _BESIDE_BUCKET,
    "aws:s3/bucketVersioning:BucketVersioning": _BESIDE_BUCKET,
    "aws:secretsmanager/secret:Secret": AwsType(made=_secret, named="name", longest=512, letters=r"[\w/+=.@-]+"),
    "aws:secretsmanager/secretVersion:SecretVersion": AwsType(
        made=_secret_version,
        replaces=("secretId", "secretString", "secretBinary", "secretStringWoVersion"),
        write_only=("secretStringWo",),
        sensitive=("secretString", "secretBinary"),
    ),
    "aws:sns/topic:Topic": AwsType(
        made=lambda given, _: (arn("sns", given["name"]), {"arn": arn("sns", given["name"]), "owner": ACCOUNT_ID}),
        named="name",
        longest=256,
        put=True,
    ),
    "aws:sns/topicSubscription:TopicSubscription": AwsType(
        made=_plain(arn_of="sns x:{}"), replaces=("topic", "protocol", "endpoint")
    ),
    "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule": _RULE,
    "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule": _RULE,
}

SETS = frozenset(
    [
        "alarmActions",
        "allowHeaders",
        "allowMethods",
        "allowOrigins",
        "architectures",
        "audiences",
        "enabledCloudwatchLogsExports",
        "exposeHeaders",
        "identitySources",
        "okActions",
        "records",
        "routeTableIds",
        "securityGroupIds",
        "securityGroups",
        "subnetIds",
        "userGroupIds",
        "userIds",
        "versionStages",
        "vpcSecurityGroupIds",
        "vpcSubnetIds",
        "validationRecordFqdns",
    ]
)
"""Lists without an order. The provider hands them on in an order of its own."""

NOT_TOLD_BY_AWS = frozenset(
    [
        "allowOverwrite",
        "applyImmediately",
        "deleteAutomatedBackups",
        "finalSnapshotIdentifier",
        "forceDestroy",
        "publish",
        "recoveryWindowInDays",
        "skipFinalSnapshot",
    ]
)
"""Arguments for the provider only. They are in the state alone, and Read keeps them."""


def random_hex(*seed: object) -> str:
    return hashlib.sha256(repr(seed).encode()).hexdigest()[:26]
