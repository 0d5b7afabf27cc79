"""What passes between the engine and its stores: metadata, records of revisions, index entries and changes."""

from __future__ import annotations

import datetime as dt
import enum
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
    """How a body is stored. Each stored body names its own, so changing the setting leaves old data readable."""

    json = "json"
    msgpack = "msgpack"


class ResourceMeta(Struct, frozen=True, kw_only=True):
    """A resource's metadata: its state after the last commit.

    `version` grows by one at every commit and `nonce` is random at every commit; together they are the ETag.
    `revision` is the number of the current revision, `uid` the address of its body, and `status`, `data_hash` (SHA-256 of the
    canonical JSON, hex) and `encoding` are that revision's. Revisions are numbered from 1 to `total_revision_count`;
    retention may have removed some. Times are UTC.
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


class RevisionInfo(Struct, frozen=True, kw_only=True):
    """The record of one revision. `parent` is the revision that it was made from, None for the first."""

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
"""The state that every foreign ETag names: no resource is ever in it."""


Expect = Literal["absent", "any"] | Version
"""What a change replaces: nothing, whatever is there (or nothing), or exactly one state."""


class IndexEntry(Struct, frozen=True):
    """What can be searched of a revision.

    keys     the indexed fields' keys (see `values`); a list of keys for a list, None for null or missing
    missing  the indexed fields that are not there at all
    shown    the indexed fields as JSON, shaped as in the data
    """

    keys: dict[str, Key | list[Key] | None]
    missing: tuple[str, ...]
    shown: bytes


class Change(Struct, frozen=True, kw_only=True):
    """One resource's part of a commit.

    meta    the new metadata; with `expect="any"` the store sets the version to the one after what it replaces
    record  a revision's new or changed record, if it has one
    index   what the current revision is found by; None leaves it as it is
    expect  what the change replaces
    drop    uids of revisions whose records go (retention, or a draft's former body)
    purge   erase the resource and all its records
    """

    meta: ResourceMeta
    record: RevisionInfo | None
    index: IndexEntry | None
    expect: Expect
    drop: tuple[str, ...] = ()
    purge: bool = False


class IndexedField:
    """A field that can be searched: `IndexedField("email", str, unique=True)`; dots reach into nested data.

    Without a type it is taken from the model.
    """

    __slots__ = ("name", "type", "unique")

    def __init__(self, name: str, type: Any = None, unique: bool = False) -> None:
        self.name, self.type, self.unique = name, type, unique


class ModelSpec(Struct, frozen=True):
    """What a store learns of a model when it is bound."""

    name: str
    fields: Mapping[str, FieldKind] = {}
    unique: tuple[str, ...] = ()
    schema_version: int = 1
    encoding: Encoding | None = None  # as given to add_model or AutoCRUD; a store's own argument wins


class Page(Struct, Generic[T], frozen=True):
    """Some items; `next` is where the next page starts, None at the end."""

    items: list[T]
    next: Any = None


_meta_decoder = msgspec.json.Decoder(ResourceMeta)
_encode_json = msgspec.json.Encoder().encode


class Hit(NamedTuple):
    """A resource that was found.

    `document` is its ResourceMeta as JSON, which most callers pass on as it is; `meta` decodes it. `uid` and `encoding` (the value of
    an Encoding) lead to the body, `shown` is the indexed fields as JSON.
    """

    document: bytes
    uid: str
    encoding: str
    shown: bytes

    @classmethod
    def of(cls, meta: ResourceMeta, shown: bytes) -> Hit:
        return cls(_encode_json(meta), meta.uid, meta.encoding, shown)

    @property
    def meta(self) -> ResourceMeta:
        return _meta_decoder.decode(self.document)


class Reindex(NamedTuple):
    """A new index entry for a resource, valid only while it is in this state."""

    resource_id: str
    expect: Version
    entry: IndexEntry


class Findings(Struct, frozen=True):
    """What was found when a model was indexed, as its store keeps it; see `reindexing`.

    healed  the index entries that programs before this one had dropped were made again
    lost    ids of resources whose bodies are lost or damaged
    shared  ids of resources with a value of a unique field that another one has
    """

    healed: bool = False
    lost: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


class Write(NamedTuple):
    """A change, and the body that its record names (None where the body exists already)."""

    change: Change
    body: bytes | None


class IdempotentCommit(Struct, frozen=True, kw_only=True):
    """An Idempotency-Key as stores see it: a part of the commit, so that the commit happens once.

    key      who asked and under which key (SHA-256, hex)
    request  what was asked (SHA-256, hex)
    time     microseconds since 1970
    results  what each operation left: the number of a change of this commit, the metadata where nothing was changed, or None where
             nothing may be kept (a purge)
    """

    key: str
    request: str
    time: int
    results: tuple[int | ResourceMeta | None, ...]


class CommitResult(NamedTuple):
    """A commit that a key was part of: what was asked, and what it left; None where that was purged since."""

    request: str
    results: list[ResourceMeta | None]


class AlreadyCommitted(CrudError):
    """What a commit raises whose key was part of an earlier one; callers never see this."""

    def __init__(self, done: CommitResult) -> None:
        super().__init__("this key was used before")
        self.done = done


KEEP_KEYS_US = 24 * 3600 * 1_000_000
"""How long a key is remembered at least, in the time of the commits that carry keys."""
