"""The components of a stack. Each module has one component: a few AWS resources that belong together.

broker           RabbitMQ on Amazon MQ
bucket           the bucket that holds the data
cache            Valkey on ElastiCache
function         functions on Lambda, with their roles and logs
http_api         the entry points of requests: an HTTP API or a function URL
network          a private network for database, cache and broker
observability    alarms and a budget
postgres         PostgreSQL on RDS
token            the API token

The class name of a component is part of its type in Pulumi, `crudstack:aws:{class}`, and so of the URNs of its
resources. If a class is renamed, Pulumi replaces the resources, with their data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pulumi
from pulumi import ResourceOptions, ResourceTransformationArgs, ResourceTransformationResult

Transform = Callable[[ResourceTransformationArgs], ResourceTransformationResult | None]
"""Changes the arguments and options of a component's resources before they are registered, if the component has no
argument for it.

>>> def larger(resource):
...     if resource.type_ == "aws:rds/instance:Instance":
...         return ResourceTransformationResult({**resource.props, "iops": 3000}, resource.opts)
"""


class StackContext(NamedTuple):
    """The settings that all components of a stack share."""

    name: str
    """The prefix of the names of all resources, such as "crudstack-dev", of at most 26 characters. Pulumi appends
    random characters to the names."""
    is_protected: bool
    """Whether the data is protected from deletion by mistake. If not, `pulumi destroy` deletes everything."""
    tags: Mapping[str, str]
    transforms: Mapping[str, Transform] = {}
    """By the class name of the component, such as {"Postgres": larger}."""


class Component(pulumi.ComponentResource):
    """A ComponentResource of type crudstack:aws:{class}. Its resources have the tags and transforms of the stack."""

    def __init__(self, context: StackContext, name: str, opts: ResourceOptions | None = None) -> None:
        self.context = context
        kind = type(self).__name__
        transforms = [_tagging(context.tags)]
        if kind in context.transforms:
            transforms.append(context.transforms[kind])
        # `transformations` and not `transforms`, which need an engine that calls the program back.
        own = ResourceOptions(transformations=transforms)
        super().__init__(f"crudstack:aws:{kind}", name, None, ResourceOptions.merge(opts, own))

    def resource_name(self, suffix: str) -> str:
        """Return the name of a resource of the component in the program."""
        return f"{self.context.name}-{suffix}"

    def child_options(self, **options: Any) -> ResourceOptions:
        """Return the options of a resource of the component."""
        return ResourceOptions(parent=self, **options)

    def protected_options(self, **options: Any) -> ResourceOptions:
        """Return the options of a resource that data, the URL or the token depend on.

        In a protected stack Pulumi refuses to delete it.
        """
        return self.child_options(protect=self.context.is_protected, **options)

    def data_options(self, **options: Any) -> ResourceOptions:
        """Return the options of a resource that holds data.

        In a protected stack Pulumi refuses to delete it, and it stays on AWS if it is removed from the state.
        """
        return self.protected_options(retain_on_delete=self.context.is_protected, **options)


def _tagging(tags: Mapping[str, str]) -> Transform:
    def tagged(resource: ResourceTransformationArgs) -> ResourceTransformationResult | None:
        if not hasattr(type(resource.resource), "tags"):
            return None
        given: Any = resource.props.get("tags") or {}
        return ResourceTransformationResult({**resource.props, "tags": {**tags, **given}}, resource.opts)

    return tagged
