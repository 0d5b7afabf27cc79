"""Fields of a JSON body that the model does not have, and keys that it would merge."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from ...errors import Violation

_SCALARS = (
    msgspec.inspect.StrType,
    msgspec.inspect.IntType,
    msgspec.inspect.FloatType,
    msgspec.inspect.BoolType,
    msgspec.inspect.DateTimeType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.EnumType,
)


UNKNOWN = "unknown field"
"""The detail of a violation begins with this if the model lacks the field."""
_KEYS: Mapping[type, type] = {
    msgspec.inspect.IntType: int,
    msgspec.inspect.FloatType: float,
    msgspec.inspect.DecimalType: Decimal,
    msgspec.inspect.UUIDType: UUID,
    msgspec.inspect.BytesType: bytes,
    msgspec.inspect.DateTimeType: dt.datetime,
    msgspec.inspect.DateType: dt.date,
    msgspec.inspect.TimeType: dt.time,
    msgspec.inspect.TimeDeltaType: dt.timedelta,
}
"""Types of keys of which JSON has several texts."""


def bare(node: Any) -> Any:
    """Return a type without its annotations, such as a description, which do not change what it accepts."""
    while isinstance(node, msgspec.inspect.Metadata):
        node = node.type
    return node


def escaped(key: str) -> str:
    """Return a key as a token of a JSON Pointer."""
    return key.replace("~", "~0").replace("/", "~1")


class UnknownFields:
    """Finds the fields of a tree of JSON that a type does not have, at every depth, and keys that it reads as equal.

    Of two equal keys, such as 1.0 and 1e0 in a `dict[float, X]`, msgspec keeps the last one. It rejects unknown fields
    only if each Struct is declared with `forbid_unknown_fields`. Models need not be.
    """

    def __init__(self, root: msgspec.inspect.Type) -> None:
        self._root = root
        self._fields: dict[type, tuple[dict[str, msgspec.inspect.Type], bool]] = {}
        self._root_fields = self._fields_of(root)

    def has_none(self, body: bytes) -> bool:
        """Return True if a body certainly has no unknown field and no key twice. False means: not certain.

        Returns True for most valid bodies, which are one object of scalars with known keys. Without backslashes, each
        key and each string value has two quotes. If the body has more quotes than that, it has a key twice.
        """
        fields, flat = self._root_fields
        if not flat or b"\\" in body:
            return False
        tree = msgspec.json.decode(body)
        strings = [value for value in tree.values() if type(value) is str]
        return tree.keys() <= fields.keys() and 2 * (len(tree) + len(strings)) == body.count(b'"')

    def violations(self, tree: Any) -> Iterator[Violation]:
        """Yield a violation for each unknown field, and each key that equals another one.

        The tree of JSON fits the type otherwise.
        """
        return self._walk(self._root, tree, "")

    def _walk(self, node: msgspec.inspect.Type, value: Any, pointer: str) -> Iterator[Violation]:
        i = msgspec.inspect
        node = bare(node)
        if isinstance(value, dict):
            match node:
                case i.StructType() | i.DataclassType() | i.TypedDictType():
                    fields, _ = self._fields_of(node)
                    for key, inner in value.items():
                        at = f"{pointer}/{escaped(key)}"
                        if key not in fields:
                            yield Violation(at, f"{UNKNOWN}; expected one of {', '.join(fields)}")
                        elif isinstance(inner, dict | list):
                            yield from self._walk(fields[key], inner, at)
                case i.DictType(key_type=key_type, value_type=inner_type):
                    yield from _equal_keys(key_type, value, pointer)
                    for key, inner in value.items():
                        if isinstance(inner, dict | list):
                            yield from self._walk(inner_type, inner, f"{pointer}/{escaped(key)}")
                case i.UnionType(types=members):
                    yield from self._walk_union(members, value, pointer)
        elif isinstance(value, list):
            match node:
                case i.ListType(item_type=item) | i.SetType(item_type=item) | i.FrozenSetType(item_type=item):
                    yield from self._walk_items([item] * len(value), value, pointer)
                case i.VarTupleType(item_type=item) | i.CollectionType(item_type=item):
                    yield from self._walk_items([item] * len(value), value, pointer)
                case i.TupleType(item_types=items):
                    yield from self._walk_items(items, value, pointer)
                case i.StructType(array_like=True) | i.NamedTupleType():
                    items = tuple(field.type for field in node.fields)
                    extra = 1 if isinstance(node, i.StructType) and node.tag_field is not None else 0
                    if len(value) > len(items) + extra:
                        yield Violation(pointer, f"expected at most {len(items) + extra} elements, got {len(value)}")
                    yield from self._walk_items(items, value[extra:], pointer)
                case i.UnionType(types=members):
                    for member in map(bare, members):
                        if not isinstance(member, i.NoneType):
                            yield from self._walk(member, value, pointer)

    def _walk_items(
        self, types_: Sequence[msgspec.inspect.Type], values: list[Any], pointer: str
    ) -> Iterator[Violation]:
        for at, (type_, inner) in enumerate(zip(types_, values, strict=False)):
            if isinstance(inner, dict | list):
                yield from self._walk(type_, inner, f"{pointer}/{at}")

    def _walk_union(self, members: Sequence[Any], value: dict[str, Any], pointer: str) -> Iterator[Violation]:
        """Walk the members of a union that fit. It has either one object type, or Structs that a tag tells apart."""
        for member in map(bare, members):
            tag_field = getattr(member, "tag_field", None)
            if tag_field is None or value.get(tag_field) == member.tag:
                yield from self._walk(member, value, pointer)

    def _fields_of(self, node: Any) -> tuple[dict[str, msgspec.inspect.Type], bool]:
        """Return the fields by name in JSON, and whether all of them are scalars."""
        if node.cls not in self._fields:
            fields = {field.encode_name: bare(field.type) for field in node.fields}
            if getattr(node, "tag_field", None) is not None:
                fields[node.tag_field] = msgspec.inspect.AnyType()
            self._fields[node.cls] = fields, all(type(type_) in _SCALARS for type_ in fields.values())
        return self._fields[node.cls]


def _equal_keys(key_type: msgspec.inspect.Type, value: dict[str, Any], pointer: str) -> Iterator[Violation]:
    """Yield a violation for each key that has the same value as an earlier one."""
    python = _KEYS.get(type(bare(key_type)))
    if python is None:
        return
    first: dict[Any, str] = {}
    for key in value:
        (read,) = msgspec.convert({key: None}, dict[python, None], strict=False)  # type: ignore[valid-type]
        if first.setdefault(read, key) != key:
            yield Violation(f"{pointer}/{escaped(key)}", f"the key {key!r} equals {first[read]!r}")
