"""The states of resources during an import, and the result of an import.

- N1 *An import recognizes the states that it has written.* Into a model with data, each state that it writes has a
  nonce that is derived from the random id of the import, the id of the resource and the version. Into an empty model, a
  state has the version and nonce of the archive. So after a crash, the import knows which resources it has written, and
  which of them were changed since.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from ..errors import ResourceNotFound
from ..resource_manager.basic import IStorage, ResourceMeta, RevisionInfo, Version
from ..resource_manager.contract.import_journal import ImportState
from ..resource_manager.contract.limits import next_version

NAMED = 20
"""How many ids a result names."""
REVISIONS = 500
"""How many records are read at a time."""


class ModelImport(Struct, kw_only=True):
    """The outcome of an import for one model.

    created           resources that the model did not have
    replaced          resources that the model had, and that are as in the archive now
    skipped           resources that the model had, and that stayed as they were
    unique_conflicts  resources that were left out because another one has the value of a unique field, by field
    keys              results of Idempotency-Keys
    blobs             files
    in_one_step       whether all appeared in one step
    taken_back        resources that an aborted import had written, and that are as before
    not_taken_back    how many resources could not be taken back
    ids               some of their ids, or some of those that were left out
    """

    created: int = 0
    replaced: int = 0
    skipped: int = 0
    unique_conflicts: dict[str, int] = {}
    not_fitting: int = 0
    """Bodies that do not fit the model of this program. They were imported as they are."""
    keys: int = 0
    blobs: int = 0
    in_one_step: bool = False
    taken_back: int = 0
    not_taken_back: int = 0
    ids: list[str] = []

    def name(self, resource_id: str) -> None:
        """Add an id to those that are named."""
        if len(self.ids) < NAMED:
            self.ids.append(resource_id)


class ModelSurvey(NamedTuple):
    """The part of an archive with one model, as it is known before anything is changed.

    resources         how many resources the archive has
    revisions         how many revisions they have, each with a body
    not_fitting       how many of these bodies do not fit the model of this program. They are imported as they are
    unique_conflicts  how many resources have a value of a unique field that an earlier one of the archive has, by field
    """

    resources: int
    revisions: int
    not_fitting: int
    unique_conflicts: dict[str, int]


Surveyed: TypeAlias = Callable[[Mapping[str, ModelSurvey]], None]
"""Called once, with what the archive has for each model, before the import changes anything."""


class ImportResult(NamedTuple):
    """The outcome of an import: the SHA-256 of the archive in hex, its size in bytes, and the models by name."""

    sha256: str
    size: int
    models: dict[str, ModelImport]


def derived_nonce(import_id: str, resource_id: str, version: int) -> str:
    """Return the nonce of a state that an import writes. No other writer draws it (N1)."""
    return hashlib.sha256(f"{import_id}\n{version}\n{resource_id}".encode()).hexdigest()[:16]


def digest_of(import_id: str, resource_id: str) -> bytes:
    """Return what the journal of an import keeps of the id of a resource that it creates."""
    return hashlib.sha256(f"{import_id}\n{resource_id}".encode()).digest()[:16]


def created_state(state: ImportState, archived: ResourceMeta) -> ResourceMeta:
    """Return the metadata of a resource that the import creates."""
    if state.empty:
        return archived
    return replace(archived, nonce=derived_nonce(state.id, archived.resource_id, archived.version))


def replacing_state(state: ImportState, archived: ResourceMeta, found: ResourceMeta) -> ResourceMeta:
    """Return the metadata of a resource that the import replaces. The version never moves backwards."""
    version = next_version(max(archived.version, found.version))
    return replace(archived, version=version, nonce=derived_nonce(state.id, archived.resource_id, version))


def is_written(state: ImportState, archived: ResourceMeta, found: ResourceMeta) -> bool:
    """Return whether the import has written the state in which a resource is (N1)."""
    as_archived = state.empty and (found.version, found.nonce) == (archived.version, archived.nonce)
    return as_archived or found.nonce == derived_nonce(state.id, found.resource_id, found.version)


def version_of(meta: ResourceMeta) -> Version:
    """Return the version that a change of this state expects."""
    return Version(meta.version, meta.nonce)


async def states_of(storage: IStorage, ids: Sequence[str]) -> dict[str, ResourceMeta | None]:
    """Return the metadata of resources by id; None for each one that does not exist."""

    async def one(resource_id: str) -> ResourceMeta | None:
        try:
            return await storage.get(resource_id)
        except ResourceNotFound:
            return None

    distinct = list(dict.fromkeys(ids))
    return dict(zip(distinct, await asyncio.gather(*map(one, distinct)), strict=True))


async def is_empty(storage: IStorage) -> bool:
    """Return whether a model has no resources, deleted ones included."""
    async for _ in storage.scan():
        return False
    return True


async def records_of(storage: IStorage, resource_id: str) -> list[RevisionInfo]:
    """Return all records of a resource, by ascending number."""
    records: list[RevisionInfo] = []
    before, more = None, True
    while more:
        page = await storage.revisions(resource_id, before, REVISIONS)
        records += page.items
        before, more = page.next, page.next is not None
    return records[::-1]
