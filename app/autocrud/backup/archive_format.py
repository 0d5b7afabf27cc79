"""The entries of an archive, version 1. docs/archive-format.md describes them for authors of other programs.

    format.json                             the format and its version
    models/{model}/resources-{n}.ndjson     metadata and records of revisions
    models/{model}/bodies-{n}.bin           the bodies of these revisions
    models/{model}/keys-{n}.ndjson          results of Idempotency-Keys
    models/{model}/blobs-{n}.ndjson         rows of blobs
    models/{model}/blobs/{sha256}/{uid}     the content of each of these blobs
    manifest.json                           models, counts, and the SHA-256 of each part

Resources are in ascending order of their ids, revisions in that of their numbers, keys and blobs in that of their keys.
So a reader finds duplicates, and needs no memory for what it has read. All entries
but the content of blobs and the two JSON entries are called parts.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..resource_manager.basic import BlobRow, Encoding, ResourceMeta, RevisionInfo
from ..resource_manager.contract.limits import MAX_SCHEMA_VERSION, MAX_VERSION
from ..resource_manager.records import BLOB_KEY
from .errors import BadArchive

T = TypeVar("T")

FORMAT: Final = "crudstack-archive"
VERSION: Final = 1
FORMAT_ENTRY, MANIFEST_ENTRY = "format.json", "manifest.json"

MB = 1024 * 1024
MAX_PART = 8 * MB
"""Largest size of a part in bytes. Only a part with a single body may be larger."""
MAX_LINE = 256 * 1024
"""Largest size of a line in bytes, without its end."""
MAX_BODY = 256 * MB
"""Largest size of a body in bytes."""
MAX_BLOB = 5 * 1024 * MB
"""Largest size of a blob in bytes."""
MAX_MANIFEST = 32 * MB
MAX_PARTS = 100_000
MAX_ABSENT = 100_000
"""Largest number of resources of a model that were purged while the model was exported."""
BLOB_ROWS = 1000
"""Number of blobs whose rows are in one part, before their content."""

MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_BlobKey = Annotated[str, Meta(pattern=rf"\A{BLOB_KEY.pattern}\Z")]
_Text = Annotated[str, Meta(min_length=1)]
_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Number = Annotated[int, Meta(ge=1, le=2**62)]
_Time = Annotated[dt.datetime, Meta(tz=True)]


class ArchivedMeta(ResourceMeta, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metadata in a line, with the limits of its fields."""

    resource_id: _Text
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]
    nonce: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    revision: _Number
    total_revision_count: _Number
    schema_version: Annotated[int, Meta(ge=1, le=MAX_SCHEMA_VERSION)]
    uid: _Text
    data_hash: _Sha256
    created_time: _Time
    updated_time: _Time


class ArchivedRevision(RevisionInfo, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The record of a revision in a line, with the limits of its fields."""

    uid: _Text
    resource_id: _Text
    revision: _Number
    parent: _Number | None
    schema_version: Annotated[int, Meta(ge=1, le=MAX_SCHEMA_VERSION)]
    data_hash: _Sha256
    created_time: _Time
    updated_time: _Time
    blobs: tuple[_BlobKey, ...] = ()


class BodySpan(Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes of a body in the part of bodies that has the number of the part of the line."""

    offset: _Count
    size: _Count


class ResourceLine(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line of `resources-{n}.ndjson`: metadata, or the record of a revision with its body.

    The revisions of a resource follow its metadata. A revision without a body belongs to a resource that was purged
    while it was exported; the manifest lists it as absent.
    """

    resource: ArchivedMeta | None = None
    revision: ArchivedRevision | None = None
    body: BodySpan | None = None


class KeyLine(Struct, frozen=True, forbid_unknown_fields=True):
    """A line of `keys-{n}.ndjson`: the result of one operation of a request with an Idempotency-Key.

    A key has a line for each of its `operations`; `operation` counts from 0.
    """

    key: _Sha256
    request: _Sha256
    time: _Count
    operation: _Count
    operations: _Count
    result: ArchivedMeta | None


class BlobLine(Struct, frozen=True, forbid_unknown_fields=True):
    """A line of `blobs-{n}.ndjson`: the row of a blob."""

    key: _BlobKey
    size: Annotated[int, Meta(ge=0, le=MAX_BLOB)]
    owner: _Sha256

    @property
    def row(self) -> BlobRow:
        """The row as stores keep it."""
        return BlobRow(key=self.key, size=self.size, owner=self.owner)


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a model, in the manifest. `name` is that of the entry; `size` is in bytes."""

    name: str
    size: _Count
    sha256: _Sha256


class ModelEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model in the manifest.

    fields          the kinds of the indexed fields, by name; for information
    unique          the names of the unique fields; for information
    schema_version  the version of the model in the program that exported it; for information
    one_moment      whether all resources are as at one moment. If not, each one is as at some moment
    resources       how many resources there are, absent ones included
    revisions       how many revisions there are, those of absent resources included
    keys            how many Idempotency-Keys there are
    blobs           how many blobs there are
    body_bytes      bytes of all bodies together
    blob_bytes      bytes of all blobs together
    absent          ids of resources that were purged while they were exported. Their lines are to be ignored
    parts           the parts, in their order
    """

    name: Annotated[str, Meta(pattern=rf"\A{MODEL.pattern}\Z")]
    fields: dict[str, str]
    unique: tuple[str, ...]
    schema_version: int
    one_moment: bool
    resources: _Count
    revisions: _Count
    keys: _Count
    blobs: _Count
    body_bytes: _Count
    blob_bytes: _Count
    absent: Annotated[tuple[str, ...], Meta(max_length=MAX_ABSENT)] = ()
    parts: tuple[Part, ...] = ()


class FormatEntry(Struct, frozen=True):
    """The content of `format.json`. Later versions may add fields, so unknown ones are ignored."""

    format: str
    version: int


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `manifest.json`.

    program  name and version of the program that wrote the archive; for information
    created  when the export began; for information
    models   the models, in the order of their entries
    """

    format: Literal["crudstack-archive"]
    version: Literal[1]
    program: str
    created: _Time
    models: tuple[ModelEntry, ...]


encode = msgspec.json.Encoder().encode


def blob_name(model: str, key: str) -> str:
    """Return the name of the entry of a blob."""
    return f"models/{model}/blobs/{key}"


def decode_json(text: bytes, decode: Callable[[bytes], T], what: str) -> T:
    """Decode JSON of an archive. Raises BadArchive, which names `what`."""
    try:
        return decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadArchive(f"{what} cannot be read: {error}; the archive was not written as the format says") from None


def check_revision(meta: ResourceMeta, record: RevisionInfo, previous: int) -> str:
    """Return what is wrong with a revision of a resource, or an empty text. `previous`: the number before it, or 0."""
    if record.resource_id != meta.resource_id:
        return f"it is of resource {record.resource_id!r}"
    if not previous < record.revision <= meta.total_revision_count:
        return (
            f"it follows revision {previous} of {meta.total_revision_count}, but revisions are in ascending order"
            if record.revision <= previous
            else f"the resource has {meta.total_revision_count} revisions"
        )
    if record.parent is not None and record.parent >= record.revision:
        return f"its parent is {record.parent}, which is not older"
    if record.revision == meta.revision and any(
        getattr(meta, name) != value for name, value in record.meta_fields.items()
    ):
        return "it is the current revision, but the metadata describe another one"
    return ""


def plain_meta(meta: ArchivedMeta) -> ResourceMeta:
    """Return metadata as the engine knows them."""
    return ResourceMeta(**_fields(meta, ResourceMeta))


def plain_revision(record: ArchivedRevision) -> RevisionInfo:
    """Return the record of a revision as the engine knows it."""
    return RevisionInfo(**_fields(record, RevisionInfo))


def _fields(value: Struct, cls: type[Struct]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in cls.__struct_fields__}


def is_json(encoding: Encoding) -> bool:
    """Return whether the hash of a body in this encoding is the `data_hash` of its record."""
    return encoding == Encoding.json
