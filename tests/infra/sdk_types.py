"""Compares recorded arguments with the argument classes of the SDK.

The recorder itself accepts everything, such as `memory_size="x"` and misspelled names.
"""

from __future__ import annotations

import enum
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pulumi
from pulumi import _types
from pulumi.runtime import rpc

from tests.infra.sdk_classes import resource_class

if TYPE_CHECKING:
    from tests.infra.recorder import Resource

ASSETS = (rpc._special_asset_sig, rpc._special_archive_sig)


def findings(resource: Resource) -> list[str]:
    """Return one sentence for each argument of a resource that does not fit the SDK's class."""
    return [f"{resource.name}: {finding}" for finding in argument_errors(resource.type, resource.inputs)]


def argument_errors(type_: str, inputs: dict[str, Any]) -> list[str]:
    """Return one sentence for each argument that does not fit the SDK's class of a type. Unknown values always fit."""
    cls = resource_class(type_)
    module = sys.modules[cls.__module__]
    # If both classes exist, the constructor takes the first one.
    arguments = getattr(module, f"{cls.__name__}InitArgs", None) or getattr(module, f"{cls.__name__}Args")
    return list(_object(inputs, arguments, type_))


def _object(value: Any, cls: type, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} is {value!r}, expected {cls.__name__}"
        return
    names = _types.input_type_py_to_pulumi_names(cls)
    types = _types.input_type_types(cls)
    for name in value:
        if name not in types:
            yield f"{path} has no {name}"
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name != "__self__" and parameter.default is inspect.Parameter.empty and names[name] not in value:
            yield f"{path} lacks {names[name]}"
    for name, type_ in types.items():
        if name in value:
            yield from _check(value[name], type_, f"{path}.{name}")


def _check(value: Any, type_: Any, path: str) -> Iterator[str]:
    type_ = _types.unwrap_optional_type(type_)
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if type_ is Any or value == rpc.UNKNOWN:
        return
    if origin is typing.Union:
        # The union has also futures, outputs and dicts of the same type; only the type itself is checked.
        arguments = [
            each
            for each in arguments
            if _types.is_input_type(each)
            or (
                inspect.isclass(each)
                and typing.get_origin(each) is None
                and not issubclass(each, (dict, pulumi.Output))
            )
        ]
        if len(arguments) == 1:
            yield from _check(value, arguments[0], path)
        elif not any(not list(_check(value, each, path)) for each in arguments):
            yield f"{path} is {value!r}, expected {type_}"
    elif origin in (list, Sequence):
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from _check(item, arguments[0], f"{path}[{index}]")
        else:
            yield f"{path} is {value!r}, expected a list"
    elif origin in (dict, Mapping):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from _check(item, arguments[1], f"{path}.{name}")
        else:
            yield f"{path} is {value!r}, expected a dict"
    elif _types.is_input_type(type_):
        yield from _object(value, type_, path)
    elif issubclass(type_, (pulumi.Asset, pulumi.Archive)):
        if not isinstance(value, dict) or value.get(rpc._special_sig_key) not in ASSETS:
            yield f"{path} is {value!r}, expected a file"
    elif issubclass(type_, enum.Enum):
        if value not in [each.value for each in type_]:
            yield f"{path} is {value!r}, expected one of {[each.value for each in type_]}"
    elif not _is(value, type_):
        yield f"{path} is {value!r}, expected {type_.__name__}"


def _is(value: Any, type_: type) -> bool:
    if isinstance(value, bool):
        return type_ is bool
    return isinstance(value, (int, float) if type_ is float else type_)
