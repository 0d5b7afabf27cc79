"""Values as Pulumi's engine and a provider exchange them: envelopes of secrets, unknown values, and files."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format, struct_pb2
from pulumi.runtime import rpc

UNKNOWN = rpc.UNKNOWN
"""Stands for a value that is not known before an update."""
FILES = (rpc._special_asset_sig, rpc._special_archive_sig)


def to_struct(value: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(value, struct_pb2.Struct())


def from_struct(message: struct_pb2.Struct) -> dict[str, Any]:
    return json_format.MessageToDict(message)


def opened(value: Any) -> Any:
    """Return a value without the envelopes of secrets, and with whole numbers as int."""
    if isinstance(value, dict):
        if value.get(rpc._special_sig_key) == rpc._special_secret_sig:
            return opened(value["value"])
        return {name: opened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [opened(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def secret(value: Any) -> dict[str, Any]:
    """Return a value in the envelope of a secret: the engine encrypts it in the state."""
    return {rpc._special_sig_key: rpc._special_secret_sig, "value": value}


def has_unknown(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_unknown, value.values()))
    return any(map(has_unknown, value)) if isinstance(value, list) else value == UNKNOWN


def comparable(value: Any) -> Any:
    """Return an opened value in which a file is the hash of its content."""
    if isinstance(value, dict):
        if value.get(rpc._special_sig_key) in FILES:
            return value.get("hash")
        return {name: comparable(item) for name, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, list) else value
