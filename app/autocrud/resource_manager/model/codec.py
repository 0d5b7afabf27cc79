"""The codec of a model: strict decoding, canonical encoding, and the index entry of data.

A body from a client is decoded, validated and encoded as canonical JSON once. After that its bytes are passed on
unchanged. Canonical JSON has the fields in the order of the model and the keys of dicts sorted. Its SHA-256 is the
`data_hash`, whichever encoding the stored body has.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from typing_extensions import override

from ...errors import ConfigError, InvalidData, Violation
from ...values import FieldKind
from ..basic import Encoding, IndexedField, IndexEntry, IndexOf
from ..contract.limits import MAX_FIELDS
from .blob_references import BlobFinder, BlobReference, nodes
from .fields import MISSING, FieldPath, project, step_of
from .json_shape import MAX_STORED_DEPTH, excessive_depth, strings
from .unknown_fields import UNKNOWN, UnknownFields, escaped

T = TypeVar("T")


MAX_VIOLATIONS = 100
_sorted_json = msgspec.json.Encoder(order="deterministic").encode
_sorted_msgpack = msgspec.msgpack.Encoder(order="deterministic").encode


def canonical_json(data: Any) -> bytes:
    """Return the JSON of data, with sorted keys. Raises the errors of msgspec if it cannot be encoded."""
    try:
        return _sorted_json(data)
    except TypeError:  # msgspec sorts text only, so keys like those of dict[int, X] must be text first
        return _sorted_json(msgspec.json.decode(msgspec.json.encode(data)))


def distinct_json(data: Any) -> bytes:
    """Return the JSON of data, with sorted keys, like `canonical_json`.

    Raises InvalidData if JSON writes two keys of a dict alike, such as 1 and "1", of which a reader keeps one only.
    Raises the errors of msgspec if the data cannot be encoded.
    """
    try:
        return _sorted_json(data)
    except TypeError:
        return _sorted_json(_decode_strictly(msgspec.json.encode(data)))


def strict_json(data: Any) -> bytes:
    """Return the JSON of data, as `distinct_json` does. Also raises InvalidData if a float is NaN or infinite."""
    canonical = distinct_json(data)
    if b"null" in canonical:
        # The hook gets a Raw, which is JSON already.
        pointer = _not_finite(msgspec.to_builtins(data, enc_hook=lambda _: None))
        if pointer is not None:
            detail = f"{pointer}: NaN and infinities are no numbers of JSON"
            raise InvalidData(detail, (Violation(pointer, "expected a finite number"),))
    return canonical


def _not_finite(tree: Any, pointer: str = "") -> str | None:
    """Return the JSON Pointer of the first float that is NaN or infinite, or None."""
    if isinstance(tree, float):
        return None if math.isfinite(tree) else pointer
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found = (_not_finite(inner, f"{pointer}/{escaped(str(key))}") for key, inner in parts)
    return next((each for each in found if each is not None), None)


def _msgpack(data: Any) -> bytes:
    try:
        return _sorted_msgpack(data)
    except TypeError:
        return msgspec.msgpack.encode(data)


class ModelData(NamedTuple, Generic[T]):
    """Valid data of a model, and its canonical JSON."""

    data: T
    json: bytes

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.json).hexdigest()


class Codec(Generic[T]):
    """Decodes, encodes and indexes the data of one model: a msgspec Struct, a dataclass or a TypedDict.

    `fields` has the kind of each indexed field, and `unique` the names of the unique ones. `has_blobs` says whether the
    data can refer to blobs. Raises ConfigError if the model or an indexed field cannot be used.
    """

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
        self._unknown = UnknownFields(info)
        self._has_raw = any(isinstance(node, msgspec.inspect.RawType) for node in nodes(info))
        self._blobs = BlobFinder(model.__name__, info)
        self.has_blobs = self._blobs.exists
        self._paths = [FieldPath(model, given) for given in map(_indexed_field, indexed_fields)]
        self._lists = [path for path in self._paths if path.kind.is_list]
        self.fields: Mapping[str, FieldKind] = {path.name: path.kind for path in self._paths}
        self.unique = tuple(path.name for path in self._paths if path.unique)
        self._omits_defaults = any(path.omits_defaults for path in self._paths)
        if len(self.fields) != len(self._paths):
            raise ConfigError(f"{model.__name__} has a field that is indexed twice")

    @property
    def has_raw(self) -> bool:
        """Return whether the model has a `msgspec.Raw`, whose text is kept as it is in JSON bodies only."""
        return self._has_raw

    def parse(self, body: bytes) -> ModelData[T]:
        """Decode and validate JSON from a client.

        Raises InvalidData if the JSON does not fit the model, has unknown fields, has a key twice in one object, has
        keys that the model reads as equal, has a number that no decoder reads, or has an invalid reference to a blob.
        """
        try:
            data = self._json.decode(body)
            canonical = canonical_json(data)
            # msgspec only looks for the end of a Raw, which may have a key twice or a number that no decoder reads.
            if (self._has_raw or canonical != body) and not self._unknown.has_none(body):
                violations = tuple(itertools.islice(self._unknown.violations(_decode_strictly(body)), MAX_VIOLATIONS))
                if violations:
                    raise InvalidData(_summary(self.model, violations), violations)
            if self.has_blobs:
                self._blobs.check(data)
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
        return ModelData(data, canonical)

    def accept(self, data: T | ModelData[T]) -> ModelData[T]:
        """Validate data from Python as if a client had sent it. A Struct's constructor checks no types.

        A ModelData is valid already and is returned unchanged. Raises InvalidData, also if JSON cannot express all of
        the data.
        """
        if isinstance(data, ModelData):
            return data
        try:
            canonical = strict_json(data)
        except InvalidData:
            raise
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidData(f"the data cannot be encoded: {error}", (Violation("", str(error)),)) from None
        if (depth := excessive_depth(canonical)) is not None:
            detail = f"nested {depth} deep, expected at most {MAX_STORED_DEPTH}"
            raise InvalidData(f"the data is {detail}", (Violation("", detail),))
        return self.parse(canonical)

    def references(self, data: T) -> list[BlobReference]:
        """Return the references to blobs in data, in the order of its fields."""
        return list(self._blobs.references(data)) if self.has_blobs else []

    def with_sizes(self, model_data: ModelData[T], sizes: Mapping[str, int]) -> ModelData[T]:
        """Return the same data with these sizes in its references to blobs, by their SHA-256."""
        if not self._blobs.set_sizes(model_data.data, sizes):
            return model_data
        return ModelData(model_data.data, canonical_json(model_data.data))

    def encode(self, model_data: ModelData[T], encoding: Encoding) -> bytes:
        """Return the body to store. Raises InvalidData for integers outside 64 bits in MessagePack."""
        if encoding == Encoding.json:
            return model_data.json
        try:
            # A Raw contains JSON, so it must be decoded before it is encoded as MessagePack.
            return _msgpack(msgspec.json.decode(model_data.json) if self._has_raw else model_data.data)
        except OverflowError:
            detail = "integers outside 64 bits cannot be stored as MessagePack"
            raise InvalidData(detail, (Violation("", detail),)) from None

    def decode(self, body: bytes, encoding: str) -> T:
        """Decode a stored body into the model."""
        if encoding == Encoding.json:
            return self._json.decode(body)
        return self._json.decode(self.to_json(body, encoding)) if self._has_raw else self._msgpack.decode(body)

    def to_json(self, body: bytes, encoding: str) -> bytes:
        """Return a stored body as JSON. A JSON body is returned unchanged, also if it no longer fits the model."""
        if encoding == Encoding.json:
            return body
        if not self._has_raw:
            with contextlib.suppress(msgspec.ValidationError):
                return canonical_json(self._msgpack.decode(body))
        return canonical_json(msgspec.msgpack.decode(body))

    def has_path(self, path: str) -> bool:
        """Return whether the JSON of the data may have the path `a.b`."""
        owner: Any = self.model
        for part in path.split("."):
            if owner is Any:
                return True
            try:
                owner, step = step_of(self.model, owner, part, path)
            except ConfigError:
                return False
            if step[0] != part:  # a name in Python that differs from the name in JSON
                return False
        return True

    def index(self, data: T, before: Any = MISSING) -> IndexEntry:
        """Return the index entry of data. Raises InvalidData if stores cannot compare a value.

        before  the data that is replaced, as a tree of JSON. If it has the same value, the value is left out of the
                entry and nothing is raised. Such a value was stored before its field was indexed, and must not prevent
                changes of the other fields.
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
        if self._omits_defaults:  # the JSON of the data has no defaults, so the entry must have none
            shown = project(msgspec.json.decode(canonical_json(data)), list(self.fields))
        return IndexEntry(keys, tuple(missing), canonical_json(shown))

    def items(self, data: T) -> dict[str, int]:
        """Return how many items each indexed list has."""
        values = {path.name: path.read(data) for path in self._lists}
        return {name: len(value) for name, value in values.items() if value is not None and value is not MISSING}

    def items_kept(self, tree: Any) -> dict[str, int]:
        """Return how many items each indexed list of a tree of JSON has. The tree need not fit the model."""
        values = {path.name: path.read_loosely(tree) for path in self._lists}
        return {name: len(value) for name, value in values.items() if value is not None and value is not MISSING}

    def index_stored(self, json: bytes) -> IndexEntry:
        """Return the index entry of stored data.

        If the data no longer fits the model, the entry has only the fields that fit.
        """
        try:
            return self.index(self._json.decode(json))
        except (msgspec.ValidationError, InvalidData):
            return self.index_kept(msgspec.json.decode(json))

    def index_kept(self, *trees: Any) -> IndexEntry:
        """Return the index entry of trees of JSON that may not fit the model.

        Each field is taken from the first tree that has a value of its type.
        """
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


class CodecIndex(IndexOf):
    """Makes index entries of stored bodies with a codec."""

    def __init__(self, codec: Codec[Any]) -> None:
        self._codec = codec

    @override
    def __call__(self, body: bytes, encoding: Encoding) -> IndexEntry:
        return self._codec.index(self._codec.decode(body, encoding))

    @override
    def kept(self, body: bytes | None, encoding: Encoding, shown: bytes) -> IndexEntry:
        return self._codec.index_kept(_loosely_decoded(body, encoding), _loosely_decoded(shown, Encoding.json))


def _loosely_decoded(body: bytes | None, encoding: Encoding) -> Any:
    """Decode a body without the model, and return it as a tree of JSON; None if it cannot be decoded."""
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


def _summary(model: type, violations: Sequence[Violation]) -> str:
    if any(each.detail.startswith(UNKNOWN) for each in violations):
        return f"the data has fields that {model.__name__} does not have"
    return f"the data does not fit: {violations[0].detail} at {violations[0].pointer}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises InvalidData if the object has a key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        detail = f"the key {twice!r} stands twice in one object"
        raise InvalidData(detail, (Violation("", detail),))
    return found


_strict_json = json.JSONDecoder(object_pairs_hook=_distinct).decode


def _decode_strictly(body: bytes) -> Any:
    """Return a tree of JSON.

    Raises InvalidData if an object has a key twice, and msgspec.DecodeError if the text is not JSON. msgspec keeps only
    one of two equal keys. So if the tree has as many strings as the text, no object has a key twice.
    """
    tree = msgspec.json.decode(body)  # no NaN, UTF-8 only
    return tree if strings(body) == strings(msgspec.json.encode(tree)) else _strict_json(body.decode())


def parse_json(body: bytes) -> Any:
    """Return the tree of JSON from a client that has no model, such as a patch. Raises InvalidData."""
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
    """Return the error for a body that is not JSON.

    The message names an unpaired surrogate, which msgspec calls truncated data, an error of UTF-16 or of an escape.
    """
    said = str(error)
    if any(word in said for word in ("truncated", "surrogate", "hex escape")):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(body.decode())  # accepts unpaired surrogates
            said = "it has an unpaired surrogate (one of \\ud800 to \\udfff by itself), which is no character"
    return InvalidData(f"the body is not JSON: {said}", (Violation("", said),))


def invalid_data(error: msgspec.ValidationError) -> InvalidData:
    """Return the error of a validation, with the position of the invalid value as a JSON Pointer.

    The messages of msgspec end with the position: "Expected `str`, got `int` - at `$.tags[0]`".
    """
    detail, _, place = str(error).partition(" - at `")
    return InvalidData(f"the data does not fit: {error}", (Violation(_pointer(place.rstrip("`")), detail),))


def _pointer(place: str) -> str:
    parts = re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place)
    return "".join(f"/{escaped(name) if name else ('*' if index == '...' else index)}" for name, index in parts)
