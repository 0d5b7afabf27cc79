"""Constraints that the SDK's types do not express: those of the provider's validators, and some of AWS.

Each function yields pairs of a property and the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.engine.aws_types import Properties

TAG = re.compile(r"[\w .:/=+@-]*")


def refused(type_: str, given: Properties) -> Iterator[tuple[str, str]]:
    """Yield violations of constraints among arguments and of the validators' patterns."""
    yield from _tags(given.get("tags") or {})
    match type_.rpartition(":")[2]:
        case "SecretVersion":
            # RequiredWith in both directions, ConflictsWith: secretsmanager/secret_version.go
            if (given.get("secretStringWo") is None) != (given.get("secretStringWoVersion") is None):
                both = "all of `secret_string_wo,secret_string_wo_version` must be specified"
                yield "secretStringWoVersion", f'"secret_string_wo": {both}'
            contents = [name for name in ("secretString", "secretStringWo", "secretBinary") if given.get(name)]
            if len(contents) > 1:
                yield contents[1], f'"{contents[0]}": conflicts with {contents[1]}'
        case "Broker":
            for user in given.get("users") or []:
                yield from _broker_password(user)
            if str(given.get("engineVersion", "")).startswith("4") and not str(
                given.get("hostInstanceType", "")
            ).startswith("mq.m7g"):
                yield "hostInstanceType", f"{given.get('hostInstanceType')} does not run RabbitMQ 4"
        case "Certificate" if len(str(given.get("domainName", ""))) > 64:
            yield "domainName", "the first domain name can have at most 64 characters"
        case "User" if (given.get("authenticationMode") or {}).get("type") == "iam":
            if given.get("userId") != given.get("userName"):
                yield "userName", "must be equal to the user id for users with IAM authentication"
        case "Integration" if not 50 <= int(given.get("timeoutMilliseconds", 30000)) <= 30000:
            yield "timeoutMilliseconds", "expected to be in the range (50 - 30000)"


def _tags(tags: Properties) -> Iterator[tuple[str, str]]:
    if len(tags) > 50:
        yield "tags", f"{len(tags)} tags; AWS takes 50 at most"
    for name, value in tags.items():
        if not 1 <= len(name) <= 128 or name.lower().startswith("aws:") or not TAG.fullmatch(name):
            yield "tags", f"{name!r} is no name of a tag"
        if len(str(value)) > 256 or not TAG.fullmatch(str(value)):
            yield "tags", f"{value!r} is no value of a tag"


def _broker_password(user: Properties) -> Iterator[tuple[str, str]]:
    """Apply ValidBrokerPassword of mq/broker.go: 12 to 250 characters, 4 different ones, none of ",:="."""
    password = user.get("password")
    if (
        not isinstance(password, str)
        or not 12 <= len(password) <= 250
        or len(set(password)) < 4
        or set(",:=") & {*password}
    ):
        yield "users", "the password must have 12 to 250 characters, 4 of them different, and none of ,:="
