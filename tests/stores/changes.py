"""Changes for tests that call a MetaStore without the engine: version n of a resource makes its revision n."""

from __future__ import annotations

import datetime as dt
from typing import Any

from app.autocrud.resource_manager.basic import Change, Encoding, IdempotentCommit, ResourceMeta, RevisionInfo, Version
from app.autocrud.resource_manager.contract.snapshots import MetaSnapshot

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def meta_of(rid: str, version: int = 1, **changes: Any) -> ResourceMeta:
    values: dict[str, Any] = {
        "resource_id": rid,
        "version": version,
        "nonce": f"{version:016}",
        "revision": version,
        "total_revision_count": version,
        "schema_version": 1,
        "status": "stable",
        "is_deleted": False,
        "uid": f"0/{rid}-{version}",
        "data_hash": "",
        "encoding": Encoding.json,
        "created_time": NOW,
        "updated_time": NOW,
        "created_by": "a",
        "updated_by": "a",
    }
    return ResourceMeta(**(values | changes))


def naming(rid: str, *keys: str, version: int = 1, **changes: Any) -> Change:
    """Return a change whose record names these blobs."""
    meta = meta_of(rid, version)
    expect = "absent" if version == 1 else Version(version - 1, f"{version - 1:016}")
    record = RevisionInfo.of_change(meta, meta.revision - 1 or None, tuple(sorted(keys)))
    return Change(**({"meta": meta, "record": record, "index": None, "expect": expect} | changes))


def once(key: str, time: int, *results: int | None) -> IdempotentCommit:
    return IdempotentCommit(key=key, request="request", time=time, results=results)


async def read(snapshot: MetaSnapshot) -> dict[str, tuple[ResourceMeta, list[RevisionInfo]]]:
    """Return the metadata and the records of each resource in a snapshot, and check their order."""
    found: dict[str, tuple[ResourceMeta, list[RevisionInfo]]] = {}
    async for item in snapshot.items():
        if isinstance(item, ResourceMeta):
            found[item.resource_id] = item, []
        else:
            found[item.resource_id][1].append(item)
    assert list(found) == sorted(found)
    return found
