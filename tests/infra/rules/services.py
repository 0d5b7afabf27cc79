"""The rules for the resources of single services: buckets, roles, functions, networks, databases."""
# ruff: noqa: ARG001 - a rule may need the recording alone

from __future__ import annotations

import json
from collections.abc import Iterator

from infra.config import StackConfig, descriptions
from tests.infra.recorder import Recording
from tests.infra.rules.registry import rule
from tests.infra.stacks import environment, policies

BESIDE_A_BUCKET = {
    "bucketOwnershipControls",
    "bucketPublicAccessBlock",
    "bucketVersioning",
    "bucketServerSideEncryptionConfiguration",
    "bucketLifecycleConfiguration",
    "bucketPolicy",
}
WITHOUT_RESOURCES = {
    "xray:PutTraceSegments",
    "xray:PutTelemetryRecords",
    "ec2:CreateNetworkInterface",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSubnets",
    "ec2:DeleteNetworkInterface",
    "ec2:AssignPrivateIpAddresses",
    "ec2:UnassignPrivateIpAddresses",
}
"""Actions that IAM cannot limit to single resources."""


@rule
def buckets_are_complete(stack: Recording, config: StackConfig) -> Iterator[str]:
    for bucket in stack.all("aws:s3/bucket:Bucket"):
        beside = {
            each.type.split("/")[1].split(":")[0]: each
            for each in stack.aws
            if bucket.urn in each.depends.get("bucket", ())
        }
        for missing in BESIDE_A_BUCKET - beside.keys():
            yield f"{bucket.name} has no {missing}"
        if unknown := bucket.inputs.keys() - {"forceDestroy", "tags"}:
            yield f"{bucket.name} has {unknown} in itself"
        if not beside.keys() >= BESIDE_A_BUCKET:
            continue
        block = beside["bucketPublicAccessBlock"].inputs
        if any(
            block.get(name) is not True
            for name in ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets")
        ):
            yield f"{bucket.name} may be public"
        if beside["bucketOwnershipControls"].inputs["rule"] != {"objectOwnership": "BucketOwnerEnforced"}:
            yield f"{bucket.name} has ACLs"
        if beside["bucketVersioning"].inputs["versioningConfiguration"] != {"status": "Enabled"}:
            yield f"{bucket.name} keeps no versions"
        rules = beside["bucketLifecycleConfiguration"].inputs["rules"]
        bounds = [
            each["noncurrentVersionExpiration"]
            for each in rules
            if "noncurrentVersionExpiration" in each and each["status"] == "Enabled" and not each["filter"]["prefix"]
        ]
        if not any("newerNoncurrentVersions" not in bound for bound in bounds):
            yield f"{bucket.name} keeps versions for ever"
        if not any(
            bound.get("newerNoncurrentVersions", 1000) <= 100 and bound["noncurrentDays"] == 1 for bound in bounds
        ):
            yield f"{bucket.name} keeps any number of versions"
        if not any("abortIncompleteMultipartUpload" in each for each in rules):
            yield f"{bucket.name} keeps broken uploads"
        exports = [each for each in rules if each["filter"]["prefix"] == "_exports/" and each["status"] == "Enabled"]
        if [(each["expiration"], each["noncurrentVersionExpiration"]) for each in exports] != [
            ({"days": 1}, {"noncurrentDays": 1})
        ]:
            yield f"{bucket.name} keeps exports"
        of_pages = beside["bucketCorsConfiguration"].inputs["corsRules"] if "bucketCorsConfiguration" in beside else []
        if [each["allowedOrigins"] for each in of_pages] != ([config.cors] if config.cors else []):
            yield f"{bucket.name} is for other pages"
        for each in of_pages:
            if set(each["allowedMethods"]) != {"GET", "HEAD", "PUT"}:
                yield f"pages may {each['allowedMethods']} in {bucket.name}"
            if not {"content-type", "range", "x-amz-checksum-sha256"} <= set(each["allowedHeaders"]):
                yield f"pages may not send what an upload to {bucket.name} needs"
            if not {"etag", "content-range"} <= set(each["exposeHeaders"]):
                yield f"pages may not read what a download from {bucket.name} answers"
        (statement,) = json.loads(beside["bucketPolicy"].inputs["policy"])["Statement"]
        if (statement["Effect"], statement["Principal"], statement["Condition"]) != (
            "Deny",
            "*",
            {"Bool": {"aws:SecureTransport": "false"}},
        ):
            yield f"{bucket.name} can be reached without TLS"


@rule
def roles_may_do_what_they_must_and_no_more(stack: Recording, config: StackConfig) -> Iterator[str]:
    for name, statements in policies(stack).items():
        if len({statement["Sid"] for statement in statements}) < len(statements):
            yield f"{name} has two statements of one name"
        for statement in statements:
            if statement["Effect"] != "Allow":
                yield f"{name}.{statement['Sid']} is no permission"
            for action in statement["Action"]:
                if "*" in action:
                    yield f"{name} may {action}"
            if "*" in statement["Resource"] and not set(statement["Action"]) <= WITHOUT_RESOURCES:
                yield f"{name} may {statement['Action']} on everything"
            for resource in statement["Resource"]:
                if resource.rstrip("*").count("*") or (
                    resource != "*" and not resource.startswith("${") and not resource.startswith("arn:")
                ):
                    yield f"{name} may {statement['Action']} on {resource}"
    for kind in ("rolePolicyAttachment:RolePolicyAttachment", "policyAttachment:PolicyAttachment", "policy:Policy"):
        for resource in stack.all(f"aws:iam/{kind}"):
            yield f"{resource.name} is not an inline policy of a role"
    for role in stack.all("aws:iam/role:Role"):
        if {"managedPolicyArns", "inlinePolicies"} & role.inputs.keys():
            yield f"{role.name} brings policies"
        (trusted,) = json.loads(role.inputs["assumeRolePolicy"])["Statement"]
        if trusted["Principal"].keys() != {"Service"}:
            yield f"{role.name} may be taken by {trusted['Principal']}"


LOGS_OF_SERVICES = {
    "aws:rds/instance:Instance": ("enabledCloudwatchLogsExports", "/aws/rds/..."),
    "aws:rds/cluster:Cluster": ("enabledCloudwatchLogsExports", "/aws/rds/..."),
    "aws:rds/proxy:Proxy": ("engineFamily", "/aws/rds/..."),
    "aws:mq/broker:Broker": ("logs", "/aws/amazonmq/..."),
    "aws:elasticache/replicationGroup:ReplicationGroup": ("logDeliveryConfigurations", "/aws/elasticache/..."),
    "aws:ec2/flowLog:FlowLog": ("logDestination", "/aws/vpc/..."),
}
"""Resources that log to groups that the program does not create: by type, the argument and the group's name."""


@rule
def logs_without_a_limit_are_named_where_the_limit_is_set(stack: Recording, config: StackConfig) -> Iterator[str]:
    for type_, (argument, group) in LOGS_OF_SERVICES.items():
        for resource in stack.all(type_):
            if resource.inputs.get(argument) and group not in descriptions()["log_days"]:
                yield f"{resource.name} keeps logs in {group} for ever, which the text of log_days does not say"


@rule
def functions_are_for_lambda_and_log_for_a_while(stack: Recording, config: StackConfig) -> Iterator[str]:
    groups = {group.urn: group for group in stack.all("aws:cloudwatch/logGroup:LogGroup")}
    for group in groups.values():
        if group.inputs.get("retentionInDays") != config.log_days:
            yield f"{group.name} keeps its lines for {group.inputs.get('retentionInDays')} days"
    for function in stack.all("aws:lambda/function:Function"):
        inputs = function.inputs
        if (inputs["runtime"], inputs["architectures"]) != ("python3.13", ["arm64"]):
            yield f"{function.name} is for {inputs['runtime']} {inputs['architectures']}"
        if inputs.get("loggingConfig", {}).get("logFormat") != "JSON" or not groups.keys() & set(
            function.depends.get("loggingConfig", ())
        ):
            yield f"{function.name} logs elsewhere"
        if inputs.get("tracingConfig") != {"mode": "Active"}:
            yield f"{function.name} is not traced"
        if len("".join(f"{name}{value}" for name, value in environment(function).items())) > 3500:
            yield f"{function.name} has a large environment"
        if environment(function).keys() - {"CRUDSTACK_OUTPUTS"}:
            yield f"{function.name} has more in its environment"
    api = stack.one("aws:lambda/function:Function", "-api").inputs
    found = (
        api["memorySize"],
        api["timeout"],
        api["ephemeralStorage"],
        api.get("reservedConcurrentExecutions"),
        "snapStart" in api,
    )
    if found != (
        config.memory_mb,
        config.timeout_s,
        {"size": config.ephemeral_mb},
        config.reserved_concurrency,
        config.snap_start,
    ):
        yield f"the function has {found}"
    if api["handler"] != "app.handler.handler":
        yield f"the handler is {api['handler']}"
    functions = stack.all("aws:lambda/function:Function")
    backups = [each for each in functions if each.name.endswith("-backup")]
    if len(backups) != config.needs_network:
        yield f"there are {len(backups)} functions for backups"
    for each in backups:
        found = (each.inputs["handler"], each.inputs["timeout"], each.inputs["ephemeralStorage"])
        if found != ("app.backup.handler", 900, {"size": 10240}) or each.inputs.get("reservedConcurrentExecutions"):
            yield f"the function for backups has {found}"
        reached = [*stack.all("aws:lambda/permission:Permission"), *stack.all("aws:lambda/alias:Alias")]
        if any(each.urn in other.depends.get("function", other.depends.get("functionName", ())) for other in reached):
            yield "the function for backups can be called by others than the stack's user"
    target = stack.one("aws:cloudwatch/eventTarget:EventTarget")
    if json.loads(target.inputs["input"]) != {"crudstack": "maintain"} or not target.depends.get("arn"):
        yield "no schedule starts the housekeeping"


@rule
def calls_come_by_the_edge(stack: Recording, config: StackConfig) -> Iterator[str]:
    alias = stack.one("aws:lambda/alias:Alias")
    for permission in stack.all("aws:lambda/permission:Permission"):
        by_url = (
            permission.inputs.get("functionUrlAuthType") == "NONE"
            or permission.inputs.get("invokedViaFunctionUrl") is True
        )
        if permission.inputs["principal"] == "*" and not (by_url and config.edge == "function-url"):
            yield f"{permission.name} lets any principal call"
        if permission.inputs["principal"] != "*" and not permission.depends.get("sourceArn"):
            yield f"{permission.name} lets all of {permission.inputs['principal']} call"
        if alias.urn not in permission.depends.get("qualifier", ()):
            yield f"{permission.name} is not for the alias"
    if config.edge == "function-url":
        if (
            stack.one("aws:lambda/functionUrl:FunctionUrl").inputs.get("cors", {}).get("allowOrigins", [])
            != config.cors
        ):
            yield "the URL is for other pages"
        return
    stage = stack.one("aws:apigatewayv2/stage:Stage")
    limits = stage.inputs.get("defaultRouteSettings", {})
    if not (limits.get("throttlingRateLimit", 0) > 0 and limits.get("throttlingBurstLimit", 0) > 0):
        yield "the API has no limits"
    group = stack.one("aws:cloudwatch/logGroup:LogGroup", "-access").inputs
    if "name" in group or not group.get("namePrefix", "").startswith("/aws/vendedlogs/"):
        yield "each API adds a line to a policy of the region that has room for some 40"
    logged = json.loads(stage.inputs.get("accessLogSettings", {}).get("format", "{}"))
    if not logged or {"path", "sourceIp"} & set(str(logged)):
        yield "the API logs nothing"
    routes = {
        route.inputs["routeKey"]: route.inputs.get("authorizationType")
        for route in stack.all("aws:apigatewayv2/route:Route")
    }
    jwt = not isinstance(config.auth, str)
    if routes.get("$default") != ("JWT" if jwt else "NONE"):
        yield f"the API asks for {routes}"
    if ("OPTIONS /{proxy+}" in routes) != (jwt and bool(config.cors)):
        yield "browsers cannot ask first"
    if jwt:
        open_to_all = {key for key, kind in routes.items() if kind == "NONE"} - {"OPTIONS /{proxy+}"}
        if open_to_all != {"ANY /healthz"}:
            yield f"without a token the API lets in {open_to_all}, not /healthz"
    api = stack.one("aws:apigatewayv2/api:Api").inputs
    if api.get("corsConfiguration", {}).get("allowOrigins", []) != config.cors:
        yield "the API is for other pages"
    if api.get("disableExecuteApiEndpoint", False) != (config.domain is not None):
        yield "the API has two names"
    mappings = stack.all("aws:apigatewayv2/apiMapping:ApiMapping")
    prefixes = [f"/{key}" if (key := mapping.inputs.get("apiMappingKey")) else "" for mapping in mappings]
    if prefixes != ([] if config.domain is None else [config.domain.base_path]):
        yield "the domain has another prefix"
    base_path = config.domain.base_path if config.domain is not None else ""
    told = stack.outputs.get("base_path", "")
    if told != base_path or not stack.outputs["api_url"].endswith(base_path):
        yield "the app does not know its prefix"


@rule
def nothing_comes_in_from_outside(stack: Recording, config: StackConfig) -> Iterator[str]:
    for group in stack.all("aws:ec2/securityGroup:SecurityGroup") + stack.all(
        "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup"
    ):
        if group.inputs.get("ingress") or group.inputs.get("egress"):
            yield f"{group.name} has rules in itself"
    groups = {group.urn: group for group in stack.all("aws:ec2/securityGroup:SecurityGroup")}
    for direction in ("Ingress", "Egress"):
        for each in stack.all(f"aws:vpc/securityGroup{direction}Rule:SecurityGroup{direction}Rule"):
            if {"cidrIpv4", "cidrIpv6"} & each.inputs.keys():
                yield f"{each.name} is for addresses"
            if direction == "Ingress":
                known = [groups[urn] for urn in each.depends.get("referencedSecurityGroupId", ()) if urn in groups]
                if not any(
                    stack.by_urn(group.parent).component in ("ApiFunction", "Function") or group.name.endswith("-proxy")
                    for group in known
                ):
                    yield f"{each.name} lets in others than functions"
            if each.inputs["fromPort"] != each.inputs["toPort"] or each.inputs["ipProtocol"] != "tcp":
                yield f"{each.name} is for more than a port"
    for kind in ("internetGateway:InternetGateway", "natGateway:NatGateway"):
        if stack.all(f"aws:ec2/{kind}"):
            yield f"there is a {kind}"
    for subnet in stack.all("aws:ec2/subnet:Subnet"):
        if subnet.inputs.get("mapPublicIpOnLaunch") is not False:
            yield f"{subnet.name} is public"


@rule
def databases_are_closed_and_kept(stack: Recording, config: StackConfig) -> Iterator[str]:
    keeps = config.stage == "prod"
    for database in stack.all("aws:rds/instance:Instance") + stack.all("aws:rds/cluster:Cluster"):
        expected = {
            "storageEncrypted": True,
            "manageMasterUserPassword": True,
            "iamDatabaseAuthenticationEnabled": True,
            "deletionProtection": keeps,
            "skipFinalSnapshot": not keeps,
            "copyTagsToSnapshot": True,
        }
        for name, value in expected.items():
            if database.inputs.get(name) is not value:
                yield f"{database.name}.{name} is {database.inputs.get(name)}"
        if database.inputs.get("backupRetentionPeriod", 0) < (7 if keeps else 1):
            yield f"{database.name} has no backups"
    for open_ in stack.all("aws:rds/instance:Instance") + stack.all("aws:rds/clusterInstance:ClusterInstance"):
        if open_.inputs.get("publiclyAccessible") is not False:
            yield f"{open_.name} is public"
    for group in stack.all("aws:rds/parameterGroup:ParameterGroup") + stack.all(
        "aws:rds/clusterParameterGroup:ClusterParameterGroup"
    ):
        if {"name": "rds.force_ssl", "value": "1"} not in group.inputs["parameters"]:
            yield f"{group.name} lets in without TLS"
    for proxy in stack.all("aws:rds/proxy:Proxy"):
        if proxy.inputs.get("requireTls") is not True or proxy.inputs.get("defaultAuthScheme") != "IAM_AUTH":
            yield f"{proxy.name} lets in others"
    for invocation in stack.all("aws:lambda/invocation:Invocation"):
        event = json.loads(invocation.inputs["input"])
        if event.keys() != {"host", "port", "database", "user", "secret_arn", "inside"}:
            yield f"the bootstrap is told {sorted(event)}"


@rule
def caches_and_brokers_are_closed(stack: Recording, config: StackConfig) -> Iterator[str]:
    for group in stack.all("aws:elasticache/replicationGroup:ReplicationGroup"):
        if group.ignored != ["engineVersion"]:
            yield f"{group.name} would be replaced after AWS has upgraded it"
        for name, value in {
            "transitEncryptionEnabled": True,
            "transitEncryptionMode": "required",
            "atRestEncryptionEnabled": True,
        }.items():
            if group.inputs.get(name) != value:
                yield f"{group.name}.{name} is {group.inputs.get(name)}"
        if not group.inputs.get("userGroupIds") or not group.inputs.get("securityGroupIds"):
            yield f"{group.name} is open"
        if group.inputs.get("multiAzEnabled") and group.inputs.get("numCacheClusters", 1) < 2:
            yield f"{group.name} has no node to take over"
    for cache in stack.all("aws:elasticache/serverlessCache:ServerlessCache"):
        if not cache.inputs.get("userGroupId") or not cache.inputs.get("securityGroupIds"):
            yield f"{cache.name} is open"
    for user in stack.all("aws:elasticache/user:User"):
        if user.inputs["userId"] != user.inputs["userName"] or user.inputs["engine"] != "valkey":
            yield f"{user.name} cannot sign in by IAM"
    for broker in stack.all("aws:mq/broker:Broker"):
        if broker.inputs.get("publiclyAccessible") is not False or not broker.inputs.get("securityGroups"):
            yield f"{broker.name} is public"
        if broker.inputs.get("logs") != {"general": True}:
            yield f"{broker.name} logs {broker.inputs.get('logs')}"
        if len(broker.inputs["subnetIds"]) != (1 if broker.inputs["deploymentMode"] == "SINGLE_INSTANCE" else 2):
            yield f"{broker.name} is in {len(broker.inputs['subnetIds'])} subnets"
