"""Indexed fields: the path to a value in the data, in Python and in JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Union

import msgspec
from msgspec import UNSET

from ...errors import ConfigError
from ...values import kind_of
from ..basic import IndexedField

MISSING = UNSET
"""The value of a path that the data do not have. msgspec uses it for fields that are not set."""


class FieldPath:
    """The path to an indexed field. Its `name` is the path in JSON, such as `author.name`."""

    def __init__(self, model: type, given: IndexedField) -> None:
        self.unique = given.unique
        owner: Any = model
        # For each step: the key in JSON, the attribute or key in Python, and whether the step leads into a dict.
        self._steps: list[tuple[str, str, bool]] = []
        self.omits_defaults = False
        for part in given.name.split("."):
            self.omits_defaults |= getattr(getattr(owner, "__struct_config__", None), "omit_defaults", False)
            owner, step = step_of(model, owner, part, given.name)
            self._steps.append(step)
        *self._parents, self._last = [step[0] for step in self._steps]
        self.name = ".".join([*self._parents, self._last])
        self._type = owner
        try:
            self.kind = kind_of(owner)
            declared = self.kind if given.type is None else kind_of(given.type)
        except ValueError as error:
            raise ConfigError(f"{model.__name__}.{given.name} cannot be indexed: {error}") from None
        if declared.name != self.kind.name:
            raise ConfigError(
                f"{model.__name__}.{given.name} is indexed as {declared.name}, but the model says {self.kind.name}"
            )
        if self.kind.is_list and self.unique:
            raise ConfigError(f"{model.__name__}.{given.name} is a list, and lists cannot be unique")

    def read(self, data: Any) -> Any:
        """Return the value in the data of the model; MISSING if the data do not have the path."""
        for _, name, is_dict in self._steps:
            if data is None:
                return MISSING
            data = data.get(name, MISSING) if is_dict else getattr(data, name, MISSING)
            if data is MISSING:
                return MISSING
        return data

    def read_loosely(self, tree: Any) -> Any:
        """Return the value in a tree of JSON; MISSING if there is none, or if its type is not that of the field."""
        for name, _, _ in self._steps:
            if not isinstance(tree, dict) or name not in tree:
                return MISSING
            tree = tree[name]
        try:
            return msgspec.convert(tree, self._type)
        except (msgspec.ValidationError, ValueError, OverflowError):
            return MISSING

    def key(self, value: Any) -> Any:
        """Return the key that stores compare; None for null and MISSING. Raises ValueError if a value has no key."""
        if value is None or value is MISSING:
            return None
        if not self.kind.is_list:
            return self.kind.key(value)
        return [self.kind.key(element) for element in value if element is not None]

    def show(self, into: dict[str, Any], value: Any) -> None:
        """Put the value into a tree of JSON, at this path."""
        for name in self._parents:
            into = into.setdefault(name, {})
        into[self._last] = value


def step_of(model: type, owner: Any, part: str, name: str) -> tuple[Any, tuple[str, str, bool]]:
    """Return the type that one step of a path leads to, and the step. Raises ConfigError if there is no such field."""
    origin = typing.get_origin(owner)
    if origin is typing.Annotated:
        return step_of(model, typing.get_args(owner)[0], part, name)
    if origin in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(owner) if arg is not type(None) and arg is not msgspec.UnsetType]
        if len(rest) == 1:
            return step_of(model, rest[0], part, name)
    if origin is dict:
        return typing.get_args(owner)[1], (part, part, True)
    if isinstance(owner, type):
        if issubclass(owner, msgspec.Struct) and not owner.__struct_config__.array_like:
            for field in msgspec.structs.fields(owner):
                if part in (field.encode_name, field.name):
                    return field.type, (field.encode_name, field.name, False)
        elif dataclasses.is_dataclass(owner) or typing.is_typeddict(owner):
            hints = typing.get_type_hints(owner)
            if part in hints:
                return hints[part], (part, part, typing.is_typeddict(owner))
    raise ConfigError(f"{model.__name__} has no field {name!r} that could be indexed")


def project(tree: Any, paths: Sequence[str]) -> dict[str, Any]:
    """Return a JSON object with only these paths of another one. Paths that it does not have are left out."""
    result: dict[str, Any] = {}
    for path in paths:
        *parents, last = path.split(".")
        source, into = tree, result
        for name in parents:
            source = source.get(name) if isinstance(source, dict) else None
        if isinstance(source, dict) and last in source:
            for name in parents:
                into = into.setdefault(name, {})
            into[last] = source[last]
    return result
