"""JSON Schemas of single values: values in a query string, the bounds of indexed fields, and examples."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from ..values import INT_MAX, INT_MIN, FieldKind

Schema = dict[str, Any]
REF = "#/components/schemas/{name}"
NO_NUL = r"^[^\u0000]*$"


def value_schema(kind: FieldKind) -> Schema:
    """Return the schema of one value of a kind in a query string."""
    type_ = kind.type
    if kind.is_list:
        type_ = next(arg for arg in typing.get_args(type_) if arg is not Ellipsis)
    (schema,), components = msgspec.json.schema_components([type_], ref_template=REF)
    if "$ref" in schema:  # an enum
        schema = components[schema["$ref"].rpartition("/")[2]]
    schema = {key: value for key, value in schema.items() if key in ("type", "format", "enum", "pattern")}
    bound(schema, kind)
    if kind.name in ("Decimal", "list of Decimal"):
        schema = {"type": "string", "pattern": r"^-?[0-9]{1,30}(\.[0-9]{1,30})?$"}
    return schema


def bound(schema: Schema, kind: FieldKind) -> None:
    """Add the bounds of indexed values to a schema, in place: 64 bits, no NUL."""
    for part in [schema, *schema.get("anyOf", [])]:
        if part.get("type") == "integer":
            part.setdefault("minimum", INT_MIN)
            part.setdefault("maximum", INT_MAX)
        elif part.get("type") == "string" and not {"format", "pattern", "enum"} & set(part):
            part["pattern"] = NO_NUL
        elif part.get("type") == "array" and isinstance(part.get("items"), dict):
            bound(part["items"], kind)


_EXAMPLES: dict[str, Any] = {
    "date-time": "2026-01-31T12:00:00Z",
    "date": "2026-01-31",
    "uuid": "0190d5f2-7c5e-7a30-8f6e-000000000000",
    "decimal": "12.50",
    "string": "text",
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "null": None,
}


def example(schema: Schema, components: Mapping[str, Schema]) -> Any:
    """Return a value that the schema allows."""
    if "examples" in schema:
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], components)
    if "$ref" in schema:
        inner = components[schema["$ref"].rpartition("/")[2]]
        if "properties" not in inner:
            return example(inner, components)
        # only required properties, because a model may contain itself
        return {name: example(inner["properties"][name], components) for name in inner.get("required", [])}
    kind = schema.get("type")
    if kind in ("array", "object"):
        return [] if kind == "array" else {}
    return _EXAMPLES.get(schema.get("format", ""), _EXAMPLES.get(str(kind)))
