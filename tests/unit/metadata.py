"""Metadata for unit tests."""

from __future__ import annotations

import datetime as dt

from app.autocrud import Encoding
from app.autocrud.resource_manager.basic import ResourceMeta

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def metadata(resource_id: str = "r") -> ResourceMeta:
    """Return the metadata of a new resource."""
    return ResourceMeta(
        resource_id=resource_id,
        uid="0/1",
        revision=1,
        version=1,
        nonce="0123456789abcdef",
        status="stable",
        is_deleted=False,
        total_revision_count=1,
        encoding=Encoding.json,
        schema_version=1,
        data_hash="0" * 64,
        created_time=NOW,
        updated_time=NOW,
        created_by="alice",
        updated_by="alice",
    )
