"""The check of the resources that a manifest lists as absent: each one lacks something, or is not in the archive."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..resource_manager.basic import ResourceMeta
from .errors import BadArchive


def check_absent(model: str, items: Iterable[object], whole: Collection[str]) -> None:
    """Raise BadArchive if a resource is in the archive with all bodies and files, although it is listed as absent.

    items  all items of the model
    whole  the absent resources that lack nothing, if they are in the archive
    """
    for item in items if whole else ():
        if isinstance(item, ResourceMeta) and item.resource_id in whole:
            raise BadArchive(
                f"the manifest lists resource {item.resource_id!r} of model {model!r} as absent, but the archive has"
                " all of it"
            )
