"""What a ResourceManager returns."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from ..basic import Encoding, ResourceMeta, RevisionInfo, Version
from .codec import Codec

T = TypeVar("T")

_decode_meta = msgspec.json.Decoder(ResourceMeta).decode
_encode = msgspec.json.Encoder().encode


class Resource(Generic[T]):
    """A resource with its data, each as an object and as JSON. `info` is the record of the revision, where one was asked for."""

    __slots__ = ("_codec", "_meta", "info", "json")

    def __init__(
        self, codec: Codec[T], meta: ResourceMeta | bytes, json: bytes, info: RevisionInfo | None = None
    ) -> None:
        self._codec, self._meta, self.json, self.info = codec, meta, json, info

    @property
    def meta(self) -> ResourceMeta:
        meta = self._meta
        if isinstance(meta, bytes):
            meta = self._meta = _decode_meta(meta)
        return meta

    @property
    def meta_json(self) -> bytes:
        return self._meta if isinstance(self._meta, bytes) else _encode(self._meta)

    @property
    def data(self) -> T:
        return self._codec.decode(self.json, Encoding.json)

    @property
    def version(self) -> Version:
        return Version(self.meta.version, self.meta.nonce)
