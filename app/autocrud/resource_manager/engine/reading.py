"""How a ResourceManager reads: metadata and bodies that belong together, verified, and filtered for the caller.

Metadata and bodies are in two stores, and a concurrent write may remove a body between the two reads.

- E1 *A body that is missing or damaged is an error only if the metadata that names it is unchanged.* Otherwise the
  resource is read again, up to MAX_ATTEMPTS times.
- E2 *Every result belongs to a state that the caller may read.* If more data is read after the read filter was applied,
  the metadata is read again, and must be unchanged.
- E3 *A damaged resource does not hide others.* Lists leave it out, the log names it, and /readyz reports it.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

from msgspec.structs import replace

from ...errors import CrudError, ResourceDeleted, ResourceNotFound, RevisionNotFound, StoreDamaged
from ...query import MAX_LIMIT, Filter, Query
from ..basic import Hit, IStorage, Page, ResourceMeta, RevisionInfo
from ..contract.store_errors import missing, storable_number
from ..model.codec import Codec
from ..model.resource import Resource
from ..model.verification import ANYTHING, DamagedResources, Part, metadata_of, named
from ..runtime.deadline import STEP_BYTES, check_time
from .state import ResourceState, StateReader, deleted
from .writing import MAX_ATTEMPTS, contention

T = TypeVar("T")

log = logging.getLogger("crudstack.manager")

MAX_REREAD = 10
"""Largest number of damaged resources that one call of `degradations` reads again."""


class ReadExecutor(Generic[T]):
    """Reads the resources of one model from an open storage.

    name     name of the model, for the log
    damaged  the resources that could not be read (an attribute)
    """

    def __init__(self, name: str, storage: IStorage, codec: Codec[T], states: StateReader) -> None:
        self._name, self._storage, self._codec, self._states = name, storage, codec, states
        self.damaged = DamagedResources()

    async def meta(self, resource_id: str, *, include_deleted: bool, read_filter: Filter | None) -> ResourceMeta:
        """Return the metadata of a resource. Raises ResourceNotFound or ResourceDeleted."""
        try:
            return await self._meta(resource_id, include_deleted, read_filter)
        except StoreDamaged as error:
            raise self.noted(error, resource_id, None) from None

    async def _meta(self, resource_id: str, include_deleted: bool, read_filter: Filter | None) -> ResourceMeta:
        meta = await self._storage.get(resource_id)
        for _ in range(MAX_ATTEMPTS):
            try:
                if not await self._states.matches(read_filter, ResourceState(meta)):
                    raise missing(resource_id)
                break
            except StoreDamaged:
                before, meta = meta, await self._storage.get(resource_id)
                if meta == before:
                    raise
        else:
            raise contention()  # the filter was never applied
        if meta.is_deleted and not include_deleted:
            raise deleted(resource_id)
        return meta

    async def get(
        self, resource_id: str, *, revision: int | None, include_deleted: bool, read_filter: Filter | None
    ) -> Resource[T]:
        """Return a resource in its current revision (None), or in the revision of this number.

        Raises ResourceNotFound, ResourceDeleted, RevisionNotFound or WriteContention.
        """
        try:
            found = await self._get(resource_id, revision, include_deleted, read_filter)
        except StoreDamaged as error:
            raise self.noted(error, resource_id, revision) from None
        if self.damaged:
            self.damaged.forget(resource_id, revision)
        return found

    async def _get(
        self, resource_id: str, revision: int | None, include_deleted: bool, read_filter: Filter | None
    ) -> Resource[T]:
        to_json = self._states.verifier.read
        for _ in range(MAX_ATTEMPTS):
            try:
                if revision is None:
                    meta, body = await self._storage.get_with_body(resource_id)
                    json = await to_json(meta, body)
                    if read_filter is not None and not await self._states.matches(
                        read_filter, ResourceState(meta, json)
                    ):
                        raise missing(resource_id)
                    if meta.is_deleted and not include_deleted:
                        raise deleted(resource_id)
                    return Resource(self._codec, meta, json)
                meta = await self.meta(resource_id, include_deleted=include_deleted, read_filter=read_filter)
                info = await self._storage.revision(resource_id, storable_number(revision))
                body = await self._storage.body(info.uid)
                if await self._is_unchanged(meta, read_filter) and info.revision <= meta.total_revision_count:
                    return Resource(self._codec, meta, await to_json(info, body), info)
            except StoreDamaged:
                await self._check_still_damaged(resource_id, revision)
        raise contention()

    async def _is_unchanged(self, meta: ResourceMeta, read_filter: Filter | None) -> bool:
        """Return whether the resource is still in the state that the filter found (E2); True without a filter."""
        return read_filter is None or await self._storage.get(meta.resource_id) == meta

    async def _check_still_damaged(self, resource_id: str, revision: int | None) -> None:
        """Raise StoreDamaged if the body is missing or damaged, and the metadata stays unchanged while it is read (E1).

        Drops cached copies first, because a copy may be damaged while the stored body is not.
        """
        for _ in range(2):
            meta = await self._storage.get(resource_id)
            info = meta if revision is None else await self._storage.revision(resource_id, storable_number(revision))
            await self._storage.drop_copies([info.uid])
            try:
                self._states.verifier.json(info, await self._storage.body(info.uid))
            except StoreDamaged:
                if await self._storage.get(resource_id) == meta:
                    raise
            else:
                return

    async def revisions(
        self, resource_id: str, *, before: int | None, limit: int, include_deleted: bool, read_filter: Filter | None
    ) -> Page[RevisionInfo]:
        """Return the records of the revisions below the number `before`, newest first."""
        try:
            for _ in range(MAX_ATTEMPTS):
                meta = await self.meta(resource_id, include_deleted=include_deleted, read_filter=read_filter)
                page = await self._storage.revisions(
                    resource_id, before if before is None else storable_number(before), limit
                )
                if await self._is_unchanged(meta, read_filter):
                    return page
        except StoreDamaged as error:
            raise self.noted(error, resource_id, ANYTHING) from None
        raise contention()

    async def search_json(self, query: Query) -> Page[tuple[bytes, bytes]]:
        """Return the resources that a resolved query finds: the metadata and the data of each as JSON."""
        try:
            page, bodies = await self._read_page(query)
            return Page(self._states.verifier.page(page.items, bodies), page.next)
        except StoreDamaged:
            # A draft was replaced since, or a body is damaged. Read the resources one by one, so that a damaged one
            # does not hide the others (E3).
            page = await self._storage.search(query)
            read = [await self._readable(hit, query) for hit in page.items]
            return Page([found for found in read if found is not None], page.next)

    async def _read_page(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        """Return a page of hits and their bodies. A page of large bodies ends before the limit of the query.

        Raises NotEnoughTime if the request has too little time left to verify the bodies.
        """
        page, bodies = await self._storage.search_with_bodies(query)
        while len(bodies) < len(page.items):  # search again for the cursor that follows the last body
            query = replace(query, limit=len(bodies))
            page, bodies = await self._storage.search_with_bodies(query)
        check_time(sum(map(len, bodies)) // STEP_BYTES)  # each body is hashed and copied into the answer
        return page, bodies

    async def _readable(self, hit: Hit, query: Query) -> tuple[bytes, bytes] | None:
        """Return the present metadata and data of a hit as JSON.

        Returns None if the query no longer finds the resource, or if the resource cannot be read.
        """
        try:
            resource_id = metadata_of(hit).resource_id
            found = await self.get(
                resource_id, revision=None, include_deleted=query.include_deleted, read_filter=query.where
            )
            return found.meta_json, found.json
        except (ResourceNotFound, ResourceDeleted):
            return None
        except StoreDamaged as error:
            if error.resource_id is None:
                self.damaged.note_hit(hit)
            log.error("%s: a resource is left out of a search: %s", self._name, error)
            return None

    async def find(self, query: Query) -> Page[Hit]:
        """Return the hits of a resolved query whose metadata is sound."""
        page = await self._storage.search(query)
        broken = self._states.verifier.broken(page.items)
        for hit in broken:
            self.damaged.note_hit(hit)
            log.error("%s: metadata is damaged and left out of a search; its body is %s", self._name, hit.uid)
        return Page([hit for hit in page.items if hit not in broken], page.next) if broken else page

    def noted(self, error: StoreDamaged, resource_id: str, part: Part) -> StoreDamaged:
        """Return an error that names the resource, and remember the resource for `degradations`.

        An error of the whole store is returned unchanged, because the health check of the store reports it.
        """
        error = named(error, resource_id)
        if error.resource_id is not None:
            self.damaged.note(resource_id, part)
        return error

    async def degradations(self) -> list[str]:
        """Return a sentence for each kind of damage. Reads up to MAX_REREAD damaged resources again first.

        A resource is no longer reported if it can be read again or no longer exists.
        """
        for resource_id, part in self.damaged.some(MAX_REREAD):
            revision = None if part == ANYTHING else part
            try:
                await self.get(resource_id, revision=revision, include_deleted=True, read_filter=None)
                if part == ANYTHING:
                    await self.revisions(
                        resource_id, before=None, limit=MAX_LIMIT, include_deleted=True, read_filter=None
                    )
            except (ResourceNotFound, RevisionNotFound):
                pass
            except CrudError:
                continue
            self.damaged.forget(resource_id, part)
        return self.damaged.degradations()
