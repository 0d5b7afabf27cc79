"""The contract of imports into an empty model: a whole model is loaded, and becomes visible in one step.

- L1 *Nothing is visible before `publish`.* Readers, writers, exports and sweeps of other processes see an empty model.
- L2 *The model is still empty when it is published.* `publish` checks this in its one atomic step. Otherwise it changes
  nothing and raises ModelNotEmpty.
- L3 *Bodies and content of blobs stay.* They are stored before `publish`, while no record names them. The caller holds
  a pin, so no sweep removes them (P1). `publish` checks in its one step that this pin was not dropped, and raises
  PinLost otherwise. So it needs no check of generations and epochs.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from typing_extensions import override

from ..basic import BlobRow, IndexEntry, ResourceMeta, RevisionInfo, StoredKey
from ..runtime.threads import shielded


class LoadedResource(NamedTuple):
    """A resource that is loaded: its metadata, and the index entry of its current revision. Its records follow it."""

    meta: ResourceMeta
    entry: IndexEntry


class Loader(Protocol):
    """Collects the contents of one model."""

    async def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        """Add resources by ascending id, each followed by its records by ascending number.

        The records of one resource may be spread over several calls. Raises StoreUnavailable.
        """

    async def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        """Add rows of blobs. Called before the records that name them."""

    async def add_keys(self, keys: Sequence[StoredKey]) -> None:
        """Add the results that are kept for Idempotency-Keys."""

    async def publish(self) -> None:
        """Make everything visible in one atomic step.

        Raises ModelNotEmpty if the model has a resource, a row of a blob or a result of an Idempotency-Key, PinLost if
        the pin was dropped, and UniqueConflict if two of the resources share a value of a unique field; then nothing is
        changed. Raises OutcomeUnknown if the store does not know whether it took effect.
        """


StagedModel: TypeAlias = Any
"""The contents of a model that are not visible yet. Callers do not look inside."""


@runtime_checkable
class BulkLoading(Protocol):
    """A MetaStore into which a whole model can be loaded."""

    @abstractmethod
    def load(self, pin: str, *, size: int = 0) -> AbstractAsyncContextManager[Loader]:
        """Return a loader. At the end of the context, what was not published is discarded.

        pin   a pin of this store that the caller holds
        size  how many resources and blobs together will be loaded; 0 if this is not known

        Raises ModelNotEmpty if the model is not empty now, and LoadTooLarge if the store cannot publish so much in one
        step. The methods of the loader raise LoadTooLarge too.
        """


@runtime_checkable
class IndexLoading(Protocol):
    """A MetaStore that is not authoritative, and whose index can follow what was loaded into records."""

    @abstractmethod
    def holds_pin(self, pin: str) -> bool:
        """Return whether a pin was not dropped."""

    @abstractmethod
    def apply_loaded(self, staged: StagedModel) -> None:
        """Add what was loaded to the index, which is empty. Called in the order of commits. Blocks."""


@runtime_checkable
class RecordLoading(Protocol):
    """A ResourceStore whose records are the commit, and into which a whole model can be loaded."""

    @abstractmethod
    def load_records(self, index: IndexLoading, pin: str) -> AbstractAsyncContextManager[Loader]:
        """Return a loader as `BulkLoading.load` does. What it publishes, `index` applies before `publish` returns."""


@runtime_checkable
class LoadingStorage(Protocol):
    """An IStorage into which a whole model may be loaded."""

    @property
    @abstractmethod
    def loading(self) -> BulkLoading | None:
        """Return what loads the model; None if the stores cannot do it. Its pins are those of the MetaStore."""


class LoaderAround(Loader):
    """A Loader that publishes in a context. `publish` runs to completion even if its caller is cancelled."""

    def __init__(self, loader: Loader, around: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._loader, self._around = loader, around

    @override
    async def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        await self._loader.add(items)

    @override
    async def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        await self._loader.add_blobs(rows)

    @override
    async def add_keys(self, keys: Sequence[StoredKey]) -> None:
        await self._loader.add_keys(keys)

    @override
    async def publish(self) -> None:
        await shielded(asyncio.ensure_future(self._publish()))

    async def _publish(self) -> None:
        async with self._around():
            await self._loader.publish()
