"""What stacks are made of: a component to a file, each a handful of AWS resources with their relations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pulumi
from pulumi import ResourceOptions, ResourceTransformationArgs, ResourceTransformationResult

Transform = Callable[[ResourceTransformationArgs], ResourceTransformationResult | None]
"""Changes arguments and options of a component's resources before they are registered: the way out where a component has no argument.

>>> def larger(resource):
...     if resource.type_ == "aws:rds/instance:Instance":
...         return ResourceTransformationResult({**resource.props, "iops": 3000}, resource.opts)
"""


class StackContext(NamedTuple):
    """What all components of a stack have in common."""

    name: str
    """What the names of its resources begin with, "crudstack-dev"; at most 26 characters. Pulumi appends random ones."""
    is_protected: bool
    """Whether data outlives mistakes. If not, `pulumi destroy` leaves nothing behind."""
    tags: Mapping[str, str]
    transforms: Mapping[str, Transform] = {}
    """By the class of the component: {"Postgres": larger}."""


class Component(pulumi.ComponentResource):
    """A ComponentResource of type crudstack:aws:{class}, whose resources are tagged and transformed as the stack says."""

    def __init__(self, context: StackContext, name: str, opts: ResourceOptions | None = None) -> None:
        self.context = context
        kind = type(self).__name__
        transforms = [_tagging(context.tags)]
        if kind in context.transforms:
            transforms.append(context.transforms[kind])
        # Not `transforms`: those need an engine that calls back.
        own = ResourceOptions(transformations=transforms)
        super().__init__(f"crudstack:aws:{kind}", name, None, ResourceOptions.merge(opts, own))

    def resource_name(self, suffix: str) -> str:
        """The name of one of its resources."""
        return f"{self.context.name}-{suffix}"

    def child_options(self, **options: Any) -> ResourceOptions:
        """Options of one of its resources."""
        return ResourceOptions(parent=self, **options)

    def protected_options(self, **options: Any) -> ResourceOptions:
        """Options of a resource that data, the URL or the token cannot do without: Pulumi refuses to delete it."""
        return self.child_options(protect=self.context.is_protected, **options)

    def data_options(self, **options: Any) -> ResourceOptions:
        """Options of a resource that holds data: kept, and if Pulumi must forget it, it stays on AWS."""
        return self.protected_options(retain_on_delete=self.context.is_protected, **options)


def _tagging(tags: Mapping[str, str]) -> Transform:
    def tagged(resource: ResourceTransformationArgs) -> ResourceTransformationResult | None:
        if not hasattr(type(resource.resource), "tags"):
            return None
        given: Any = resource.props.get("tags") or {}
        return ResourceTransformationResult({**resource.props, "tags": {**tags, **given}}, resource.opts)

    return tagged
