"""Verification of stored data: bodies are compared with their hash when they are read, and damage is remembered.

- V1 *A body is returned only if it is the one that was stored.* The SHA-256 of a JSON body is compared with the
  `data_hash` of its metadata. The hash of a MessagePack body is that of its JSON at the time of the write. A later
  model may encode that JSON differently, so a MessagePack body is only decoded.
- V2 *Bytes that were verified once are verified by equality from then on.* A uid names one body for ever, so a body
  that equals the verified one is sound. Equality costs a tenth of a hash, which keeps lists fast. KEPT and LARGE bound
  the memory for it.
- V3 *A list contains only whole documents.* The metadata of a list is returned without being decoded, so it is decoded
  here when it is seen for the first time.

Nothing is verified if the store is in the memory of this process (`verified` is False): nothing can damage it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ...errors import StoreDamaged
from ..basic import Encoding, Hit, ResourceMeta, RevisionInfo
from ..runtime.threads import HEAVY_BYTES, heavy
from .codec import Codec

KEPT = 2000
"""Largest number of bodies of a model that are kept for comparison."""
LARGE = 4096
"""A body of more bytes is not kept, because hashing it again is cheap compared with reading it."""
REMEMBERED = 100
"""Largest number of damaged resources of a model that are remembered."""
NAMED = 5
"""Largest number of names in one sentence of `degradations`."""

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, TypeError)
"""Errors that decoding damaged data may raise."""
REMEDY = "restore it from a backup, or write the resource again or purge it"

_raw = msgspec.json.Decoder(msgspec.Raw).decode
_meta = msgspec.json.Decoder(ResourceMeta).decode


class Verifier:
    """Verifies the bodies of one model. If not `verified`, only decodes them (stores in memory)."""

    def __init__(self, codec: Codec[Any], *, verified: bool) -> None:
        self._codec, self._verified = codec, verified
        self._known: dict[str, tuple[str, bytes, bytes]] = {}  # by uid: hash, body, metadata JSON in the last list
        self._whole: dict[
            str, tuple[bytes, bytes]
        ] = {}  # by uid: metadata and indexed fields as JSON, in the last list

    def json(self, meta: ResourceMeta | RevisionInfo, body: bytes) -> bytes:
        """Return a body as JSON. Raises StoreDamaged if it is not the one that was stored."""
        if not self._verified:
            return self._codec.to_json(body, meta.encoding)
        known = self._known.get(meta.uid)
        if known is not None and known[1] == body and known[0] == meta.data_hash:
            return body
        return self._checked(meta, body, b"")

    async def read(self, meta: ResourceMeta | RevisionInfo, body: bytes) -> bytes:
        """Return a body as JSON, as `json` does. A large body is verified by `threads.heavy`."""
        if len(body) < HEAVY_BYTES or (not self._verified and meta.encoding == Encoding.json):
            return self.json(meta, body)
        return await heavy(len(body), lambda: self.json(meta, body), body)

    def page(self, hits: Sequence[Hit], bodies: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """Return the metadata and the data of each hit as JSON. Raises StoreDamaged if one of the bodies is damaged."""
        if not self._verified:
            to_json = self._codec.to_json
            return [(hit.document, to_json(body, hit.encoding)) for hit, body in zip(hits, bodies, strict=True)]
        known = self._known
        found = []
        for hit, body in zip(hits, bodies, strict=True):
            document = hit.document
            one = known.get(hit.uid)
            if one is None or one[1] != body or one[2] != document:
                body = self._checked(metadata_of(hit), body, document)
            found.append((document, body))
        return found

    def broken(self, hits: Sequence[Hit]) -> list[Hit]:
        """Return the hits whose metadata or indexed fields cannot be decoded."""
        if not self._verified:
            return []
        return [
            hit for hit in hits if self._whole.get(hit.uid) != (hit.document, hit.shown) and not self._is_whole(hit)
        ]

    def _is_whole(self, hit: Hit) -> bool:
        try:
            _meta(hit.document)
            _raw(hit.shown)
        except UNDECODABLE:
            return False
        if len(self._whole) >= KEPT:
            self._whole.clear()
        self._whole[hit.uid] = hit.document, hit.shown
        return True

    def _checked(self, meta: ResourceMeta | RevisionInfo, body: bytes, document: bytes) -> bytes:
        of = f"the data of revision {meta.revision} of resource {meta.resource_id!r}"
        try:
            json = self._codec.to_json(body, meta.encoding)
        except UNDECODABLE:
            raise damaged(meta.resource_id, f"{of} cannot be decoded; {REMEDY}") from None
        if meta.encoding == Encoding.json:
            if not is_sound(meta, json):
                raise damaged(meta.resource_id, f"{of} is not what was stored, its hash is another; {REMEDY}")
            if len(body) <= LARGE:
                if len(self._known) >= KEPT:
                    self._known.clear()
                self._known[meta.uid] = meta.data_hash, body, document
        return json


def is_sound(meta: ResourceMeta | RevisionInfo, body: bytes) -> bool:
    """Return whether a stored body has the hash of its metadata. Always True for MessagePack (V1)."""
    return meta.encoding != Encoding.json or hashlib.sha256(body).hexdigest() == meta.data_hash


def metadata_of(hit: Hit) -> ResourceMeta:
    """Return the metadata of a hit. Raises StoreDamaged if it cannot be decoded."""
    try:
        return _meta(hit.document)
    except UNDECODABLE:
        raise StoreDamaged(
            f"the metadata whose body is {hit.uid!r} cannot be decoded; restore it from a backup"
        ) from None


def damaged(resource_id: str, detail: str) -> StoreDamaged:
    """Return the error for a damaged resource."""
    error = StoreDamaged(detail)
    error.resource_id = resource_id
    return error


def named(error: StoreDamaged, resource_id: str) -> StoreDamaged:
    """Return an error that names the resource.

    An error that names one already, or that concerns the whole store, is returned unchanged.
    """
    if type(error) is not StoreDamaged or error.resource_id is not None:
        return error
    new = damaged(resource_id, f"resource {resource_id!r} cannot be read: {error.detail}")
    new.operation = error.operation
    return new


ANYTHING: Final = 0
Part = int | None
"""The part of a resource that could not be read: a revision by its number, the current revision (None), or an unknown
part (ANYTHING)."""


class DamagedResources:
    """The resources that this process could not read, up to REMEMBERED of them.

    A resource is forgotten when it can be read again, or no longer exists.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, Part], None] = {}
        self._unnamed: dict[str, None] = {}  # uids of the bodies of hits whose metadata is damaged

    def __bool__(self) -> bool:
        return bool(self._parts)

    def note(self, resource_id: str, part: Part) -> None:
        """Remember a part that could not be read."""
        if len(self._parts) < REMEMBERED:
            self._parts[resource_id, part] = None

    def note_hit(self, hit: Hit) -> None:
        """Remember a hit whose metadata could not be decoded."""
        if len(self._unnamed) < REMEMBERED:
            self._unnamed[hit.uid] = None

    def forget(self, resource_id: str, part: Part) -> None:
        """Forget a part, because it was read or no longer exists."""
        self._parts.pop((resource_id, part), None)

    def forget_all(self, resource_id: str) -> None:
        """Forget all parts of a resource, because it was purged."""
        for key in [key for key in self._parts if key[0] == resource_id]:
            del self._parts[key]

    def some(self, count: int) -> list[tuple[str, Part]]:
        """Return up to `count` parts, in turn, so that repeated calls return all of them."""
        found = list(self._parts)[:count]
        for key in found:
            self._parts[key] = self._parts.pop(key)
        return found

    def degradations(self) -> list[str]:
        """Return a sentence for each kind of damage that was found."""
        ids = list(dict.fromkeys(resource_id for resource_id, _ in self._parts))
        told = [
            (ids, "resources cannot be read as a whole, because stored data is damaged"),
            (self._unnamed, "resources are left out of lists, because their metadata is damaged; their bodies are"),
        ]
        return [
            f"{len(names)} {what}: {', '.join(list(names)[:NAMED])}{', ...' if len(names) > NAMED else ''}"
            for names, what in told
            if names
        ]
