"""How metadata and records are stored: as JSON or MessagePack, each document telling by its first byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .basic import Encoding, ResourceMeta, RevisionInfo

BRACE = ord("{")

_encoders: dict[Encoding, Callable[[Any], bytes]] = {
    Encoding.json: msgspec.json.Encoder().encode,
    Encoding.msgpack: msgspec.msgpack.Encoder().encode,
}
_meta_json, _meta_msgpack = msgspec.json.Decoder(ResourceMeta), msgspec.msgpack.Decoder(ResourceMeta)
_info_json, _info_msgpack = msgspec.json.Decoder(RevisionInfo), msgspec.msgpack.Decoder(RevisionInfo)


def encoder(encoding: Encoding) -> Callable[[Any], bytes]:
    return _encoders[encoding]


def is_json(doc: bytes) -> bool:
    """No map of MessagePack starts with a brace."""
    return doc[0] == BRACE


def meta_of(doc: Any) -> ResourceMeta:
    return _meta_json.decode(doc) if is_json(doc) else _meta_msgpack.decode(doc)


def info_of(doc: Any) -> RevisionInfo:
    return _info_json.decode(doc) if is_json(doc) else _info_msgpack.decode(doc)
