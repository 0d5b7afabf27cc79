"""Refusal of stores in the former layout, which factories used before they shared one layout with the kinds.

In earlier releases, some factories put their data elsewhere than the kind of storage of the same name does:

    PostgresS3StorageFactory, RedisPgStorageFactory   tables meta_{model}, whatever the prefix
    CachedS3StorageFactory, MQCachedS3StorageFactory  bodies in {prefix}{model}/, the index beside them

Such a store is not opened automatically. The tables without a prefix may belong to another deployment, so only the
owner of the data knows which store is meant. The store is not ignored either. The new store would be empty, and if the
bodies are at the same location, the sweep of the new store would remove them as orphans. So opening fails, and the
error says what to do: with `former_layout="open"`, the factory continues to use the former store.
"""

from __future__ import annotations

from typing import Literal, Protocol

from ...errors import ConfigError
from ..basic import ResourceStore
from ..contract.packs import BodyPacking
from ..contract.protocols import BodySweeping

WhenFormer = Literal["refuse", "open", "ignore"]
"""With "refuse", opening fails if there is a store in the former layout. "open" uses that layout. "ignore" looks for no
such store."""
ANY_GENERATION = 2**62
"""A generation that no store reaches."""


class Findable(Protocol):
    """A MetaStore that can tell whether it was ever written."""

    async def exists(self) -> bool:
        """Return whether the store exists. Does not create it."""


async def refuse_former(
    factory: str,
    model: str,
    present: Findable,
    former: Findable,
    former_bodies: ResourceStore,
    *,
    names: tuple[str, str],
) -> None:
    """Raise ConfigError if a model has a store in the former layout and none in the present one.

    names  the locations of the metadata of the former store and of the present one, for the error text

    Tables of the former layout without bodies below this prefix belong to another deployment, and raise nothing.
    """
    if await present.exists() or not await former.exists():
        return
    assert isinstance(former_bodies, BodySweeping), "a factory builds no other ResourceStore beside S3 and PostgreSQL"
    try:
        found = bool(await former_bodies.older_than(ANY_GENERATION, "", 1))
        if not found and isinstance(former_bodies, BodyPacking):
            found = bool(await former_bodies.packs_older_than(ANY_GENERATION, "", 1))
    finally:
        await former_bodies.close()
    if found:
        before, now = names
        raise ConfigError(
            f"{factory}: the store of the model {model!r} was written by an earlier release, with its metadata in"
            f" {before}; now they are expected in {now}, where nothing is. Give the factory former_layout='open' to go"
            " on with that store"
        )
