"""The references to blobs in the data of a model: whether a model can hold them, where they are, and their rules."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from ...errors import ConfigError, InvalidData, Violation
from .blob import Blob, name_error, type_error
from .unknown_fields import bare, escaped

MAX_BLOBS = 500
"""Largest number of different blobs that the data of one resource may refer to. Its record names each of them."""
MAX_VIOLATIONS = 100


class BlobReference(NamedTuple):
    """A reference to a blob in data, and its position as a JSON Pointer."""

    pointer: str
    blob: Blob


class _Field(NamedTuple):
    """A field that can hold references: its name in Python, its token in a JSON Pointer, and its type."""

    name: str
    token: str
    type: Any


class BlobFinder:
    """Finds the references to blobs in data of one type. Raises ConfigError if the type has a set of blobs.

    model   the name of the model, for errors
    root    the type
    exists  whether data of the type can hold references (an attribute)
    """

    def __init__(self, model: str, root: msgspec.inspect.Type) -> None:
        self._root = root
        self._fields: dict[Any, list[_Field]] = {}  # by class: the fields that can hold references
        self._known: dict[int, bool] = {}  # by identity of a type below the root: whether it can hold references
        found = list(nodes(root))
        self.exists = any(_is_blob(node) for node in found)
        for node in found:
            if isinstance(node, msgspec.inspect.SetType | msgspec.inspect.FrozenSetType) and _holds(node):
                raise ConfigError(f"{model} has a set of Blob, which has no order as JSON: use a list")

    def references(self, data: Any) -> Iterator[BlobReference]:
        """Yield the references in data, in the order of its fields."""
        return self._walk(self._root, data, "")

    def check(self, data: Any) -> None:
        """Raise InvalidData if a reference in data breaks a rule, or if there are more than MAX_BLOBS blobs."""
        violations: list[Violation] = []
        different: set[str] = set()
        for pointer, blob in self.references(data):
            different.add(blob.sha256)
            if len(different) > MAX_BLOBS:
                violations = [Violation(pointer, f"expected at most {MAX_BLOBS} different files in one resource")]
                break
            for field, error in (("name", name_error(blob.name)), ("content_type", type_error(blob.content_type))):
                if error is not None and len(violations) < MAX_VIOLATIONS:
                    violations.append(Violation(f"{pointer}/{field}", error))
        if violations:
            raise InvalidData(f"the data has a reference to a file that is invalid: {violations[0][1]}", (*violations,))

    def set_sizes(self, data: Any, sizes: Mapping[str, int]) -> bool:
        """Set the size of each reference in data, by its SHA-256. Return whether a size was changed.

        Changes the frozen references in place, so `data` must belong to the caller alone.
        """
        changed = False
        for _, blob in self.references(data):
            if blob.size != (size := sizes[blob.sha256]):
                msgspec.structs.force_setattr(blob, "size", size)
                changed = True
        return changed

    def _walk(self, node: Any, value: Any, pointer: str) -> Iterator[BlobReference]:
        """Yield the references in a value. A value that is not of the type has none: it is one of another type."""
        i = msgspec.inspect
        match node:
            case i.Metadata():
                yield from self._walk(bare(node), value, pointer)
            case i.UnionType(types=members):
                for member in members:
                    yield from self._walk(member, value, pointer)
            case i.StructType() | i.DataclassType() | i.NamedTupleType():
                if isinstance(value, _class_of(node)):
                    if isinstance(value, Blob):
                        yield BlobReference(pointer, value)
                    for name, token, type_ in self._fields_of(node):
                        yield from self._walk(type_, getattr(value, name), f"{pointer}/{token}")
            case i.TypedDictType():
                if isinstance(value, dict):
                    for name, token, type_ in self._fields_of(node):
                        yield from self._walk(type_, value.get(name), f"{pointer}/{token}")
            case i.DictType(value_type=inner):
                if isinstance(value, dict) and self._can_hold(inner):
                    for key, item in value.items():
                        yield from self._walk(inner, item, f"{pointer}/{escaped(key)}")
            case i.ListType(item_type=inner) | i.VarTupleType(item_type=inner) | i.CollectionType(item_type=inner):
                if isinstance(value, list | tuple) and self._can_hold(inner):
                    for at, item in enumerate(value):
                        yield from self._walk(inner, item, f"{pointer}/{at}")
            case i.TupleType(item_types=types):
                if isinstance(value, tuple):
                    for at, (inner, item) in enumerate(zip(types, value, strict=False)):
                        yield from self._walk(inner, item, f"{pointer}/{at}")

    def _can_hold(self, node: Any) -> bool:
        if id(node) not in self._known:
            self._known[id(node)] = _holds(node)
        return self._known[id(node)]

    def _fields_of(self, node: Any) -> list[_Field]:
        if node.cls not in self._fields:
            in_list = isinstance(node, msgspec.inspect.NamedTupleType) or getattr(node, "array_like", False)
            first = 1 if getattr(node, "tag_field", None) is not None else 0
            self._fields[node.cls] = [
                _Field(field.name, str(first + at) if in_list else escaped(field.encode_name), field.type)
                for at, field in enumerate(node.fields)
                if self._can_hold(field.type)
            ]
        return self._fields[node.cls]


def _holds(node: Any) -> bool:
    """Return whether values of a type can hold references."""
    return any(_is_blob(inner) for inner in nodes(node))


def _is_blob(node: Any) -> bool:
    return isinstance(node, msgspec.inspect.StructType) and issubclass(_class_of(node), Blob)


def _class_of(node: Any) -> Any:
    """Return the class of an object type; of a generic type like `Box[Blob]`, the class `Box`."""
    return typing.get_origin(node.cls) or node.cls


def nodes(root: Any) -> Iterator[Any]:
    """Yield a type and all types inside of it. Each class is entered once, because a type may contain itself."""
    entered: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        if hasattr(node, "cls") and hasattr(node, "fields"):
            if node.cls in entered:
                continue
            entered.add(node.cls)
        waiting.extend(_inside(node))


def _inside(node: Any) -> Iterable[Any]:
    """Return the types directly inside of a type."""
    i = msgspec.inspect
    match node:
        case i.StructType() | i.DataclassType() | i.TypedDictType() | i.NamedTupleType():
            return [field.type for field in node.fields]
        case i.Metadata(type=inner):
            return (inner,)
        case i.UnionType(types=inner) | i.TupleType(item_types=inner):
            return inner
        case i.DictType(key_type=key, value_type=value):
            return key, value
        case i.ListType(item_type=item) | i.VarTupleType(item_type=item) | i.CollectionType(item_type=item):
            return (item,)
        case i.SetType(item_type=item) | i.FrozenSetType(item_type=item):
            return (item,)
    return ()
