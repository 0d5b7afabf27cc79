"""How large the environment of a function can become, known from the config before anything is made.

Lambda measures all variables of a function together, as compact JSON in which the quotes of our JSON are escaped. The
only function with variables is the one that answers requests: `test_environment.py` keeps `outputs_at_worst` in step
with what the program gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from app.settings import JwtAuth

if TYPE_CHECKING:
    from infra.config import StackConfig

LIMIT = 4096
"""Bytes that Lambda takes."""
VARIABLE = "CRUDSTACK_OUTPUTS"
_REGION = "r" * 20
"""The longest names so far have 15 characters."""
_BUCKET = "b" * 63
_ENDING = ".amazonaws.com.cn"
_DB_HOST = f"{'d' * 63}.cluster-{'h' * 12}.{_REGION}.rds{_ENDING}"
_CACHE = "c" * 40
_CACHE_HOST = f"{_CACHE}-{'h' * 6}.serverless.{_REGION}.cache{_ENDING}"
_BROKER = f"amqps://b-{'u' * 36}.mq.{_REGION}{_ENDING}:5671"


def said(config: StackConfig) -> dict[str, Any]:
    """Return what the outputs repeat of the config."""
    storage = {"storage": config.storage, "storage_overrides": config.storage_overrides}
    base = {"base_path": config.domain.base_path} if config.domain is not None and config.domain.base_path else {}
    return {"version": 1, **msgspec.to_builtins(storage), "stage": config.stage, "cors": config.cors, **base}


def outputs_at_worst(config: StackConfig) -> dict[str, Any]:
    """Return the outputs that the function is told, with the longest values that AWS may fill in."""
    auth: Any = {"mode": "none"}
    if isinstance(config.auth, JwtAuth):
        auth = msgspec.to_builtins(config.auth)
    elif config.auth == "token":
        auth = {"mode": "token", "token_sha256": "f" * 64}
    outputs = {**said(config), "auth": auth, "bucket": _BUCKET, "prefix": "", "region": _REGION}
    if "postgres" in config.servers:
        outputs["db"] = {"host": _DB_HOST, "port": 5432, "name": "crudstack", "user": "crudstack_app", "auth": "iam"}
    if "cache" in config.servers:
        names = {"host": _CACHE_HOST, "port": 6379, "user": _BUCKET, "tls": True, "name": _CACHE}
        outputs["cache"] = {**names, "serverless": False}
    if "broker" in config.servers:
        secret = f"arn:aws-us-gov:secretsmanager:{_REGION}:{'1' * 12}:secret:crudstack-{config.stage}-broker-{'h' * 14}"
        outputs["broker"] = {"endpoint": _BROKER, "secret_arn": secret}
    return outputs


def size(variables: Mapping[str, str]) -> int:
    """Return the bytes that Lambda counts for these variables."""
    return len(json.dumps(dict(variables), separators=(",", ":"), ensure_ascii=False).encode())


def size_at_worst(config: StackConfig) -> int:
    return size({VARIABLE: json.dumps(outputs_at_worst(config))})


def parts(config: StackConfig) -> dict[str, int]:
    """Return the bytes of the settings that have no limit of their own, the largest first."""
    given = {"storage_overrides": config.storage_overrides, "cors": config.cors}
    if isinstance(config.auth, JwtAuth):
        given["auth"] = msgspec.to_builtins(config.auth)
    if config.domain is not None and config.domain.base_path:
        given["domain"] = config.domain.base_path
    # Quotes around the inner text, twice, are not part of it.
    sizes = {key: len(json.dumps(json.dumps(msgspec.to_builtins(value)))) - 2 for key, value in given.items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
