"""The size of a function's environment, computed from the config before anything is created.

Lambda limits the sum of all variables of a function, as compact JSON in which the quotes of our JSON are escaped. The
only function with variables is the one that answers requests. `tests/infra/test_environment.py` compares
`largest_values` with the values that the program gives that function.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

LIMIT = 4096
"""Bytes that Lambda allows."""
VARIABLE = "CRUDSTACK_OUTPUTS"
_REGION = "r" * 20
"""The longest names so far have 15 characters."""
_BUCKET = "b" * 63
_ENDING = ".amazonaws.com.cn"
_DB_HOST = f"{'d' * 63}.cluster-{'h' * 12}.{_REGION}.rds{_ENDING}"
_CACHE = "c" * 40
_CACHE_HOST = f"{_CACHE}-{'h' * 6}.serverless.{_REGION}.cache{_ENDING}"
_BROKER = f"amqps://b-{'u' * 36}.mq.{_REGION}{_ENDING}:5671"


def largest_values(stage: str, servers: Collection[str]) -> dict[str, Any]:
    """Return the outputs that AWS fills in, with the longest values that they may have."""
    outputs: dict[str, Any] = {"bucket": _BUCKET, "prefix": "", "region": _REGION}
    if "postgres" in servers:
        outputs["db"] = {"host": _DB_HOST, "port": 5432, "name": "crudstack", "user": "crudstack_app", "auth": "iam"}
    if "cache" in servers:
        names = {"host": _CACHE_HOST, "port": 6379, "user": _BUCKET, "tls": True, "name": _CACHE}
        outputs["cache"] = {**names, "serverless": False}
    if "broker" in servers:
        secret = f"arn:aws-us-gov:secretsmanager:{_REGION}:{'1' * 12}:secret:crudstack-{stage}-broker-{'h' * 14}"
        outputs["broker"] = {"endpoint": _BROKER, "secret_arn": secret}
    return outputs


def size(variables: Mapping[str, str]) -> int:
    """Return the bytes that Lambda counts for these variables."""
    return len(json.dumps(dict(variables), separators=(",", ":"), ensure_ascii=False).encode())


def size_of_outputs(outputs: Mapping[str, Any]) -> int:
    """Return the bytes that Lambda counts for the variable that holds these outputs."""
    return size({VARIABLE: json.dumps(outputs)})


def sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that each of these settings takes in the environment, the largest first."""
    # The text is quoted twice, and the outer quotes are not part of it.
    found = {key: len(json.dumps(json.dumps(msgspec.to_builtins(value)))) - 2 for key, value in settings.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
