"""Resource: the result of most methods of a ResourceManager."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from ..basic import Encoding, ResourceMeta, RevisionInfo, Version
from .codec import Codec

T = TypeVar("T")

_decode_meta = msgspec.json.Decoder(ResourceMeta).decode
_encode = msgspec.json.Encoder().encode


class Resource(Generic[T]):
    """A resource with its data, both as objects and as JSON. The objects are decoded when they are used.

    meta  its metadata, or the JSON of it
    json  its data as JSON
    info  the record of the revision, if a revision was asked for by its number
    """

    __slots__ = ("_codec", "_meta", "info", "json")

    def __init__(
        self, codec: Codec[T], meta: ResourceMeta | bytes, json: bytes, info: RevisionInfo | None = None
    ) -> None:
        self._codec, self._meta, self.json, self.info = codec, meta, json, info

    @property
    def meta(self) -> ResourceMeta:
        """Return the metadata."""
        meta = self._meta
        if isinstance(meta, bytes):
            meta = self._meta = _decode_meta(meta)
        return meta

    @property
    def meta_json(self) -> bytes:
        """Return the metadata as JSON."""
        return self._meta if isinstance(self._meta, bytes) else _encode(self._meta)

    @property
    def data(self) -> T:
        """Return the data. Each call decodes it again."""
        return self._codec.decode(self.json, Encoding.json)

    @property
    def version(self) -> Version:
        """Return the version and the nonce, for `expect` of a later write."""
        return Version(self.meta.version, self.meta.nonce)
