"""The rules for all resources of a stack together: arguments, names, outputs, secrets, protection, alarms."""
# ruff: noqa: ARG001 - a rule may need the recording alone

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from app.settings import StackOutputs
from infra.config import StackConfig
from tests.infra.recorder import Recording, Resource
from tests.infra.rules.registry import rule
from tests.infra.sdk_classes import resource_class
from tests.infra.sdk_types import findings
from tests.infra.stacks import environment

VERSION = "aws:secretsmanager/secretVersion:SecretVersion"
OF_PAGES = "aws:s3/bucketCorsConfiguration:BucketCorsConfiguration"
"""It holds no data, and goes when `cors` is empty again."""
DATA = {
    "aws:s3/bucket:Bucket",
    "aws:rds/instance:Instance",
    "aws:rds/cluster:Cluster",
    "aws:rds/clusterInstance:ClusterInstance",
}


OF_A_DATABASE = {
    "aws:rds/subnetGroup:SubnetGroup",
    "aws:rds/parameterGroup:ParameterGroup",
    "aws:rds/clusterParameterGroup:ClusterParameterGroup",
    "aws:ec2/vpc:Vpc",
    "aws:ec2/subnet:Subnet",
}
"""The resources that a database depends on."""
THE_URL = {
    "http-api": {
        "aws:apigatewayv2/api:Api": "-api",
        "aws:apigatewayv2/integration:Integration": "-function",
        "aws:apigatewayv2/route:Route": "-all",
        "aws:apigatewayv2/stage:Stage": "-all",
    },
    "function-url": {
        "aws:lambda/function:Function": "-api",
        "aws:lambda/alias:Alias": "-api",
        "aws:lambda/functionUrl:FunctionUrl": "-url",
    },
}
"""The resources that determine the URL, by edge: the type, and the end of the name."""


def protected(resource: Resource, config: StackConfig) -> bool:
    """Return whether prod must protect the resource: data and their dependencies, the URL, or the current token."""
    if resource.type in DATA or resource.type.startswith("aws:s3/bucket"):
        return resource.type != OF_PAGES
    if "postgres" in config.servers and resource.type in OF_A_DATABASE:
        return True
    if resource.type == "aws:ec2/securityGroup:SecurityGroup":
        return resource.name.endswith("-database")
    if resource.type.startswith("aws:secretsmanager/"):
        return resource.name.endswith(("-token", f"-token-{config.token_generation}"))
    ending = THE_URL[config.edge].get(resource.type)
    return ending is not None and resource.name.endswith(ending)


@rule
def arguments_fit_the_sdk(stack: Recording, config: StackConfig) -> Iterator[str]:
    for resource in stack.aws:
        yield from findings(resource)


@rule
def names_are_unique_and_everything_is_in_a_component(stack: Recording, config: StackConfig) -> Iterator[str]:
    for (type_, name), count in Counter((each.type, each.name) for each in stack.resources).items():
        if count > 1:
            yield f"{type_} {name} is there {count} times"
    for resource in stack.aws:
        if not stack.by_urn(resource.parent).component:
            yield f"{resource.name} is in no component"
    for resource in stack.resources:
        if resource.component and not resource.registered:
            yield f"{resource.name} says nothing of its outputs"


@rule
def only_what_the_storage_needs_is_there(stack: Recording, config: StackConfig) -> Iterator[str]:
    modules = Counter(resource.type.split(":")[1].split("/")[0] for resource in stack.aws)
    needed = {
        "rds": "postgres" in config.servers,
        "elasticache": "cache" in config.servers,
        "mq": "broker" in config.servers,
        "ec2": config.needs_network,
        "vpc": config.needs_network,
    }
    for module, wanted in needed.items():
        if bool(modules[module]) != wanted:
            yield f"there are {modules[module]} resources of {module}"
    interfaces = [
        end for end in stack.all("aws:ec2/vpcEndpoint:VpcEndpoint") if end.inputs["vpcEndpointType"] == "Interface"
    ]
    if bool(interfaces) != ("broker" in config.servers):
        yield f"{len(interfaces)} endpoints cost by the hour"


@rule
def outputs_are_what_the_app_reads(stack: Recording, config: StackConfig) -> Iterator[str]:
    for text, missing in ((json.dumps(stack.outputs), ()), (_given(stack), ("api_url", "function_name"))):
        try:
            outputs = msgspec.json.decode(text, type=StackOutputs)
        except msgspec.ValidationError as error:
            yield f"outputs: {error}"
            continue
        if outputs.storage != config.storage or outputs.storage_overrides != config.storage_overrides:
            yield f"outputs: storage {outputs.storage}"
        for field in ("bucket", "region", "auth", "api_url", "function_name"):
            if (getattr(outputs, field) is None) != (field in missing):
                yield f"outputs: {field} is {getattr(outputs, field)}"
        for need, field in (("postgres", "db"), ("cache", "cache"), ("broker", "broker")):
            if (getattr(outputs, field) is None) != (need not in config.servers):
                yield f"outputs: {field} is {getattr(outputs, field)}"


@rule
def secrets_stay_where_they_belong(stack: Recording, config: StackConfig) -> Iterator[str]:
    for name in stack.secret_outputs:
        yield f"output {name} holds a secret"
    for resource in stack.aws:
        for name in resource.secrets:
            if (resource.type, name) not in {
                ("aws:secretsmanager/secretVersion:SecretVersion", "secretString"),
                ("aws:mq/broker:Broker", "users"),
            }:
                yield f"{resource.name}.{name} holds a secret"
    # Conversely, no secret is in an output or input that is not marked as secret.
    drawn = {json.loads(text)["password"] if text.startswith("{") else text for text in _drawn(stack)}
    written = json.dumps(
        [stack.outputs, *({k: v for k, v in r.inputs.items() if k not in r.secrets} for r in stack.resources)]
    )
    for secret in drawn:
        if secret in written or len(secret) < 40:
            yield "a secret is in plain text, or is shorter than 40 characters"
    for version in stack.all("aws:secretsmanager/secretVersion:SecretVersion"):
        # A write-only argument is null in the state after a refresh, and then the provider refuses the next update.
        if any(name.startswith("secretStringWo") for name in version.inputs):
            yield f"{version.name} would be lost by a refresh"
        if "secretString" not in version.secrets or "secretString" not in version.ignored:
            yield f"{version.name} is no secret, or is generated again by each run"
    for user in stack.all("aws:elasticache/user:User"):
        if user.inputs["authenticationMode"] != {"type": "iam"}:
            yield f"{user.name} has a password"
    for database in stack.all("aws:rds/instance:Instance") + stack.all("aws:rds/cluster:Cluster"):
        if (
            not database.inputs.get("manageMasterUserPassword")
            or {"password", "masterPassword"} & database.inputs.keys()
        ):
            yield f"{database.name} has a password that RDS does not manage"


@rule
def prod_keeps_and_the_others_leave_nothing(stack: Recording, config: StackConfig) -> Iterator[str]:
    keeps = config.stage == "prod"
    for resource in stack.resources:
        if resource.protect != (keeps and protected(resource, config)):
            yield f"{resource.name} is{'' if resource.protect else ' not'} protected"
        # The settings that protect the data of a bucket are retained as long as the data.
        holds = resource.type in DATA or (resource.type.startswith("aws:s3/bucket") and resource.type != OF_PAGES)
        if resource.retain != (keeps and holds):
            yield f"{resource.name} is{'' if resource.retain else ' not'} retained"
    versions = {each.name.rpartition("-")[2]: each for each in stack.all(VERSION) if "-token-" in each.name}
    before = f"{config.token_generation - 1}"
    if config.auth == "token" and (before in versions) != (keeps and config.token_generation > 1):
        yield f"the token before is{'' if before in versions else ' not'} there"
    for number, version in versions.items():
        current = number == f"{config.token_generation}"
        if ("AWSCURRENT" in version.inputs["versionStages"]) != current:
            yield f"{version.name} takes the wrong label"
        if not current and versions[f"{config.token_generation}"].urn not in version.depends[""]:
            yield f"{version.name} may be made before the current one, and then is the current one"
    for bucket in stack.all("aws:s3/bucket:Bucket"):
        if bucket.inputs["forceDestroy"] is keeps:
            yield f"{bucket.name} is{'' if keeps else ' not'} emptied when it is destroyed"
    for secret in stack.all("aws:secretsmanager/secret:Secret"):
        if secret.inputs["recoveryWindowInDays"] != (30 if keeps else 0):
            yield f"{secret.name} stays for {secret.inputs['recoveryWindowInDays']} days"


@rule
def all_is_tagged_watched_and_budgeted(stack: Recording, config: StackConfig) -> Iterator[str]:
    for resource in stack.aws:
        if hasattr(resource_class(resource.type), "tags"):
            tags = resource.inputs.get("tags", {})
            if not tags.items() >= {"crudstack:stage": config.stage, **config.tags}.items():
                yield f"{resource.name} has the tags {tags}"
    alarms = stack.all("aws:cloudwatch/metricAlarm:MetricAlarm")
    namespaces = {alarm.inputs["namespace"] for alarm in alarms}
    for group in stack.all("aws:elasticache/replicationGroup:ReplicationGroup"):
        # CloudWatch has this metric for nodes, which are named after their group, and not for groups.
        known = [each for each in alarms if group.urn in each.depends.get("dimensions", ())]
        nodes = [each.inputs["dimensions"].get("CacheClusterId", "")[-4:] for each in known]
        if nodes != [f"-00{number}" for number in range(1, group.inputs["numCacheClusters"] + 1)]:
            yield f"of {group.name} the nodes {nodes} are watched"
    for need, namespace in {"postgres": "AWS/RDS", "cache": "AWS/ElastiCache", "broker": "AWS/AmazonMQ"}.items():
        if (namespace in namespaces) != (need in config.servers):
            yield f"{namespace} is{'' if namespace in namespaces else ' not'} watched"
    watched = {alarm.inputs["metricName"] for alarm in alarms}
    for metric in ("Errors", "Throttles", "Duration", "5xx" if config.edge == "http-api" else "Url5xxCount"):
        if metric not in watched:
            yield f"{metric} is not watched"
    topic = stack.one("aws:sns/topic:Topic")
    for alarm in alarms:
        if topic.urn not in alarm.depends.get("alarmActions", ()):
            yield f"{alarm.name} does not notify the topic"
    if bool(stack.all("aws:sns/topicSubscription:TopicSubscription")) != (config.alarm_email is not None):
        yield "no address receives the alarms"
    budgets = [
        (each.inputs["limitAmount"], each.inputs["notifications"][0]["subscriberEmailAddresses"])
        for each in stack.all("aws:budgets/budget:Budget")
    ]
    if budgets != ([(f"{config.budget_usd:.2f}", [config.alarm_email])] if config.budget_usd else []):
        yield f"the budgets are {budgets}"


def _given(stack: Recording) -> str:
    return environment(stack.one("aws:lambda/function:Function", "-api"))["CRUDSTACK_OUTPUTS"]


def _drawn(stack: Recording) -> list[Any]:
    return [each.inputs["secretString"] for each in stack.all("aws:secretsmanager/secretVersion:SecretVersion")]
