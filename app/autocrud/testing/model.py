"""A model with every kind of indexed field."""

from __future__ import annotations

import datetime as dt
import enum
import itertools
from collections.abc import Awaitable, Callable, Collection, Sequence
from decimal import Decimal
from typing import Any, Literal, cast
from uuid import UUID

from msgspec import UNSET, Struct, UnsetType

from .. import Encoding, IndexedField
from ..resource_manager.basic import Findings, IndexEntry, Reindex, ResourceStore, Version
from ..resource_manager.contract.protocols import FindingsKeeping, IndexMigration
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import Retention
from ..resource_manager.model.codec import Codec
from ..resource_manager.storage.simple_storage import SimpleStorage
from ..resource_manager.storage_factory import IStorageFactory


class Color(enum.Enum):
    """An enum of texts."""

    red = "red"
    green = "green"


class Level(enum.IntEnum):
    """An enum of integers."""

    low = 1
    high = 2


class Inner(Struct):
    """Nested data."""

    code: str | None = None


class Item(Struct, kw_only=True):
    """The data of the tests, with a field of each kind."""

    text: str = ""
    number: int | None = None
    real: float | None = None
    flag: bool = False
    at: dt.datetime | None = None
    day: dt.date = dt.date(2026, 1, 31)
    key: UUID = UUID(int=0)
    price: Decimal | None = None
    color: Color = Color.red
    level: Level = Level.low
    choice: Literal["a", "b"] = "a"
    tags: list[str] | None = None
    numbers: list[int] = []
    inner: Inner | None = None
    maybe: str | UnsetType | None = UNSET
    code: str | None = None  # unique
    note: str = ""  # not indexed


class Stricter(Struct, kw_only=True):
    """A later version of Item that stored data does not fit: one type differs, and a required field is new."""

    text: str
    number: int | None = None
    code: int | None = None
    extra: str


INDEXED: list[IndexedField | tuple[str, Any] | str] = [
    "text",
    ("number", int),
    ("real", float),
    "flag",
    "at",
    "day",
    "key",
    "price",
    "color",
    "level",
    "choice",
    ("tags", list[str]),
    "numbers",
    "inner.code",
    "maybe",
    IndexedField("code", str, unique=True),
]


class Clock:
    """A clock that tests set. Each call advances it by one microsecond."""

    def __init__(self) -> None:
        self.now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        """Advance the clock, and return its time."""
        self.now += dt.timedelta(microseconds=1)
        return self.now


def manage(
    factory: IStorageFactory,
    *,
    encoding: Encoding | None = None,
    retention: Retention | None = None,
    clock: Clock | None = None,
    indexed: Sequence[IndexedField | tuple[str, Any] | str] = INDEXED,
    name: str = "item",
    model: type[Any] = Item,
) -> ResourceManager[Item]:
    """Return a manager as AutoCRUD makes it."""
    return ResourceManager(
        name,
        Codec(model, indexed),
        factory.build(name),
        encoding=encoding,
        schema_version=1,
        retention=retention,
        clock=clock or Clock(),
    )


def storage_of(manager: ResourceManager[Any]) -> SimpleStorage:
    """Return the storage of a manager, for tests that reach into its stores."""
    return cast(SimpleStorage, manager.storage)


class Failing:
    """Makes one read of a body fail: the read number `at`, from 0."""

    def __init__(self, store: ResourceStore, *, at: int, error: Exception) -> None:
        self._store, self._at, self._error, self._reads = store, at, error, itertools.count()
        self._get = store.get
        store.get = self._read  # type: ignore[method-assign]

    async def _read(self, uid: str) -> bytes:
        if next(self._reads) == self._at:
            raise self._error
        return await self._get(uid)

    def heal(self) -> None:
        """Remove the failure."""
        del self._store.get


class FailingCall:
    """Makes one request of a start fail.

    at    the number of the request, from 0
    done  whether the store executes the request before it fails
    """

    def __init__(self, storage: SimpleStorage, *, at: int, done: bool, error: Exception) -> None:
        self._at, self._done, self._error, self._calls = at, done, error, itertools.count()
        self.failed = False
        of_meta_store = (
            "generation",
            "findings",
            "keep_findings",
            "outdated",
            "reindex",
            "activate_unique_fields",
            "search",
        )
        self._patched: list[tuple[object, str]] = [
            (storage.meta_store, name) for name in of_meta_store if hasattr(storage.meta_store, name)
        ]
        self._patched += [(storage.resource_store, "get")]
        for store, name in self._patched:
            setattr(store, name, self._failing(getattr(store, name)))

    def _failing(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def called(*arguments: Any, **named: Any) -> Any:
            if next(self._calls) != self._at:
                return await call(*arguments, **named)
            self.failed = True
            if self._done:
                await call(*arguments, **named)
            raise self._error

        return called

    def heal(self) -> None:
        """Remove the failure."""
        for store, name in self._patched:
            delattr(store, name)


async def drop_entries(manager: ResourceManager[Any], ids: Collection[str] = ()) -> bool:
    """Empty the index entries of these ids, or of all resources. Programs before R4 of `reindexing` left such entries.

    Returns False if the store keeps no findings. Such a store does not heal, or builds its index from the bodies at
    each start.
    """
    store = storage_of(manager).meta_store
    if not isinstance(store, FindingsKeeping):
        return False
    assert isinstance(store, IndexMigration)
    await store.keep_findings(Findings())
    assert await store.findings() == Findings()
    fields = tuple(manager.codec.fields)
    empty = IndexEntry({}, fields, b"{}")
    entries = [
        Reindex(meta.resource_id, Version(meta.version, meta.nonce), empty)
        async for meta in store.scan()
        if not ids or meta.resource_id in ids
    ]
    await store.reindex(entries)
    return True
