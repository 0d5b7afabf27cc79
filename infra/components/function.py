"""Functions on Lambda. They run the zip that artifact.py builds. Their roles have the permissions of their grants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pulumi
import pulumi_aws as aws
from pulumi import Input, Output

from infra.components import Component, StackContext
from infra.components.network import Network
from infra.deployed_code import Package
from infra.grants import Grant, Statement, policy, trust

TRACING = Statement("Trace", ("xray:PutTraceSegments", "xray:PutTelemetryRecords"), ("*",))
"""X-Ray has no permissions for single resources."""


class Function(Component):
    """A function for Python 3.13 on arm64, with JSON logs in its own log group, traced by X-Ray.

    name            part of the names of its resources
    zip             the zip of the app
    handler         the handler in the zip, such as "app.handler.handler"
    grants          the permissions, addresses and ports that the function gets
    network         the network that the function runs in; required if a grant has a port
    environment     all variables of the function
    memory_mb       memory in MB
    ephemeral_mb    size of /tmp in MB
    timeout_s       seconds after which Lambda ends an invocation
    concurrency     the largest number of instances, reserved from the account's quota; None: only the quota limits it
    snap_start      whether instances start from a snapshot
    log_days        days that the logs are kept
    has_url         whether the function has its own URL, which clients know and which is lost with the function

    Outputs: `name`, `arn`.
    """

    def __init__(
        self,
        context: StackContext,
        name: str,
        *,
        zip: Package,
        handler: str,
        grants: Sequence[Grant] = (),
        network: Network | None = None,
        environment: Mapping[str, Input[str]] | None = None,
        memory_mb: int = 512,
        ephemeral_mb: int = 512,
        timeout_s: int = 29,
        concurrency: int | None = None,
        snap_start: bool = False,
        log_days: int = 30,
        has_url: bool = False,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__(context, name, opts)
        options = self.protected_options if has_url else self.child_options
        logs = aws.cloudwatch.LogGroup(self.resource_name(name), retention_in_days=log_days, opts=self.child_options())
        role = aws.iam.Role(
            self.resource_name(name), assume_role_policy=trust("lambda.amazonaws.com"), opts=self.child_options()
        )
        write = Statement(
            "Log", ("logs:CreateLogStream", "logs:PutLogEvents"), (Output.format("{0}:log-stream:*", logs.arn),)
        )
        allowed = aws.iam.RolePolicy(
            self.resource_name(name),
            role=role.name,
            policy=policy([write, TRACING, *(statement for grant in grants for statement in grant.statements)]),
            opts=self.child_options(),
        )
        granted: list[pulumi.Resource] = [allowed]
        group = None
        if network is not None:
            # A separate policy, which is deleted after the security group: Lambda removes its network interfaces with
            # the permissions of the function, some minutes after the function was deleted or has left the network.
            inside = aws.iam.RolePolicy(
                self.resource_name(f"{name}-network"),
                role=role.name,
                policy=policy(network.grant().statements),
                opts=self.child_options(),
            )
            granted.append(inside)
            group = self._group(name, grants, network, inside)
        function = aws.lambda_.Function(
            self.resource_name(name),
            role=role.arn,
            runtime="python3.13",
            architectures=["arm64"],
            handler=handler,
            code=pulumi.FileArchive(zip.path),
            source_code_hash=zip.contents,
            memory_size=memory_mb,
            timeout=timeout_s,
            ephemeral_storage={"size": ephemeral_mb},
            reserved_concurrent_executions=concurrency,
            environment={"variables": environment} if environment else None,
            logging_config={"log_format": "JSON", "log_group": logs.name},
            tracing_config={"mode": "Active"},
            snap_start={"apply_on": "PublishedVersions"} if snap_start else None,
            vpc_config={"subnet_ids": network.subnet_ids, "security_group_ids": [group.id]}
            if network and group
            else None,
            publish=True,
            # Lambda checks the role when it creates the function.
            opts=options(depends_on=granted, ignore_changes=zip.ignored(self.resource_name(name))),
        )
        self.function, self.name, self.arn = function, function.name, function.arn
        self.register_outputs({"name": self.name, "arn": self.arn})

    def _group(
        self, name: str, grants: Sequence[Grant], network: Network, inside: pulumi.Resource
    ) -> aws.ec2.SecurityGroup:
        """Create the security group of the function, which may reach the ports of the grants and S3."""
        group = network.security_group(self, name, "the function", depends_on=[inside])
        if any("bucket" in grant.outputs for grant in grants):
            network.allow_s3(self, name, group.id)
        for access in (access for grant in grants for access in grant.ports):
            network.allow_port(self, name, group.id, access)
        return group

    def invoke_grant(self) -> Grant:
        """Return a grant to invoke the function."""
        return Grant(statements=(Statement("Invoke", ("lambda:InvokeFunction",), (self.arn,)),))


class ApiFunction(Function):
    """The function that answers requests and does the housekeeping every hour. An alias names its newest version.

    It has the arguments of Function. Outputs: `name`, `arn` and `alias`.
    """

    def __init__(self, context: StackContext, name: str, **arguments: Any) -> None:
        super().__init__(context, name, **arguments)
        options = self.protected_options if arguments.get("has_url") else self.child_options
        self.alias = aws.lambda_.Alias(
            self.resource_name(name),
            name="live",
            function_name=self.name,
            function_version=self.function.version,
            opts=options(),
        )
        hourly = aws.cloudwatch.EventRule(
            self.resource_name("maintain"),
            description="Housekeeping of the stores",
            schedule_expression="rate(1 hour)",
            opts=self.child_options(),
        )
        allowed = aws.lambda_.Permission(
            self.resource_name("maintain"),
            action="lambda:InvokeFunction",
            function=self.name,
            qualifier=self.alias.name,
            principal="events.amazonaws.com",
            source_arn=hourly.arn,
            opts=self.child_options(),
        )
        aws.cloudwatch.EventTarget(
            self.resource_name("maintain"),
            rule=hourly.name,
            arn=self.alias.arn,
            input='{"crudstack": "maintain"}',
            opts=self.child_options(depends_on=[allowed]),
        )
