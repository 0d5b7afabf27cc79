"""Grants: the permissions, addresses and open ports that a component gives to a function.

A component that a function uses has a method `grant`. A function takes grants and gets nothing else: the policy of its
role has the statements of all grants, its environment the outputs, and its security group may reach the ports.

>>> bucket.grant("write", prefix="data/")
Grant(statements=(Statement("ListData", ...), ...), outputs={"bucket": ..., "prefix": "data/", "region": ...}, ports=())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pulumi import Input, Output


class Statement(NamedTuple):
    """A statement of an IAM policy."""

    sid: str
    """Letters and digits, unique among the grants of a function."""
    actions: Sequence[str]
    resources: Sequence[Input[str]]
    """ARNs."""
    condition: Mapping[str, Mapping[str, Any]] | None = None


class PortAccess(NamedTuple):
    """Access to a port of the members of a security group, for the function that has the grant."""

    name: str
    """Part of the names of the rules, unique among the grants of a function."""
    security_group: Input[str]
    """The id of the security group of the server."""
    port: int


@dataclass(frozen=True, kw_only=True)
class Grant:
    """The permissions, addresses and open ports that a function gets to use a component."""

    statements: tuple[Statement, ...] = ()
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Fields of app.settings.StackOutputs: names and addresses, never a secret. Values may be Outputs."""
    ports: tuple[PortAccess, ...] = ()


def policy(statements: Iterable[Statement]) -> Output[str]:
    """Return a policy document that allows these statements."""
    return Output.json_dumps(
        {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Sid": statement.sid,
                    "Effect": "Allow",
                    "Action": list(statement.actions),
                    "Resource": list(statement.resources),
                    **({"Condition": statement.condition} if statement.condition else {}),
                }
                for statement in statements
            ],
        }
    )


def trust(service: str) -> str:
    """Return a policy document that lets an AWS service assume a role.

    service    the principal of the service, such as "lambda.amazonaws.com"
    """
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}],
        }
    )


def first(items: Output[Any], pick: Callable[[Any], Any]) -> Output[Any]:
    """Return what `pick` finds in the first item of a list that AWS fills in; None if the list is empty or unknown."""
    return items.apply(lambda found: pick(found[0]) if found else None)
