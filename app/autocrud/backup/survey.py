"""The survey of an archive for an import, made while the archive is verified, before anything is changed.

It refuses an archive whose data refer to files that their records do not name, or give a file another size than it
has, and bodies in MessagePack that have another hash than their records say. It counts the bodies that do not fit the
models of this program: a request with their data would be refused. It finds unique values that two resources of the
archive share, and keeps the current revisions of large resources, which must be stored before the others. It notes what
the stores cannot hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from typing_extensions import override

from ..resource_manager.basic import BlobRow, Encoding, IndexEntry, ResourceMeta, RevisionInfo, StoredKey
from ..resource_manager.contract.limits import MAX_ID
from ..resource_manager.contract.storable import MetadataLimits
from ..resource_manager.model.codec import Codec, CodecIndex, canonical_json
from .archive_format import Manifest
from .archive_notes import ArchiveNotes
from .archive_reader import Visitor
from .bodies import check_hash
from .errors import BadArchive

LARGE_REVISIONS = 1000
LARGE_BYTES = 4 * 1024 * 1024
"""A resource with more revisions, or more bytes of bodies, is imported in several pieces."""
SHOWN = 60
"""How many characters of a long id a message shows."""


class Index:
    """Makes the index entries of bodies. A body that does not fit the model has an entry of the fields that fit."""

    def __init__(self, codec: Codec[Any]) -> None:
        self.codec = codec
        self._index = CodecIndex(codec)

    def entry(self, body: bytes, encoding: Encoding) -> IndexEntry:
        """Return the entry of a body."""
        try:
            return self._index(body, encoding)
        except Exception:  # the codec raises the errors of msgspec, of conversions and of limits
            return self._index.kept(body, encoding, b"{}")

    def data(self, body: bytes, encoding: Encoding) -> Any:
        """Return the data of a body; None if it cannot be decoded into the model."""
        try:
            return self.codec.decode(body, encoding)
        except Exception:  # the same
            return None

    def parsed(self, body: bytes, encoding: Encoding) -> Any:
        """Return the data of a body; None if the model would refuse them in a request."""
        try:
            # Without the model, because a decoder with a type drops the fields that the type does not have.
            text = body if encoding == Encoding.json else canonical_json(msgspec.msgpack.decode(body))
            return self.codec.parse(text).data
        except Exception:  # the same
            return None


class Survey(Visitor):
    """Sees each resource of an archive once.

    indexes  of the models that are imported, by name
    noted    the models whose ids are noted
    limits   the storages that may be unable to hold metadata, by model
    strict   whether to refuse data that an import must not store. An import that is taken back stores nothing
    taken    how many resources have a unique value that an earlier one of the archive has, by model and field
    """

    def __init__(
        self,
        indexes: Mapping[str, Index],
        notes: ArchiveNotes,
        noted: Collection[str] = (),
        limits: Mapping[str, MetadataLimits] = {},
        *,
        strict: bool = True,
    ) -> None:
        self.unstorable: dict[str, str] = {}
        """Which resource a storage cannot hold, and why, by model: a part of a sentence about the first one."""
        self.not_fitting: Counter[str] = Counter()
        """How many bodies do not fit the model, by model."""
        self.taken: dict[str, Counter[str]] = {name: Counter() for name in indexes}
        self.body_bytes: Counter[str] = Counter()
        """Bytes of the bodies of whole resources, by model."""
        self.blob_bytes: Counter[str] = Counter()
        """Bytes of the blobs whose content the archive has, by model."""
        self._indexes, self._notes, self._noted, self._limits = indexes, notes, noted, limits
        self._strict = strict
        self._model = ""
        self._meta: ResourceMeta | None = None
        self._current: tuple[RevisionInfo, bytes] | None = None
        self._complete = True
        self._revisions = self._bytes = 0

    @override
    def resource(self, model: str, meta: ResourceMeta) -> None:
        self.end()
        if model in self._indexes:
            self._model, self._meta = model, meta
            self._current, self._complete, self._revisions, self._bytes = None, True, 0, 0

    @override
    def revision(self, model: str, meta: ResourceMeta, record: RevisionInfo, body: bytes | None) -> None:
        index = self._indexes.get(model)
        if index is None:
            return
        if body is None:
            self._complete = False
            return
        self._revisions += 1
        self._bytes += len(body)
        data = index.parsed(body, record.encoding)
        if data is None:
            self.not_fitting[model] += 1
            data = index.data(body, record.encoding)
        if self._strict:
            check_hash(index.codec, record, body, data)
            if data is not None and index.codec.has_blobs:
                self._references(model, index.codec, record, data)
        if record.revision == meta.revision:
            self._current = record, body

    @override
    def key(self, model: str, key: StoredKey) -> None:
        for meta in key.results:
            if meta is not None:  # stores keep its id beside it, and its other texts in the document only
                self._check(model, meta.resource_id)

    @override
    def blobs(self, model: str, rows: Sequence[BlobRow]) -> None:
        self.blob_bytes[model] += sum(row.size for row in rows)

    def finish(self, manifest: Manifest) -> None:
        """End the survey, after the archive was verified. Raises BadArchive if data give a file a wrong size."""
        self.end()
        for model in manifest.models:
            if (wrong := self._notes.wrong_size(model.name, set(model.absent))) is not None:
                given = f"{wrong.given} bytes" if wrong.given else "no size, or 0 bytes"
                raise BadArchive(
                    f"the data of revision {wrong.revision} of resource {wrong.resource_id!r} of model {model.name!r}"
                    f" give the file {wrong.sha256} {given}, but the archive holds it with {wrong.size} bytes: each"
                    " reference must have the size of its file"
                )

    def end(self) -> None:
        """Add up the resource that was read last. Called when the next one begins, and at the end of the archive."""
        meta, self._meta = self._meta, None
        if meta is None or self._current is None or not self._complete:
            return
        record, body = self._current
        self.body_bytes[self._model] += self._bytes
        if self._revisions > LARGE_REVISIONS or self._bytes > LARGE_BYTES:
            self._notes.keep_current(self._model, record, body)
        index = self._indexes[self._model]
        if self._model in self._limits:
            entry = index.entry(body, record.encoding) if len(meta.resource_id) > MAX_ID // 4 else None
            self._check(self._model, meta.resource_id, (meta.created_by, meta.updated_by), entry)
        if self._model in self._noted:
            self._notes.note_id(self._model, meta.resource_id)
        if index.codec.unique:
            self._claim(meta.resource_id, index.codec.unique, index.entry(body, record.encoding))

    def _check(self, model: str, resource_id: str, names: Sequence[str] = (), entry: IndexEntry | None = None) -> None:
        limits = self._limits.get(model)
        if limits is None or model in self.unstorable:
            return
        if reason := limits.unstorable(resource_id, names=names, entry=entry):
            shown = resource_id if len(resource_id) <= SHOWN else f"{resource_id[:SHOWN]}..."
            self.unstorable[model] = f"resource {shown!r} of model {model!r} cannot be stored there: {reason}"

    def _claim(self, resource_id: str, unique: tuple[str, ...], entry: IndexEntry) -> None:
        keys = {name: key for name in unique if (key := entry.keys.get(name)) is not None and not isinstance(key, list)}
        owned = [name for name, key in keys.items() if self._notes.owner(self._model, name, key) is not None]
        for name in owned:
            self.taken[self._model][name] += 1
        if owned:
            self._notes.exclude(self._model, [resource_id])
            return
        for name, key in keys.items():
            self._notes.claim(self._model, name, key, resource_id)

    def _references(self, model: str, codec: Codec[Any], record: RevisionInfo, data: Any) -> None:
        """Note the sizes of references in data. Raises BadArchive if one is to a blob that the record does not name.

        A record may name more blobs, because the model may have had more fields.
        """
        named = {key.partition("/")[0] for key in record.blobs}
        found = [blob for _, blob in codec.references(data)]
        for blob in found:
            if blob.sha256 not in named:
                raise BadArchive(
                    f"the data of revision {record.revision} of resource {record.resource_id!r} refer to the file"
                    f" {blob.sha256}, which its record does not name"
                )
        self._notes.note_sizes(model, record, [(blob.sha256, blob.size) for blob in found])
