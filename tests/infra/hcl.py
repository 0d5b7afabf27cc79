"""Prints a recording in the language of Terraform, for tools that read it.

Pulumi's AWS provider is built from Terraform's, so both have the same resources and arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pulumi.runtime import rpc

if TYPE_CHECKING:
    from tests.infra.recorder import Recording, Resource

IRREGULAR = {
    "aws:apigatewayv2/domainName:DomainName": "aws_apigatewayv2_domain_name",
    "aws:cloudwatch/eventRule:EventRule": "aws_cloudwatch_event_rule",
    "aws:cloudwatch/eventTarget:EventTarget": "aws_cloudwatch_event_target",
    "aws:cloudwatch/logGroup:LogGroup": "aws_cloudwatch_log_group",
    "aws:cloudwatch/metricAlarm:MetricAlarm": "aws_cloudwatch_metric_alarm",
    "aws:rds/instance:Instance": "aws_db_instance",
    "aws:rds/parameterGroup:ParameterGroup": "aws_db_parameter_group",
    "aws:rds/proxy:Proxy": "aws_db_proxy",
    "aws:rds/proxyDefaultTargetGroup:ProxyDefaultTargetGroup": "aws_db_proxy_default_target_group",
    "aws:rds/proxyTarget:ProxyTarget": "aws_db_proxy_target",
    "aws:rds/subnetGroup:SubnetGroup": "aws_db_subnet_group",
    "aws:rds/clusterParameterGroup:ClusterParameterGroup": "aws_rds_cluster_parameter_group",
}
"""Types whose Terraform name does not follow from Pulumi's name."""
RENAMED = {
    ("aws_lambda_function", "code"): "filename",
    ("aws_lambda_function", "name"): "function_name",
    ("aws_lambda_permission", "function"): "function_name",
    ("aws_cloudwatch_metric_alarm", "name"): "alarm_name",
    ("aws_sns_topic_subscription", "topic"): "topic_arn",
}
"""Arguments whose names differ between Pulumi and Terraform."""
SINGULAR = {
    "rules": "rule",
    "parameters": "parameter",
    "users": "user",
    "aliases": "alias",
    "notifications": "notification",
    "audiences": "audience",
    "ecpu_per_seconds": "ecpu_per_second",
}
"""Lists that have a singular name in Terraform, such as lists that are written as one block for each item."""
NAMED = {
    "aws_apigatewayv2_api": "name",
    "aws_apigatewayv2_authorizer": "name",
    "aws_cloudwatch_metric_alarm": "alarm_name",
    "aws_db_proxy": "name",
    "aws_elasticache_replication_group": "replication_group_id",
    "aws_elasticache_serverless_cache": "name",
    "aws_elasticache_subnet_group": "name",
    "aws_lambda_function": "function_name",
    "aws_mq_broker": "broker_name",
}
"""The argument that Terraform requires and that Pulumi makes from the logical name."""
MAPS = {"tags", "variables", "dimensions"}
"""Arguments whose dict is a value. All other dicts are printed as blocks."""


def terraform_type(token: str) -> str:
    """Return Terraform's name of a type: "aws_s3_bucket" for "aws:s3/bucket:Bucket"."""
    if token in IRREGULAR:
        return IRREGULAR[token]
    module = token.partition(":")[2].partition("/")[0]
    name = snake_case(token.rpartition(":")[2])
    if module == "ec2":
        return f"aws_{name}"
    return f"aws_{module}_{name}"


def printed(stack: Recording) -> str:
    """Print all AWS resources. A fixed word replaces each secret."""
    return "\n".join(_resource(resource) for resource in stack.aws)


def attribute(kind: str, name: str) -> str:
    """Return Terraform's name of an argument or output that Pulumi's Python SDK calls `name`."""
    return RENAMED.get((kind, name)) or SINGULAR.get(name, name)


def _resource(resource: Resource) -> str:
    kind = terraform_type(resource.type)
    inputs = {name: _hidden(value) if name in resource.secrets else value for name, value in resource.inputs.items()}
    name = [f'  {NAMED[kind]} = "{resource.name}"'] if kind in NAMED else []
    return "\n".join([f'resource "{kind}" "{resource.name}" {{', *name, *_body(kind, inputs, "  "), "}\n"])


def _body(kind: str, inputs: dict[str, Any], indent: str) -> Iterator[str]:
    for wire, value in inputs.items():
        name = attribute(kind, snake_case(wire))
        if isinstance(value, dict) and rpc._special_sig_key in value:
            yield f"{indent}{name} = {json.dumps(value['path'])}"
            continue
        blocks = value if isinstance(value, list) else [value]
        if name in MAPS or not blocks or not all(isinstance(block, dict) for block in blocks):
            if value != []:
                yield f"{indent}{name} = {_value(value, indent)}"
            continue
        for block in blocks:
            yield f"{indent}{name} {{"
            yield from _body("", block, indent + "  ")
            yield f"{indent}}}"


def _value(value: Any, indent: str) -> str:
    if isinstance(value, dict):
        items = "".join(
            f"{indent}  {json.dumps(name)} = {_value(item, indent + '  ')}\n" for name, item in value.items()
        )
        return f"{{\n{items}{indent}}}"
    if isinstance(value, list):
        return f"[{', '.join(_value(item, indent) for item in value)}]"
    if isinstance(value, str) and (only := re.fullmatch(r"\$\{([^{}]+)\}", value)):
        return only[1]
    return json.dumps(value).replace("%{", "%%{")


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item) if name != "username" else item for name, item in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list) else "hidden-hidden-hidden"


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
