"""The abilities of two stores to which one committer can write. See `storage.disk_pair`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from ...query import Query
from ..basic import Change, Hit, IdempotentCommit, MetaStore, Page, ResourceMeta, ResourceStore

WriteStage: TypeAlias = Any
"""A part of a write that the committer makes durable before the next part. Callers do not look inside."""


class StagedResourceStore(ResourceStore):
    """A ResourceStore whose bodies can be written as a stage of a larger write, and read in the caller's thread."""

    @abstractmethod
    async def opened(self) -> None:
        """Open the store. The methods below that read need an open store."""

    @abstractmethod
    def put_stage(self, bodies: Sequence[tuple[str, bytes]]) -> WriteStage:
        """Return the stage that stores these bodies, pairs of uid and body."""

    @abstractmethod
    def get_many_now(self, uids: Sequence[str]) -> list[bytes]:
        """Return the bodies in the order of the uids. Blocks. Raises StoreDamaged if one is missing."""

    @abstractmethod
    def get_first_now(self, uids: Sequence[str], most: int) -> list[bytes]:
        """Return the bodies of the first uids, until they take more than `most` bytes. Blocks.

        Raises StoreDamaged if one of them is missing.
        """


class StagedMetaStore(MetaStore):
    """A MetaStore that can commit after other stages, and read in the caller's thread."""

    @abstractmethod
    async def opened(self) -> None:
        """Open the store. The methods below that read need an open store."""

    @abstractmethod
    async def commit_after(
        self, stages: Sequence[WriteStage], changes: Sequence[Change], once: IdempotentCommit | None = None
    ) -> list[ResourceMeta]:
        """Do the stages, each durable before the next begins, then commit the changes like `MetaStore.commit`.

        Nothing is committed if a stage fails. Stages that were done before it stay done.
        """

    @abstractmethod
    def get_now(self, resource_id: str) -> ResourceMeta:
        """Return the metadata like `MetaStore.get`. Blocks."""

    @abstractmethod
    def search_now(self, query: Query) -> Page[Hit]:
        """Return the page like `MetaStore.search`. Blocks."""
