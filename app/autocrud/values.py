"""Keys: the form of indexed values that all stores compare in the same way.

A *key* is what a store puts into its index: `str` (compared by code point), `int` (64 bits) or `float` (finite). Each
kind of value has one conversion to keys, which keeps the order: `<` on keys is `<` on values, in every store and
language.

| kind | key |
| --- | --- |
| str, UUID, date, str enums | `str` |
| int, int enums | `int` |
| float | `float` |
| bool | 0 or 1 |
| datetime (aware) | microseconds since 1970-01-01T00:00:00Z |
| Decimal | `str`, exact (see `decimal_key`) |
| list of any of these | the keys of its elements; only `contains` applies |
"""

from __future__ import annotations

import datetime as dt
import enum
import math
import re
import types
import typing
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Union
from uuid import UUID

Key = str | int | float

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
MICROSECOND = dt.timedelta(microseconds=1)


class FieldKind(NamedTuple):
    """How the values of an indexed type are checked, parsed and compared."""

    name: str  # for error messages: "str", "datetime", "list of str"
    type: Any  # the Python type, for decoding and for OpenAPI
    key: Callable[[Any], Key]  # returns the key of a value; raises ValueError if it has none
    parse: Callable[[str], Any]  # returns the value of a text in a query string, or raises ValueError
    is_list: bool = False
    is_text: bool = False  # contains, starts_with and ends_with apply
    key_type: type[Key] = str  # the type of the keys: str, int or float


def text_key(value: str) -> str:
    """Return a string as its own key.

    Raises ValueError if the string has characters that not every store can hold: NUL and unpaired surrogates.
    """
    if type(value) is not str:
        raise ValueError(f"expected a str, got {type(value).__name__}")
    if "\0" in value:
        raise ValueError("NUL characters cannot be indexed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("unpaired surrogates are not text") from None
    return value


def int_key(value: int) -> int:
    """Return an int as its own key. Raises ValueError if it has more than 64 bits."""
    if type(value) is not int:
        raise ValueError(f"expected an int, got {type(value).__name__}")
    if not INT_MIN <= value <= INT_MAX:
        raise ValueError("integers outside 64 bits cannot be indexed")
    return value


def float_key(value: float) -> float:
    """Return the key of a float or an int. Raises ValueError if the number is not finite."""
    if type(value) not in (int, float):
        raise ValueError(f"expected a float, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("only finite numbers can be indexed")
    return number + 0.0  # -0.0 and 0.0 are equal


def bool_key(value: bool) -> int:
    """Return 0 or 1."""
    if type(value) is not bool:
        raise ValueError(f"expected a bool, got {type(value).__name__}")
    return int(value)


def datetime_key(value: dt.datetime) -> int:
    """Return the microseconds since 1970, UTC. Raises ValueError if the datetime has no time zone."""
    if not isinstance(value, dt.datetime):
        raise ValueError(f"expected a datetime, got {type(value).__name__}")
    if value.tzinfo is None:
        raise ValueError("a datetime without a time zone cannot be indexed; add an offset, like +00:00 or Z")
    return (value - EPOCH) // MICROSECOND


def date_key(value: dt.date) -> str:
    """Return the date as `YYYY-MM-DD`."""
    if type(value) is not dt.date:
        raise ValueError(f"expected a date, got {type(value).__name__}")
    return value.isoformat()


def uuid_key(value: UUID) -> str:
    """Return the UUID in its canonical form, with lower-case digits."""
    if not isinstance(value, UUID):
        raise ValueError(f"expected a UUID, got {type(value).__name__}")
    return str(value)


NINES = str.maketrans("0123456789", "9876543210")
EXPONENT_BIAS = 10**19


def decimal_key(value: Decimal) -> str:
    """Return a text whose order by code point is the exact numeric order. 1.0 and 1.00 have the same key.

    The text has the sign, then the exponent of 0.d1d2... plus a bias in 20 digits, then the digits. For a negative
    number, exponent and digits are in nines' complement. Its text ends with a character above every digit, so that the
    longer text, which is the smaller number, comes first.
    """
    if type(value) is not Decimal:
        raise ValueError(f"expected a Decimal, got {type(value).__name__}")
    if not value.is_finite():
        raise ValueError("only finite numbers can be indexed")
    sign, digits, _ = value.as_tuple()
    mantissa = "".join(map(str, digits)).lstrip("0").rstrip("0")
    if not mantissa:
        return "1"
    text = f"{value.adjusted() + 1 + EXPONENT_BIAS:020d}{mantissa}"
    return f"0{text.translate(NINES)}:" if sign else f"2{text}"


def _parser(pattern: str, parse: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """Return a parser that accepts only texts that match the pattern.

    The parsers of Python accept more than clients may rely on: "1_0", "{...}", and the basic ISO formats.
    """
    compiled = re.compile(pattern, re.ASCII)

    def strict(text: str) -> Any:
        try:
            if compiled.fullmatch(text):
                return parse(text)
        except (ValueError, ArithmeticError):
            pass
        raise ValueError(f"expected {expected}, got {text[:60]!r}")

    return strict


_NUMBER = r"-?\d{1,400}(\.\d{1,400})?([eE][+-]?\d{1,6})?"
_DATE = r"\d{4}-\d\d-\d\d"


def _parse_datetime(text: str) -> dt.datetime:
    if " " in text:
        raise ValueError(f"expected an RFC 3339 time, got {text[:60]!r}: a '+' must be sent as %2B, or use Z")
    value: dt.datetime = _strict_datetime(text)
    return value


_strict_datetime = _parser(
    _DATE + r"[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)",
    lambda text: dt.datetime.fromisoformat(text.upper()),
    "an RFC 3339 time, like 2026-01-31T12:00:00Z",
)


SCALARS: dict[Any, FieldKind] = {
    str: FieldKind("str", str, text_key, str, is_text=True),
    int: FieldKind("int", int, int_key, _parser(r"-?\d{1,19}", int, "an integer of 64 bits"), key_type=int),
    float: FieldKind("float", float, float_key, _parser(_NUMBER, float, "a number"), key_type=float),
    bool: FieldKind(
        "bool", bool, bool_key, _parser("true|false", lambda text: text == "true", "true or false"), key_type=int
    ),
    dt.datetime: FieldKind("datetime", dt.datetime, datetime_key, _parse_datetime, key_type=int),
    dt.date: FieldKind("date", dt.date, date_key, _parser(_DATE, dt.date.fromisoformat, "a date, like 2026-01-31")),
    UUID: FieldKind(
        "UUID", UUID, uuid_key, _parser("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", UUID, "a UUID")
    ),
    Decimal: FieldKind("Decimal", Decimal, decimal_key, _parser(_NUMBER, Decimal, "a decimal number")),
}


def _choice(name: str, type_: Any, values: dict[Any, Any]) -> FieldKind:
    """Return the kind of an enum or a Literal; `values` maps each member to its plain value."""
    plain = {type(value) for value in values.values()}
    if not plain or (not plain <= {str} and not plain <= {int}):
        raise ValueError(f"{name} cannot be indexed: its values must be all str or all int")
    base = SCALARS[plain.pop()]
    by_text = {str(value): member for member, value in values.items()}

    def key(value: Any) -> Key:
        if value not in values:
            raise ValueError(f"expected one of {', '.join(by_text)}")
        return base.key(values[value])

    def parse(text: str) -> Any:
        if text not in by_text:
            raise ValueError(f"expected one of {', '.join(by_text)}")
        return by_text[text]

    return FieldKind(name, type_, key, parse, key_type=base.key_type)


def kind_of(type_: Any) -> FieldKind:
    """Return the kind of a type. Raises ValueError, which lists the types that can be indexed, if there is none.

    `None` in a union is ignored, because null is not a value. `list[T]`, `set[T]` and `tuple[T, ...]` are lists of T.
    """
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin is typing.Annotated:
        return kind_of(args[0])
    if origin in (Union, types.UnionType):
        rest = [arg for arg in args if arg is not type(None) and getattr(arg, "__name__", "") != "UnsetType"]
        if len(rest) == 1:
            return kind_of(rest[0])
    if origin in (list, set, frozenset, tuple) and args and (origin is not tuple or args[1:] == (Ellipsis,)):
        element = kind_of(args[0])
        if not element.is_list:
            return FieldKind(
                f"list of {element.name}", type_, element.key, element.parse, is_list=True, key_type=element.key_type
            )
    if origin is Literal:
        return _choice("Literal", type_, {value: value for value in args})
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return _choice(type_.__name__, type_, {member: member.value for member in type_})
    try:
        return SCALARS[type_]
    except (KeyError, TypeError):
        names = ", ".join(kind.name for kind in SCALARS.values())
        shown = getattr(type_, "__name__", str(type_))
        raise ValueError(f"{shown} cannot be indexed; these can: {names}, enums, and lists of them") from None
