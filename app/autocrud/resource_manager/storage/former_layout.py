"""Stores that factories wrote before kinds and factories shared one layout: they are refused by name.

Earlier releases put the metadata of some factories elsewhere than the kind of the same name does:

    PostgresS3StorageFactory, RedisPgStorageFactory   tables meta_{model}, whatever the prefix
    CachedS3StorageFactory, MQCachedS3StorageFactory  bodies in {prefix}{model}/, the index beside them

Such a store is not opened by itself. The tables without a prefix may belong to another deployment, so only the owner of
the data knows which store is meant. It is not ignored either: the new store would be empty, and where bodies still lie
in the same place its sweep would remove them as orphans. So the opening fails and says what to do:
`former_layout="open"` goes on with the store as it is.
"""

from __future__ import annotations

from typing import Literal, Protocol

from ...errors import ConfigError
from ..basic import ResourceStore
from ..contract.protocols import BodySweeping

WhenFormer = Literal["refuse", "open", "ignore"]
"""What a factory does about stores in the former layout: refuse to open beside one, open it, or not look for one."""
ANY_GENERATION = 2**62
"""A generation that no store reaches."""


class Findable(Protocol):
    """A MetaStore that can tell whether it was ever written."""

    async def exists(self) -> bool:
        """Return whether the store is there, without making it."""


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

    names  where the metadata of the former store and those of the present one lie

    Tables of the former layout without bodies below this prefix belong to another deployment, and raise nothing.
    """
    if await present.exists() or not await former.exists():
        return
    assert isinstance(former_bodies, BodySweeping), "a factory builds no other ResourceStore beside S3 and PostgreSQL"
    try:
        bodies = await former_bodies.older_than(ANY_GENERATION, "", 1)
    finally:
        await former_bodies.close()
    if bodies:
        before, now = names
        raise ConfigError(
            f"{factory}: the store of the model {model!r} was written by an earlier release, with its metadata in"
            f" {before}; now they are expected in {now}, where nothing is. Give the factory former_layout='open' to go"
            " on with that store"
        )
