"""What one component lets another do.

A component that offers something has methods that return Links; ApiFunction takes Links and gets what they say, nothing else: its role is the
sum of their statements, its environment the sum of their outputs, its security group the sum of their doors.

>>> bucket.link("write", prefix="data/")
Link(statements=(Statement("ListData", ...), ...), outputs={"bucket": ..., "prefix": "data/", "region": ...}, doors=())
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
    """Letters and digits, unique among the links of a function."""
    actions: Sequence[str]
    resources: Sequence[Input[str]]
    """ARNs."""
    condition: Mapping[str, Mapping[str, Any]] | None = None


class Door(NamedTuple):
    """A port of a security group that whoever holds the link may reach; the group lets it in."""

    name: str
    """Unique among the links of a function."""
    group: Input[str]
    """Id of the security group that what is reached is in."""
    port: int


@dataclass(frozen=True, kw_only=True)
class Link:
    statements: tuple[Statement, ...] = ()
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Fields of app.settings.StackOutputs, in which values may be Outputs: where it is and what it is called, never a secret."""
    doors: tuple[Door, ...] = ()


def policy(statements: Iterable[Statement]) -> Output[str]:
    """The policy document that allows these."""
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
    """The document that lets an AWS service, "lambda.amazonaws.com" for one, take a role."""
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}],
        }
    )


def first(items: Output[Any], pick: Callable[[Any], Any]) -> Output[Any]:
    """Something of the first item of a list that AWS fills in; None while there is none."""
    return items.apply(lambda found: pick(found[0]) if found else None)
