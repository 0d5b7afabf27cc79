"""From bytes to a model's data and back: strict decoding, canonical encoding, and what is indexed.

A body from outside is decoded and validated once, encoded once in canonical form, and travels as bytes from there. Canonical JSON has
the fields in the order of the model and the keys of dicts sorted; its SHA-256 is the `data_hash`, whatever the storage encoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, Union

import msgspec
from msgspec import UNSET

from ...errors import ConfigError, InvalidData, Violation
from ...values import FieldKind, kind_of
from ..basic import Encoding, IndexedField, IndexEntry
from ..contract.limits import MAX_FIELDS
from .json_shape import strings

T = TypeVar("T")


MAX_VIOLATIONS = 100
MISSING = UNSET  # what a path that leads nowhere yields; msgspec's own word for a field that is not there
canonical_json = msgspec.json.Encoder(order="deterministic").encode
_msgpack = msgspec.msgpack.Encoder(order="deterministic").encode


class Document(NamedTuple, Generic[T]):
    """Valid data of a model, with its canonical JSON."""

    data: T
    json: bytes

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.json).hexdigest()


class Codec(Generic[T]):
    """Everything about one model's data. ConfigError if the model or an indexed field cannot be used."""

    def __init__(self, model: type[T], indexed_fields: Sequence[IndexedField | tuple[str, Any] | str] = ()) -> None:
        self.model = model
        try:
            self._json: msgspec.json.Decoder[T] = msgspec.json.Decoder(model)
            self._msgpack: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(model)
            info = msgspec.inspect.type_info(model)
        except Exception as error:  # msgspec raises what it finds: TypeError, NameError of an annotation, ...
            raise ConfigError(f"{model!r} cannot be a model: {error}") from None
        if not isinstance(
            info, msgspec.inspect.StructType | msgspec.inspect.DataclassType | msgspec.inspect.TypedDictType
        ):
            raise ConfigError(f"{model!r} cannot be a model: expected a msgspec Struct, a dataclass or a TypedDict")
        if isinstance(info, msgspec.inspect.StructType) and info.array_like:
            raise ConfigError(f"{model.__name__} cannot be a model: its data must be a JSON object, not array_like")
        if len(indexed_fields) > MAX_FIELDS:
            raise ConfigError(
                f"{model.__name__} has {len(indexed_fields)} indexed fields, expected at most {MAX_FIELDS}: index fewer"
            )
        self._unknown = _UnknownFields(info)
        self._paths = [_Path(model, given) for given in map(_indexed_field, indexed_fields)]
        self._lists = [path for path in self._paths if path.kind.is_list]
        self.fields: Mapping[str, FieldKind] = {path.name: path.kind for path in self._paths}
        self.unique = tuple(path.name for path in self._paths if path.unique)
        self._omits_defaults = any(path.omits_defaults for path in self._paths)
        if len(self.fields) != len(self._paths):
            raise ConfigError(f"{model.__name__} has a field that is indexed twice")

    def parse(self, body: bytes) -> Document[T]:
        """JSON from outside. InvalidData for anything that is not exactly the model: unknown fields and duplicate keys too."""
        try:
            data = self._json.decode(body)
            canonical = canonical_json(data)
            if canonical != body and not self._unknown.surely_none(body):
                violations = tuple(itertools.islice(self._unknown.violations(_decode_strictly(body)), MAX_VIOLATIONS))
                if violations:
                    raise InvalidData(f"the data has fields that {self.model.__name__} does not have", violations)
        except msgspec.ValidationError as error:
            raise invalid_data(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _not_json(error, body) from None
        except RecursionError:
            raise InvalidData("the body is nested too deeply", (Violation("", "nested too deeply"),)) from None
        except InvalidData:
            raise
        except (ValueError, OverflowError) as error:
            raise InvalidData(f"the body cannot be used: {error}", (Violation("", str(error)),)) from None
        return Document(data, canonical)

    def accept(self, data: T | Document[T]) -> Document[T]:
        """Data from Python, validated as if it came from outside (a Struct's constructor checks no types)."""
        if isinstance(data, Document):
            return data
        try:
            canonical = canonical_json(data)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidData(f"the data cannot be encoded: {error}", (Violation("", str(error)),)) from None
        return self.parse(canonical)

    def encode(self, document: Document[T], encoding: Encoding) -> bytes:
        """The body to store."""
        if encoding == Encoding.json:
            return document.json
        try:
            return _msgpack(document.data)
        except OverflowError:
            detail = "integers outside 64 bits cannot be stored as MessagePack"
            raise InvalidData(detail, (Violation("", detail),)) from None

    def decode(self, body: bytes, encoding: str) -> T:
        """A stored body."""
        return self._json.decode(body) if encoding == Encoding.json else self._msgpack.decode(body)

    def to_json(self, body: bytes, encoding: str) -> bytes:
        """A stored body as JSON; free for bodies that are."""
        return body if encoding == Encoding.json else canonical_json(self._msgpack.decode(body))

    def has_path(self, path: str) -> bool:
        """Whether `a.b` can be there in the JSON of the data."""
        owner: Any = self.model
        for part in path.split("."):
            if owner is Any:
                return True
            try:
                owner, step = _step(self.model, owner, part, path)
            except ConfigError:
                return False
            if step[0] != part:  # a Python name that JSON does not know
                return False
        return True

    def index(self, data: T, before: Any = MISSING) -> IndexEntry:
        """Return what is indexed of the data. Raises InvalidData for a value that no store could compare.

        `before`: the data that are replaced, as a tree of JSON. Such a value is left out if it is there too: the field was not
        indexed when it was stored, and the resource must stay changeable elsewhere.
        """
        keys: dict[str, Any] = {}
        missing: list[str] = []
        shown: dict[str, Any] = {}
        for path in self._paths:
            value = path.read(data)
            try:
                keys[path.name] = path.key(value)
            except ValueError as error:
                if path.read_loosely(before) != value:
                    raise InvalidData(
                        f"{path.name}: {error}", (Violation("/" + path.name.replace(".", "/"), str(error)),)
                    ) from None
                keys[path.name] = None
                missing.append(path.name)
                continue
            if value is MISSING:
                missing.append(path.name)
            else:
                path.show(shown, value)
        if self._omits_defaults:  # then the data does not show them either
            shown = project(msgspec.json.decode(canonical_json(data)), list(self.fields))
        return IndexEntry(keys, tuple(missing), canonical_json(shown))

    def items(self, data: T) -> dict[str, int]:
        """Return how many items each indexed list has."""
        values = {path.name: path.read(data) for path in self._lists}
        return {name: len(value) for name, value in values.items() if value is not None and value is not MISSING}

    def items_kept(self, tree: Any) -> dict[str, int]:
        """Return how many items each indexed list of a tree of JSON has, which need not fit the model."""
        values = {path.name: path.read_loosely(tree) for path in self._lists}
        return {name: len(value) for name, value in values.items() if value is not None and value is not MISSING}

    def index_stored(self, json: bytes) -> IndexEntry:
        """Return what can be indexed of stored data: all fields, if the data fit the model."""
        try:
            return self.index(self._json.decode(json))
        except (msgspec.ValidationError, InvalidData):
            return self.index_kept(msgspec.json.decode(json))

    def index_kept(self, *trees: Any) -> IndexEntry:
        """Return what can be indexed of trees of JSON that do not fit the model: each field from the first that has it."""
        keys: dict[str, Any] = {}
        missing: list[str] = []
        shown: dict[str, Any] = {}
        for path in self._paths:
            for tree in trees:
                value = path.read_loosely(tree)
                if value is MISSING:
                    continue
                with contextlib.suppress(ValueError):
                    keys[path.name] = path.key(value)
                    path.show(shown, value)
                    break
            else:
                keys[path.name] = None
                missing.append(path.name)
        return IndexEntry(keys, tuple(missing), canonical_json(shown))


class CodecIndex:
    """The IndexOf of a codec."""

    def __init__(self, codec: Codec[Any]) -> None:
        self._codec = codec

    def __call__(self, body: bytes, encoding: Encoding) -> IndexEntry:
        return self._codec.index(self._codec.decode(body, encoding))

    def kept(self, body: bytes | None, encoding: Encoding, shown: bytes) -> IndexEntry:
        return self._codec.index_kept(_loosely_decoded(body, encoding), _loosely_decoded(shown, Encoding.json))


def _loosely_decoded(body: bytes | None, encoding: Encoding) -> Any:
    """Return what a body holds, whatever its model was; None if it cannot be read."""
    if body is None:
        return None
    try:
        return msgspec.json.decode(body) if encoding == Encoding.json else msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _indexed_field(given: IndexedField | tuple[str, Any] | str) -> IndexedField:
    if isinstance(given, IndexedField):
        return given
    return IndexedField(given) if isinstance(given, str) else IndexedField(*given)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        detail = f"the key {twice!r} stands twice in one object"
        raise InvalidData(detail, (Violation("", detail),))
    return found


_strict_json = json.JSONDecoder(object_pairs_hook=_distinct).decode


def _decode_strictly(body: bytes) -> Any:
    """Return a tree of JSON. Raises InvalidData if a key stands twice in one object, msgspec.DecodeError for what is no JSON.

    Of keys that stand twice msgspec keeps one. So if the tree has all strings of the text, there was none.
    """
    tree = msgspec.json.decode(body)  # no NaN, UTF-8 only
    return tree if strings(body) == strings(msgspec.json.encode(tree)) else _strict_json(body.decode())


def parse_json(body: bytes) -> Any:
    """JSON from outside that has no model: a patch, or an envelope. InvalidData."""
    try:
        return _decode_strictly(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_json(error, body) from None
    except RecursionError:
        raise InvalidData("the body is nested too deeply", (Violation("", "nested too deeply"),)) from None
    except InvalidData:
        raise
    except ValueError as error:
        raise InvalidData(f"the body cannot be used: {error}", (Violation("", str(error)),)) from None


def _not_json(error: Exception, body: bytes) -> InvalidData:
    """msgspec finds half of a surrogate pair at the end of a text to be truncated data, and names UTF-16 elsewhere."""
    said = str(error)
    if "truncated" in said or "surrogate" in said:
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(body.decode())  # which takes it
            said = "it has an unpaired surrogate (one of \\ud800 to \\udfff by itself), which is no character"
    return InvalidData(f"the body is not JSON: {said}", (Violation("", said),))


def invalid_data(error: msgspec.ValidationError) -> InvalidData:
    """msgspec says "Expected `str`, got `int` - at `$.tags[0]`"; clients want a JSON Pointer."""
    detail, _, place = str(error).partition(" - at `")
    return InvalidData(f"the data does not fit: {error}", (Violation(_pointer(place.rstrip("`")), detail),))


def _pointer(place: str) -> str:
    parts = re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place)
    return "".join(f"/{escaped(name) if name else ('*' if index == '...' else index)}" for name, index in parts)


def escaped(key: str) -> str:
    """A key as a token of a JSON Pointer."""
    return key.replace("~", "~0").replace("/", "~1")


_SCALARS = (
    msgspec.inspect.StrType,
    msgspec.inspect.IntType,
    msgspec.inspect.FloatType,
    msgspec.inspect.BoolType,
    msgspec.inspect.DateTimeType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.EnumType,
)


class _UnknownFields:
    """Finds the fields of a JSON tree that a type does not have, at every depth.

    msgspec refuses unknown fields only of Structs that say so themselves; a user should not have to.
    """

    def __init__(self, root: msgspec.inspect.Type) -> None:
        self._root = root
        self._fields: dict[type, tuple[dict[str, msgspec.inspect.Type], bool]] = {}
        self._root_fields = self._fields_of(root)

    def surely_none(self, body: bytes) -> bool:
        """A quick look that suffices for most valid bodies: one object of scalars with known keys, each once.

        Without backslashes each key has two quotes and each string two, so a key that stood twice would leave some over.
        """
        fields, flat = self._root_fields
        if not flat or b"\\" in body:
            return False
        tree = msgspec.json.decode(body)
        strings = [value for value in tree.values() if type(value) is str]
        return tree.keys() <= fields.keys() and 2 * (len(tree) + len(strings)) == body.count(b'"')

    def violations(self, tree: Any) -> Iterator[Violation]:
        return self._walk(self._root, tree, "")

    def _walk(self, node: msgspec.inspect.Type, value: Any, pointer: str) -> Iterator[Violation]:
        i = msgspec.inspect
        if isinstance(value, dict):
            match node:
                case i.StructType() | i.DataclassType() | i.TypedDictType():
                    fields, _ = self._fields_of(node)
                    for key, inner in value.items():
                        at = f"{pointer}/{escaped(key)}"
                        if key not in fields:
                            yield Violation(at, f"unknown field; expected one of {', '.join(fields)}")
                        elif isinstance(inner, dict | list):
                            yield from self._walk(fields[key], inner, at)
                case i.DictType(value_type=inner_type):
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
                    for member in members:
                        if not isinstance(member, i.NoneType):
                            yield from self._walk(member, value, pointer)

    def _walk_items(
        self, types_: Sequence[msgspec.inspect.Type], values: list[Any], pointer: str
    ) -> Iterator[Violation]:
        for at, (type_, inner) in enumerate(zip(types_, values, strict=False)):
            if isinstance(inner, dict | list):
                yield from self._walk(type_, inner, f"{pointer}/{at}")

    def _walk_union(self, members: Sequence[Any], value: dict[str, Any], pointer: str) -> Iterator[Violation]:
        """msgspec allows either one member that is an object or Structs that a tag tells apart."""
        for member in members:
            tag_field = getattr(member, "tag_field", None)
            if tag_field is None or value.get(tag_field) == member.tag:
                yield from self._walk(member, value, pointer)

    def _fields_of(self, node: Any) -> tuple[dict[str, msgspec.inspect.Type], bool]:
        """The fields by name in JSON, and whether none of them could hold an object."""
        if node.cls not in self._fields:
            fields = {field.encode_name: field.type for field in node.fields}
            if getattr(node, "tag_field", None) is not None:
                fields[node.tag_field] = msgspec.inspect.AnyType()
            self._fields[node.cls] = fields, all(type(type_) in _SCALARS for type_ in fields.values())
        return self._fields[node.cls]


class _Path:
    """How one indexed field is read from the data. Its name is the path as JSON shows it."""

    def __init__(self, model: type, given: IndexedField) -> None:
        self.unique = given.unique
        owner: Any = model
        self._steps: list[
            tuple[str, str, bool]
        ] = []  # key in JSON, attribute or key in Python, whether a dict is stepped into
        self.omits_defaults = False
        for part in given.name.split("."):
            self.omits_defaults |= getattr(getattr(owner, "__struct_config__", None), "omit_defaults", False)
            owner, step = _step(model, owner, part, given.name)
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
        for _, name, is_dict in self._steps:
            if data is None:
                return MISSING
            data = data.get(name, MISSING) if is_dict else getattr(data, name, MISSING)
            if data is MISSING:
                return MISSING
        return data

    def read_loosely(self, tree: Any) -> Any:
        """Return the value in a tree of JSON, if the path leads to one that has the field's type; MISSING if not."""
        for name, _, _ in self._steps:
            if not isinstance(tree, dict) or name not in tree:
                return MISSING
            tree = tree[name]
        try:
            return msgspec.convert(tree, self._type)
        except (msgspec.ValidationError, ValueError, OverflowError):
            return MISSING

    def key(self, value: Any) -> Any:
        if value is None or value is MISSING:
            return None
        if not self.kind.is_list:
            return self.kind.key(value)
        return [self.kind.key(element) for element in value if element is not None]

    def show(self, into: dict[str, Any], value: Any) -> None:
        for name in self._parents:
            into = into.setdefault(name, {})
        into[self._last] = value


def _step(model: type, owner: Any, part: str, name: str) -> tuple[Any, tuple[str, str, bool]]:
    """One step of a path: the type behind it and how to take it."""
    origin = typing.get_origin(owner)
    if origin is typing.Annotated:
        return _step(model, typing.get_args(owner)[0], part, name)
    if origin in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(owner) if arg is not type(None) and arg is not msgspec.UnsetType]
        if len(rest) == 1:
            return _step(model, rest[0], part, name)
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
    """Only these paths of a JSON object; those that lead nowhere are left out."""
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
