"""The checks of the bodies of an archive.

`check_body`: each body must be a document that the server can decode whenever it answers. It uses no model, so a body
that does not fit the model of today is imported. A body that fits it is checked too, because decoders with a type skip
the fields that the type does not have.

`check_hash`: a body in MessagePack must have the hash of its record, which is that of its JSON. The hash of a JSON body
is compared without a model.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from ..errors import InvalidData
from ..resource_manager.basic import Encoding, RevisionInfo
from ..resource_manager.model.codec import Codec, canonical_json, distinct_json
from ..resource_manager.model.json_shape import MAX_STORED_DEPTH, excessive_depth
from ..resource_manager.model.verification import UNDECODABLE
from .errors import BadArchive

_json = msgspec.json.Decoder().decode
_msgpack = msgspec.msgpack.Decoder().decode
_as_json = msgspec.json.Encoder().encode
_SIZES = (
    *((0, 0), (0, 0), (0, 0), (0, 0)),  # nil, unused, false, true
    *((1, 0), (2, 0), (4, 0)),  # bytes
    *((1, 1), (2, 1), (4, 1)),  # extensions, whose type takes a byte
    *((0, 4), (0, 8)),  # floats
    *((0, 1), (0, 2), (0, 4), (0, 8), (0, 1), (0, 2), (0, 4), (0, 8)),  # integers
    *((0, 2), (0, 3), (0, 5), (0, 9), (0, 17)),  # extensions of fixed sizes
    *((1, 0), (2, 0), (4, 0)),  # text
    *((2, 0), (4, 0), (2, 0), (4, 0)),  # arrays, maps
)
"""For each code of MessagePack from 0xc0 to 0xdf: the bytes of the size that follows it, and of what follows then."""
_as_msgpack = msgspec.msgpack.Encoder().encode


def check_body(record: RevisionInfo, body: bytes) -> None:
    """Raise BadArchive unless a body is a JSON object, or a MessagePack map that can be written as a JSON object."""
    try:
        if record.encoding == Encoding.json:
            tree, text = _json(body), body
        else:
            tree = _msgpack(body)
            text = distinct_json(tree)
    except InvalidData as error:
        raise _bad(record, f"cannot be written as JSON: {error.detail}") from None
    except (*UNDECODABLE, OverflowError) as error:
        raise _bad(record, f"cannot be decoded as {record.encoding}: {error}") from None
    if not isinstance(tree, dict):
        raise _bad(record, "is not an object")
    if (depth := excessive_depth(text)) is not None:
        raise _bad(record, f"is nested {depth} deep, expected at most {MAX_STORED_DEPTH}")
    if record.encoding != Encoding.json and _has_key_twice(tree, body):
        raise _bad(record, "cannot be written as JSON: a key stands twice in one map")


def _has_key_twice(tree: Any, body: bytes) -> bool:
    """Return whether a map of a MessagePack body has a key twice. `tree`: what the body was decoded to."""
    # A decoder keeps one of two equal keys. But a body also differs from what is encoded again if a map has a longer
    # header than it needs, as that of a Struct without its defaults. So then the keys are counted.
    if _as_msgpack(tree) == body:
        return False
    return _keys_in(body) != sum(len(node) for node in _nodes(tree) if isinstance(node, dict))


def _keys_in(body: bytes) -> int:
    """Return how many keys the maps of a MessagePack body have together. The body was decoded, so it is well-formed."""
    at = keys = 0
    while at < len(body):
        code = body[at]
        at += 1
        if code < 0x80 or code >= 0xE0 or 0x90 <= code < 0xA0:  # an integer, or the header of an array
            continue
        if code < 0x90:
            keys += code & 0x0F
        elif code < 0xC0:
            at += code & 0x1F
        else:
            length, fixed = _SIZES[code - 0xC0]
            size = int.from_bytes(body[at : at + length], "big")
            at += length + fixed
            if code in (0xDE, 0xDF):
                keys += size
            elif code not in (0xDC, 0xDD):
                at += size
    return keys


def _nodes(tree: Any) -> Iterator[Any]:
    """Yield all values and keys of a decoded tree."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, dict):
            waiting.extend(node)
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def check_hash(codec: Codec[Any], record: RevisionInfo, body: bytes, data: Any) -> None:
    """Raise BadArchive if a MessagePack body has another hash than its record says, and `check_body` accepted it.

    data  the body as data of the model; None if it does not fit

    The hash is that of the JSON at the time of the write. That JSON had the fields in the order of the model, which is
    the order of the body, unless a key was no text: then all keys were sorted. If neither has the hash, the JSON of the
    model of today is tried.

    Two kinds of bodies are accepted without the check, because MessagePack does not keep the form that their JSON had:
    those with a timestamp, which has lost its UTC offset, and those of a model with a `msgspec.Raw`.
    """
    if record.encoding == Encoding.json or codec.has_raw:
        return
    tree = _msgpack(body)
    if record.data_hash in _hashes(tree, data) or any(isinstance(node, dt.datetime) for node in _nodes(tree)):
        return
    raise _bad(
        record,
        f"has another hash than its record says: its record has {record.data_hash}, expected the SHA-256 of its"
        " canonical JSON",
    )


def _hashes(tree: Any, data: Any) -> Iterator[str]:
    """Yield the hash of each JSON that a MessagePack body may come from."""
    yield hashlib.sha256(_as_json(tree)).hexdigest()
    yield hashlib.sha256(canonical_json(tree)).hexdigest()
    if data is not None:
        with contextlib.suppress(*UNDECODABLE, OverflowError):
            yield hashlib.sha256(canonical_json(data)).hexdigest()


def _bad(record: RevisionInfo, what: str) -> BadArchive:
    return BadArchive(f"the body of revision {record.revision} of resource {record.resource_id!r} {what}")
