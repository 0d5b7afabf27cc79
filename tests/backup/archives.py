"""Contents of models for tests of archives: made by hand or by hypothesis, written to an archive, and read back."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from app.autocrud import Encoding
from app.autocrud.backup.archive_reader import VerifiedArchive, verify
from app.autocrud.backup.archive_writer import ArchiveResult, ArchiveWriter
from app.autocrud.backup.compression import Compression
from app.autocrud.errors import StoreDamaged
from app.autocrud.resource_manager.basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from app.autocrud.resource_manager.records import owner_of

NOW = dt.datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=dt.UTC)

Revision = tuple[RevisionInfo, bytes | None]


class Content(Struct, kw_only=True):
    """The content of a model, as an archive holds it."""

    resources: list[tuple[ResourceMeta, list[Revision]]] = []
    keys: list[StoredKey] = []
    blobs: list[tuple[BlobRow, bytes]] = []
    absent: tuple[str, ...] = ()


def uid() -> str:
    """Return the uid of a body of some other store."""
    return f"3/{uuid.uuid4()}"


def body_of(data: Any, encoding: Encoding) -> tuple[bytes, str]:
    """Return a body, and the hash of its JSON. Data that is no object becomes a field of one."""
    data = data if isinstance(data, dict) else {"data": data}
    text = msgspec.json.encode(data, order="deterministic")
    body = text if encoding == Encoding.json else msgspec.msgpack.encode(data)
    return body, hashlib.sha256(text).hexdigest()


def resource(
    resource_id: str,
    datas: Sequence[Any],
    *,
    encoding: Encoding = Encoding.json,
    numbers: Sequence[int] = (),
    current: int = -1,
    blobs: Sequence[Sequence[str]] = (),
    **changes: Any,
) -> tuple[ResourceMeta, list[Revision]]:
    """Return a resource with a revision for each of these data.

    numbers  the numbers of the revisions, without gaps by default
    current  the position of the current revision
    blobs    the keys of the blobs of each revision
    """
    numbers = numbers or range(1, len(datas) + 1)
    revisions: list[Revision] = []
    for position, (data, number) in enumerate(zip(datas, numbers, strict=True)):
        body, digest = body_of(data, encoding)
        record = RevisionInfo(
            uid=uid(),
            resource_id=resource_id,
            revision=number,
            parent=numbers[position - 1] if position else None,
            schema_version=1,
            status="draft" if position % 3 == 2 else "stable",
            data_hash=digest,
            encoding=encoding,
            created_time=NOW + dt.timedelta(seconds=position),
            updated_time=NOW + dt.timedelta(seconds=2 * position),
            created_by="alice",
            updated_by="böb",
            blobs=tuple(sorted(blobs[position])) if blobs else (),
        )
        revisions.append((record, body))
    record = revisions[current][0]
    meta = ResourceMeta(
        resource_id=resource_id,
        version=len(datas) + 3,
        nonce=uuid.uuid4().hex[:16],
        total_revision_count=numbers[-1],
        is_deleted=False,
        created_time=NOW,
        updated_time=NOW + dt.timedelta(days=1),
        created_by="alice",
        updated_by="carol",
        **record.meta_fields,
    )
    return replace(meta, **changes), revisions


def blob(content: bytes, owner: str = "alice") -> tuple[BlobRow, bytes]:
    """Return a blob with its row."""
    key = f"{hashlib.sha256(content).hexdigest()}/0-{uuid.uuid4().hex}"
    return BlobRow(key=key, size=len(content), owner=owner_of(owner)), content


async def write(
    target: Path | BinaryIO, models: Mapping[str, Content], compression: Compression | None = None
) -> ArchiveResult:
    """Write an archive of these models."""
    async with ArchiveWriter(target, compression, created=NOW) as writer:
        for name, content in models.items():
            await writer.begin_model(name, fields={"title": "str"}, unique=(), schema_version=1)
            for meta, revisions in content.resources:
                await writer.add_resource(meta)
                for record, body in revisions:
                    await writer.add_revision(record, body)
            for key in content.keys:
                await writer.add_key(key)
            await _add_blobs(writer, content.blobs)
            await writer.end_model(one_moment=True, absent=content.absent)
        return await writer.close()


async def _add_blobs(writer: ArchiveWriter, blobs: Sequence[tuple[BlobRow, bytes]]) -> None:
    stored = {row.key: (row, content) for row, content in blobs}

    async def rows(keys: Sequence[str]) -> list[BlobRow]:
        return [stored[key][0] for key in keys]

    async def read(key: str) -> AsyncIterator[bytes]:
        row, content = stored[key]
        if len(content) != row.size:
            raise StoreDamaged("the file was purged")
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    await writer.add_blobs(rows, read)


async def archived(models: Mapping[str, Content], compression: Compression = Compression.gzip) -> bytes:
    """Return the bytes of an archive of these models."""
    file = io.BytesIO()
    await write(file, models, compression)
    return file.getvalue()


def read_back(path: Path, **options: Any) -> dict[str, Content]:
    """Return the content of an archive."""
    with verify(path, **options) as archive:
        return {model.name: content_of(archive, model.name) for model in archive.manifest.models}


def content_of(archive: VerifiedArchive, model: str) -> Content:
    """Return the content of a model of an archive."""
    content = Content(resources=[], keys=list(archive.keys(model)), blobs=[], absent=archive.model(model).absent)
    for item in archive.resources(model):
        if isinstance(item, ResourceMeta):
            content.resources.append((item, []))
        else:
            content.resources[-1][1].append(item)
    content.blobs = [(row, b"".join(chunks)) for row, chunks in archive.blobs(model)]
    return content


# Hypothesis

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | names,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@st.composite
def contents(draw: st.DrawFn) -> Content:
    """Contents of a model, with hostile names, gaps between revisions, keys and blobs."""
    blobs = [blob(content) for content in draw(st.lists(st.binary(max_size=3000), max_size=3, unique=True))]
    ids = sorted(draw(st.sets(names, max_size=5)))
    resources = []
    for resource_id in ids:
        datas = draw(st.lists(data, min_size=1, max_size=4))
        numbers = sorted(draw(st.sets(st.integers(1, 2**40), min_size=len(datas), max_size=len(datas))))
        keys = [[row.key for row, _ in blobs if draw(st.booleans())] for _ in datas]
        resources.append(
            resource(
                resource_id,
                datas,
                encoding=draw(st.sampled_from(Encoding)),
                numbers=numbers,
                current=draw(st.integers(0, len(datas) - 1)),
                blobs=keys,
                is_deleted=draw(st.booleans()),
                created_by=draw(names),
            )
        )
    metas = [meta for meta, _ in resources]
    keys = sorted(draw(st.sets(st.integers(0, 2**256 - 1), max_size=3)))
    stored_keys = [
        StoredKey(
            key=f"{key:064x}",
            request=f"{key:064x}",
            time=draw(st.integers(0, 2**60)),
            results=tuple(draw(st.lists(st.sampled_from([None, *metas]), min_size=1, max_size=3))),
        )
        for key in keys
    ]
    used = {key for _, revisions in resources for record, _ in revisions for key in record.blobs}
    return Content(
        resources=resources,
        keys=stored_keys,
        blobs=sorted((one for one in blobs if one[0].key in used), key=lambda one: one[0].key),
    )
