"""The check of the bodies of an archive: each one must be a document that the server can decode whenever it answers.

No model is used. A body that does not fit the model of today is imported. A body that fits it is checked too, because
decoders with a type skip the fields that the type does not have.
"""

from __future__ import annotations

import msgspec

from ..resource_manager.basic import Encoding, RevisionInfo
from ..resource_manager.model.codec import canonical_json
from ..resource_manager.model.json_shape import MAX_STORED_DEPTH, excessive_depth
from ..resource_manager.model.verification import UNDECODABLE
from .errors import BadArchive

_json = msgspec.json.Decoder().decode
_msgpack = msgspec.msgpack.Decoder().decode


def check_body(record: RevisionInfo, body: bytes) -> None:
    """Raise BadArchive unless a body is a JSON object, or a MessagePack map that can be written as a JSON object."""
    try:
        if record.encoding == Encoding.json:
            tree, text = _json(body), body
        else:
            tree = _msgpack(body)
            text = canonical_json(tree)
    except (*UNDECODABLE, OverflowError) as error:
        raise _bad(record, f"cannot be decoded as {record.encoding}: {error}") from None
    if not isinstance(tree, dict):
        raise _bad(record, "is not an object")
    if (depth := excessive_depth(text)) is not None:
        raise _bad(record, f"is nested {depth} deep, expected at most {MAX_STORED_DEPTH}")


def _bad(record: RevisionInfo, what: str) -> BadArchive:
    return BadArchive(f"the body of revision {record.revision} of resource {record.resource_id!r} {what}")
