"""The values that pass between the engine and its stores: metadata, records of revisions, index entries, changes."""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from ..errors import CrudError
from ..values import FieldKind, Key

T = TypeVar("T")

Status = Literal["draft", "stable"]


class Encoding(enum.StrEnum):
    """The encoding of a stored body. The metadata name it, so old bodies stay readable if the setting changes."""

    json = "json"
    msgpack = "msgpack"


class ResourceMeta(Struct, frozen=True, kw_only=True):
    """A resource's metadata: its state after the last commit.

    Every change increments `version` by one and draws a new random `nonce`; together they are the ETag.
    `revision` is the number of the current revision, and `uid` is the address of its body. `status`, `data_hash`
    (SHA-256 of the canonical JSON, hex) and `encoding` are those of that revision. Revisions are numbered from 1 to
    `total_revision_count`; retention may have removed some. Times are UTC.
    """

    resource_id: str
    version: int
    nonce: str
    revision: int
    total_revision_count: int
    schema_version: int
    status: Status
    is_deleted: bool
    uid: str
    data_hash: str
    encoding: Encoding
    created_time: dt.datetime
    updated_time: dt.datetime
    created_by: str
    updated_by: str

    @property
    def etag(self) -> str:
        """The ETag of this state, in quotes: `"3-0123456789abcdef"`."""
        return Version(self.version, self.nonce).etag


class RevisionInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record of one revision. `parent` is the number of the revision that it is based on; None for the first.

    `blobs` are the keys of the blobs that its data refers to, ascending (see BlobRow). The key is left out of stored
    documents if it is empty, so that models without blobs are stored as before.
    """

    uid: str
    resource_id: str
    revision: int
    parent: int | None
    schema_version: int
    status: Status
    data_hash: str
    encoding: Encoding
    created_time: dt.datetime
    updated_time: dt.datetime
    created_by: str
    updated_by: str
    blobs: tuple[str, ...] = ()

    @classmethod
    def of_change(cls, meta: ResourceMeta, parent: int | None, blobs: tuple[str, ...] = ()) -> RevisionInfo:
        """Return the record of a new revision. `meta` is the metadata after the change that makes the revision."""
        return cls(
            uid=meta.uid,
            resource_id=meta.resource_id,
            revision=meta.revision,
            parent=parent,
            schema_version=meta.schema_version,
            status=meta.status,
            data_hash=meta.data_hash,
            encoding=meta.encoding,
            created_time=meta.updated_time,
            updated_time=meta.updated_time,
            created_by=meta.updated_by,
            updated_by=meta.updated_by,
            blobs=blobs,
        )

    @property
    def meta_fields(self) -> dict[str, Any]:
        """The fields that a resource's metadata takes from this record if this is the current revision."""
        return {
            "revision": self.revision,
            "schema_version": self.schema_version,
            "status": self.status,
            "uid": self.uid,
            "data_hash": self.data_hash,
            "encoding": self.encoding,
        }


class Version(NamedTuple):
    """Exactly one state of a resource. Its ETag is `"VERSION-NONCE"`; only this class writes and reads ETags."""

    version: int
    nonce: str

    @property
    def etag(self) -> str:
        """The ETag of this state, in quotes: `"3-0123456789abcdef"`."""
        return f'"{self.version}-{self.nonce}"'

    @classmethod
    def of_opaque_tag(cls, text: str) -> Version:
        """Return the state that an ETag names; `text` is the ETag without its quotes.

        Returns NO_STATE if no resource can have this ETag.
        """
        found = _OPAQUE_TAG.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else NO_STATE


_OPAQUE_TAG = re.compile(r"([0-9]{1,18})-([0-9a-f]{16})")
NO_STATE = Version(-1, "")
"""The state that stands for all ETags that are not in our format. No resource is ever in it."""


Expect = Literal["absent"] | Version
"""The state that a commit replaces: none (the resource must not exist), or exactly one."""


class IndexEntry(Struct, frozen=True):
    """The searchable values of a revision.

    keys     the keys of the indexed fields (see `values`); a list of keys for a list, None for null or missing
    missing  the indexed fields that have no value, not even null
    shown    the indexed fields as JSON, nested as in the data
    """

    keys: dict[str, Key | list[Key] | None]
    missing: tuple[str, ...]
    shown: bytes


class Change(Struct, frozen=True, kw_only=True):
    """One resource's part of a commit.

    meta    the new metadata
    record  the new or changed record of a revision, if there is one
    index   the new index entry of the current revision; None: the entry does not change
    expect  the state that the change replaces. Only a change for `apply_committed` may have "any"; a commit refuses it
    drop    uids of revisions whose records are removed (retention, or a draft's former body)
    purge   erase the resource and all its records
    """

    meta: ResourceMeta
    record: RevisionInfo | None
    index: IndexEntry | None
    expect: Expect | Literal["any"]
    drop: tuple[str, ...] = ()
    purge: bool = False


class IndexedField:
    """A field that can be searched: `IndexedField("email", str, unique=True)`.

    A name with dots, such as `author.name`, leads into nested data. If no type is given, it is taken from the model.
    """

    __slots__ = ("name", "type", "unique")

    def __init__(self, name: str, type: Any = None, unique: bool = False) -> None:
        self.name, self.type, self.unique = name, type, unique


class ModelSpec(Struct, frozen=True):
    """The properties of a model that a store is given when it is bound."""

    name: str
    fields: Mapping[str, FieldKind] = {}
    unique: tuple[str, ...] = ()
    schema_version: int = 1
    encoding: Encoding | None = None  # as given to add_model or AutoCRUD; an argument of the store takes precedence


class Page(Struct, Generic[T], frozen=True):
    """A page of results. `next` is the position where the next page starts; None on the last page."""

    items: list[T]
    next: Any = None


_meta_decoder = msgspec.json.Decoder(ResourceMeta)
_encode_json = msgspec.json.Encoder().encode


class Hit(NamedTuple):
    """A resource that a query found.

    document  its ResourceMeta as JSON, which most callers pass on unchanged; `meta` decodes it
    uid       the address of its body
    encoding  the encoding of its body, the value of an Encoding
    shown     its indexed fields as JSON
    """

    document: bytes
    uid: str
    encoding: str
    shown: bytes

    @classmethod
    def of(cls, meta: ResourceMeta, shown: bytes) -> Hit:
        """Return the hit of a resource. `shown`: its indexed fields as JSON."""
        return cls(_encode_json(meta), meta.uid, meta.encoding, shown)

    @property
    def meta(self) -> ResourceMeta:
        """Decode the metadata."""
        return _meta_decoder.decode(self.document)


class Reindex(NamedTuple):
    """A new index entry for a resource, valid only while it is in this state."""

    resource_id: str
    expect: Version
    entry: IndexEntry


class Findings(Struct, frozen=True):
    """Problems that were found when a model was indexed. The store keeps them; see `storage.reindexing`.

    healed  whether the index entries that earlier programs dropped were made again
    lost    ids of resources whose bodies are lost or damaged
    shared  ids of resources with a value of a unique field that another resource has too
    """

    healed: bool = False
    lost: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


class BlobRow(Struct, frozen=True, kw_only=True):
    """The row of a stored blob: one upload that was received in full.

    key    `{sha256}/{uid}`: the SHA-256 of the content in hex, and an id that no other upload of the model ever has
    size   in bytes
    owner  SHA-256 of the name of the caller that uploaded it, in hex: see `owner_of`
    """

    key: str
    size: int
    owner: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of the content, in hex."""
        return self.key.partition("/")[0]


def owner_of(name: str) -> str:
    """Return what the rows of blobs keep of the name of a caller: its SHA-256, in hex."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


BLOB_KEY = re.compile(r"[0-9a-f]{64}/(0|[1-9][0-9]{0,17})-[0-9a-f]{32}")
"""The key of a blob. The uid is the epoch in which the upload began, and the hex digits of a UUID.

No uid of a body looks like it: the number is followed by a dash, and not by a slash.
"""


def blob_epoch_of(key: str) -> int:
    """Return the epoch in which an upload began. Raises ValueError if it is no key of a blob."""
    found = BLOB_KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key!r} is no key of a blob")
    return int(found[1])


class StoredKey(Struct, frozen=True, kw_only=True):
    """The results that a store keeps for one Idempotency-Key: see IdempotentCommit.

    results  the metadata that each operation left; None if the resource was purged by it or since
    """

    key: str
    request: str
    time: int
    results: tuple[ResourceMeta | None, ...]


class Write(NamedTuple):
    """A change, and the body that its record names; None if the change stores no new body."""

    change: Change
    body: bytes | None


class IdempotentCommit(Struct, frozen=True, kw_only=True):
    """The Idempotency-Key of a commit. It is stored by the commit itself, so that the commit happens once.

    key      SHA-256 of the caller's name and the key, in hex
    request  SHA-256 of the request, in hex
    time     microseconds since 1970
    results  the result of each operation: the position of its change in this commit, the metadata if it changed
             nothing, or None for a purge, of which nothing may be kept
    """

    key: str
    request: str
    time: int
    results: tuple[int | ResourceMeta | None, ...]


class CommitResult(NamedTuple):
    """A commit that carried an Idempotency-Key.

    request  SHA-256 of the request, in hex
    results  the metadata that each operation left; None if the resource was purged by it or since
    """

    request: str
    results: list[ResourceMeta | None]


class AlreadyCommitted(CrudError):
    """An earlier commit carried the same Idempotency-Key. Raised by stores for the engine; callers never see it."""

    def __init__(self, done: CommitResult) -> None:
        super().__init__("this key was used before")
        self.done = done


KEEP_KEYS_US = 24 * 3600 * 1_000_000
"""Shortest time for which a key is kept, in microseconds. The times of the commits with keys decide, not a clock."""
