"""The SDK's class of each type of resource. The SDK imports a service, up to 0.5 s, when it is used first."""

from __future__ import annotations

import warnings

import pulumi_aws as aws

SERVICES = "acm apigatewayv2 budgets cloudwatch ec2 elasticache iam lambda_ mq rds route53 s3 secretsmanager sns vpc"


def load_services() -> None:
    """Import all services that the program uses, without the SDK's warnings of deprecated names in its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for service in SERVICES.split():
            getattr(getattr(aws, service), "anything", None)


def resource_class(token: str) -> type:
    """Return the SDK's class of a type such as "aws:s3/bucket:Bucket"."""
    module, name = token.partition(":")[2].partition("/")[0], token.rpartition(":")[2]
    found: type = getattr(getattr(aws, {"lambda": "lambda_"}.get(module, module)), name)
    return found
