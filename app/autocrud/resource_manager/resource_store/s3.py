"""Bodies on S3. Each revision takes one PUT, and each read one GET."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from ...errors import ConfigError, StoreDamaged
from ...secret import Secret
from ..backends.s3.object_store import CONCURRENT_GETS, ObjectStore, s3
from ..basic import Encoding, ModelSpec, ResourceStore, RevisionInfo
from ..contract.protocols import BodySweeping, IndexKeeping
from ..contract.snapshots import BodySnapshot, BodySnapshots

if TYPE_CHECKING:
    from ..meta_store.sqlite3 import S3SqliteMetaStore

UID = re.compile(r"(0|[1-9][0-9]*)/[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class S3ResourceStore(ResourceStore, BodySweeping, BodySnapshots, IndexKeeping):
    """Bodies at the keys `{prefix}{uid}` of a bucket.

    bucket                            the name of the bucket
    prefix                            begins the keys, one for each model; `{model}/` if it is empty
    endpoint_url, region_name         of the S3 server
    access_key_id, secret_access_key  the ambient credentials are used without them
    encoding                          of new bodies
    object_store                      replaces the bucket and all arguments about the server

    Raises ConfigError if the prefix ends with a digit.

    Above a MemoryMetaStore the store also has an index beside the bodies, at `{prefix}index.sqlite/`. It is an
    S3SqliteMetaStore whose copy on this machine answers, and which looks for the writes of other instances if the last
    look is more than `refresh_s` seconds ago.

    *Other data may lie below the prefix*: an index, other models, a whole deployment. The sweep removes bodies that no
    record of this model names, so it must not take other data for such bodies. A body of this store is a key that is
    exactly the prefix and a uid. A body of another store never is: both keys end with a number, a slash and a UUID, so
    one prefix would have to be the other one and digits, and no prefix may end with a digit.
    """

    durable: ClassVar[bool] = True
    remote: ClassVar[bool] = True
    shows_later_bodies: ClassVar[bool] = True
    refresh_s: float = 5.0

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        encoding: Encoding | None = None,
        *,
        object_store: ObjectStore | None = None,
    ) -> None:
        if re.search(r"[0-9]\Z", prefix):
            raise ConfigError(
                f"the prefix {prefix!r} ends with a digit, so bodies below it could be taken for those of a store with"
                f" a shorter one, and be removed: end it with a slash, {prefix + '/'!r}"
            )
        self.encoding = encoding
        self._bucket, self._given, self._prefix = bucket, prefix, prefix
        self._index: S3SqliteMetaStore | None = None
        self._objects = object_store or s3(bucket, endpoint_url, access_key_id, secret_access_key, region_name)

    @override
    def index(self) -> S3SqliteMetaStore:
        from ..meta_store.sqlite3 import S3SqliteMetaStore

        self._index = S3SqliteMetaStore(
            self._bucket,
            lambda spec: f"{self._prefix_of(spec)}index.sqlite",
            consistency="bounded",
            max_staleness=self._staleness,
            object_store=self._objects,
        )
        return self._index

    @override
    async def committed(self) -> None:
        """Do nothing: other processes find new commits when they look at S3."""

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._prefix = self._prefix_of(spec)

    def _prefix_of(self, spec: ModelSpec) -> str:
        return self._given or f"{spec.name}/"

    @property
    @override
    def location_key(self) -> Hashable:
        return "s3", self._objects, self._prefix

    def _staleness(self) -> float:
        """Return how many seconds old the index may be that answers a read."""
        return self.refresh_s

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        await self._objects.put(self._prefix + uid, body)

    @override
    async def get(self, uid: str) -> bytes:
        return await self._get(uid)

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        if len(uids) == 1:
            return [await self._get(uids[0])]
        turns = asyncio.Semaphore(CONCURRENT_GETS)

        async def one(uid: str) -> bytes:
            async with turns:
                return await self._get(uid)

        return await asyncio.gather(*map(one, uids))

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[BodySnapshot]:
        """Give the bodies of the bucket. A body never changes, and a pin keeps it. Caches are left as they are."""
        yield _BodiesOnS3(self._objects, self._prefix)

    async def _get(self, uid: str) -> bytes:
        found = await self._objects.get(self._prefix + uid)
        if found is None:
            raise StoreDamaged(f"the body {uid} is missing")
        return found.body

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        if uids:
            await self._objects.delete([self._prefix + uid for uid in uids])

    @override
    async def health(self) -> None:
        # The listing is empty, but it fails without the permission to list. The key is given as `after`, not as part of
        # the prefix, because a folder is listed from its first object on.
        async for _ in self._objects.list(self._prefix, self._prefix + "~"):
            break

    @override
    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
        found: list[str] = []
        async for listed in self._objects.list(self._prefix, self._prefix + after if after else ""):
            uid = listed.key.removeprefix(self._prefix)
            if uid > ":":  # it follows the digits: no uid comes after it, but millions of other objects may
                break
            ours = UID.fullmatch(uid)
            if ours is not None and int(ours[1]) < generation:
                found.append(uid)
                if len(found) == limit:
                    break
        return found


class _BodiesOnS3(BodySnapshot):
    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._prefix = objects, prefix
        self._turns = asyncio.Semaphore(2 * CONCURRENT_GETS)  # no request of a client waits for these

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        return await asyncio.gather(*map(self._body, uids))

    async def _body(self, uid: str) -> bytes | None:
        async with self._turns:
            found = await self._objects.get(self._prefix + uid)
        return None if found is None else found.body
