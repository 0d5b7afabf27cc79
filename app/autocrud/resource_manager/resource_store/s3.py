"""Bodies on S3. Each revision takes one PUT, and each read one GET. Small bodies of an import share objects: packs."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from ...errors import ConfigError, StoreDamaged
from ...secret import Secret
from ..backends.s3.object_store import CONCURRENT_GETS, ObjectStore, s3
from ..basic import Encoding, ModelSpec, ResourceStore, RevisionInfo
from ..contract.packs import BodyPacking, StoredPack, UidAllotment
from ..contract.protocols import BodySweeping, IndexKeeping
from ..contract.snapshots import PAGE_BYTES, BodySnapshot, BodySnapshots
from ..contract.store_errors import generation_of
from ..runtime.limited import limited
from .packs import UID_PATTERN, PackAllotment, Packs, Place, place_of, places_by_pack

if TYPE_CHECKING:
    from ..meta_store.sqlite3 import S3SqliteMetaStore

UID = re.compile(UID_PATTERN)
"""The uid of a body with an object of its own. Packs are named alike."""
EDITS_AT_ONCE = 8
"""Bodies are removed from so many packs at the same time."""


class S3ResourceStore(ResourceStore, BodySweeping, BodyPacking, BodySnapshots, IndexKeeping):
    """Bodies at the keys `{prefix}{uid}` of a bucket, and in packs.

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
    one prefix would have to be the other one and digits, and no prefix may end with a digit. A pack is a key that is
    exactly the prefix, `packs/`, a uid and `.pack`. For the same reason, no other store has such a key.
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
        self._read_a_pack = False
        self._objects = object_store or s3(bucket, endpoint_url, access_key_id, secret_access_key, region_name)
        self._packs = Packs(self._objects, prefix)

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
        self._packs = Packs(self._objects, self._prefix)

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
    async def put_many(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        """Store bodies. All bodies of a pack must be in one call. Bodies in packs are not put into caches."""
        single: list[tuple[RevisionInfo, bytes]] = []
        packed: dict[str, dict[Place, bytes]] = {}
        for info, body in bodies:
            if (place := place_of(info.uid)) is None:
                single.append((info, body))
            else:
                packed.setdefault(place.pack, {})[place] = body
        if packed and not self._read_a_pack:
            await self._put_first(*packed.popitem())
        await asyncio.gather(*(self._packs.put(pack, content) for pack, content in packed.items()))
        await super().put_many(single)

    @override
    async def get(self, uid: str) -> bytes:
        return self._found(uid, await self._get(uid))

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        if len(uids) == 1:
            return [await S3ResourceStore.get(self, uids[0])]
        found = await self.read(uids, CONCURRENT_GETS)
        return [self._found(uid, found[uid]) for uid in uids]

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[BodySnapshot]:
        """Give the bodies of the bucket. A body never changes, and a pin keeps it. Caches are left as they are."""
        yield _BodiesOnS3(self)

    async def _get(self, uid: str) -> bytes | None:
        if (place := place_of(uid)) is not None:
            (body,) = await self._packs.get([place])
            return body
        return await self._objects.read(self._prefix + uid)

    async def read(self, uids: Sequence[str], at_once: int, most: int | None = None) -> dict[str, bytes | None]:
        """Return the bodies of these uids; None for each one that is missing. Those of one pack take one request.

        at_once  how many requests are under way at the same time
        most     no further request is sent once the bodies take more than this many bytes; None: all bodies are read
        """
        found: dict[str, bytes | None] = {}
        size = 0

        async def single(uid: str) -> None:
            nonlocal size
            found[uid] = body = await self._get(uid)
            size += len(body or b"")

        async def packed(places: Mapping[str, Place]) -> None:
            nonlocal size
            bodies = await self._packs.get(list(places.values()))
            found.update(zip(places, bodies, strict=True))
            size += sum(len(body or b"") for body in bodies)

        packs: dict[str, dict[str, Place]] = {}
        requests: dict[str, Callable[[], Awaitable[None]]] = {}  # by uid or pack, in the order of the uids
        for uid in uids:
            if (place := place_of(uid)) is None:
                requests[uid] = partial(single, uid)
            else:
                places = packs.setdefault(place.pack, {})
                places[uid] = place
                requests.setdefault(place.pack, partial(packed, places))
        wanted = itertools.takewhile(lambda _: most is None or size <= most, requests.values())
        await limited(min(at_once, len(requests)), wanted)
        return found

    @staticmethod
    def _found(uid: str, body: bytes | None) -> bytes:
        if body is None:
            raise StoreDamaged(f"the body {uid} is missing")
        return body

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        single = [uid for uid in uids if place_of(uid) is None]
        if single:
            await self._objects.delete([self._prefix + uid for uid in single])
        packs = places_by_pack(uids)
        removals = (partial(self._packs.remove, places) for places in packs.values())
        await limited(min(EDITS_AT_ONCE, len(packs)), removals)

    # Packs

    async def _put_first(self, pack: str, bodies: Mapping[Place, bytes]) -> None:
        """Store a pack, and check that the server returns a part of it. Raises ConfigError if not."""
        if not await self._packs.put_and_try(pack, bodies):
            raise ConfigError(
                "the object storage does not answer a GET of a range with that range, so imported bodies could not be"
                " read: run `crudstack s3-check`, and use a server that supports ranges"
            )
        self._read_a_pack = True

    @override
    def uid_allotment(self, new_uid: Callable[[], str]) -> UidAllotment:
        return PackAllotment(new_uid)

    @override
    async def packs_older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[StoredPack]:
        return await self._packs.older_than(generation, after, limit)

    @override
    async def retain_in_pack(self, pack: str, uids: Sequence[str]) -> None:
        await self._packs.retain(pack, [place for uid in uids if (place := place_of(uid)) is not None])

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
            if UID.fullmatch(uid) is not None and generation_of(uid) < generation:
                found.append(uid)
                if len(found) == limit:
                    break
        return found


class _BodiesOnS3(BodySnapshot):
    def __init__(self, store: S3ResourceStore) -> None:
        self._store = store

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        found = await self._store.read(uids, 2 * CONCURRENT_GETS, PAGE_BYTES)
        return [found[uid] for uid in itertools.takewhile(found.__contains__, uids)]
