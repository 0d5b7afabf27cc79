"""The encodings of stored metadata and records: JSON or MessagePack. The first byte shows which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ...errors import StoreDamaged
from ..basic import Encoding, Hit, ResourceMeta, RevisionInfo

BRACE = ord("{")
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, IndexError, TypeError, ValueError)

_encoders: dict[Encoding, Callable[[Any], bytes]] = {
    Encoding.json: msgspec.json.Encoder().encode,
    Encoding.msgpack: msgspec.msgpack.Encoder().encode,
}
_meta_json, _meta_msgpack = msgspec.json.Decoder(ResourceMeta), msgspec.msgpack.Decoder(ResourceMeta)
_info_json, _info_msgpack = msgspec.json.Decoder(RevisionInfo), msgspec.msgpack.Decoder(RevisionInfo)


def encoder(encoding: Encoding) -> Callable[[Any], bytes]:
    """Return the function that encodes metadata or a record."""
    return _encoders[encoding]


def is_json(doc: bytes) -> bool:
    """Return whether a document is JSON. No MessagePack map starts with a brace."""
    return doc[0] == BRACE


def meta_of(doc: Any, resource_id: object = None) -> ResourceMeta:
    """Return metadata as it was stored. Raises StoreDamaged, which names the resource if its id is given."""
    try:
        return _meta_json.decode(doc) if is_json(doc) else _meta_msgpack.decode(doc)
    except UNDECODABLE:
        raise _undecodable("metadata", resource_id) from None


def hit_of(doc: bytes, uid: str, encoding: str, shown: bytes) -> Hit:
    """Return a hit with its metadata as JSON.

    Damaged metadata are returned as stored, so that one damaged resource does not hide the others.
    """
    try:
        return Hit.of(meta_of(doc), shown)
    except StoreDamaged:
        return Hit(doc if isinstance(doc, bytes) else b"", uid, encoding, shown)


def info_of(doc: Any, resource_id: object = None) -> RevisionInfo:
    """Return a stored record of a revision. Raises StoreDamaged, which names the resource if its id is given."""
    try:
        return _info_json.decode(doc) if is_json(doc) else _info_msgpack.decode(doc)
    except UNDECODABLE:
        raise _undecodable("record of a revision", resource_id) from None


def _undecodable(what: str, resource_id: object) -> StoreDamaged:
    of = "a resource" if resource_id is None else f"resource {resource_id!r}"
    error = StoreDamaged(f"the {what} of {of} cannot be decoded; restore it from a backup")
    error.resource_id = resource_id if isinstance(resource_id, str) else None
    return error
