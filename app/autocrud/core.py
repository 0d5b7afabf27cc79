"""AutoCRUD: from Structs to a versioned CRUD service.

crud = AutoCRUD(storage_factory=DiskStorageFactory("./data"))
crud.add_model(Article, indexed_fields=[("author", str)])
app = FastAPI()
crud.apply(app)
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import re
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any, TypeVar

from .access import Authorize, Permissions
from .errors import ConfigError, CrudError, HeadLost, StoreDamaged
from .http import searching, service
from .http.guard import Authenticate
from .http.model_context import Policy
from .resource_manager.basic import Encoding, IndexedField
from .resource_manager.contract.limits import MAX_SCHEMA_VERSION
from .resource_manager.core import ResourceManager
from .resource_manager.engine.operations import Retention
from .resource_manager.model.codec import Codec
from .resource_manager.storage_factory import IStorageFactory, MemoryStorageFactory

T = TypeVar("T")

log = logging.getLogger("crudstack")

RESERVED_NAMES = frozenset({"blobs", "docs", "redoc", "openapi.json", "healthz", "readyz", "export", "import", "admin"})
MAX_BODY = 6 * 1024 * 1024
MAINTAIN_EVERY_S = 3600.0
MAINTAIN_BUDGET_S = 10.0


def kebab(name: str) -> str:
    """`TodoItem` is todo-item, `HTTPLog2` is http-log2."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).replace("_", "-").lower()


NAMINGS: dict[str, Callable[[str], str]] = {
    "kebab": kebab,
    "snake": lambda name: kebab(name).replace("-", "_"),
    "same": lambda name: name,
}


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class AutoCRUD:
    """
    storage_factory   where models are stored unless they say otherwise; default: this process's memory
    encoding          of new bodies, where neither the store nor the model names one
    model_naming      how a class becomes a name in URLs: "kebab", "snake", "same" or a function
    require_if_match  answer 428 to writes that do not say which state they mean to change
    authenticate      who asks: a function of the request that gives a Principal, or raises Unauthenticated; default: anybody may ask
    authorize         what they may do, see `access`; default: everything
    max_body          of a request, in bytes
    fits              whether the body of an answer can be sent; a write whose answer cannot is answered without its data
    clock             the current time, aware; for tests
    """

    def __init__(
        self,
        storage_factory: IStorageFactory | None = None,
        encoding: Encoding = Encoding.json,
        model_naming: str | Callable[[str], str] = "kebab",
        *,
        require_if_match: bool = False,
        authenticate: Authenticate | None = None,
        authorize: Authorize | None = None,
        max_body: int = MAX_BODY,
        fits: Callable[[bytes], bool] = lambda _: True,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        if isinstance(model_naming, str) and model_naming not in NAMINGS:
            raise ConfigError(f"model_naming: expected one of {', '.join(NAMINGS)} or a function, got {model_naming!r}")
        self.storage_factory = storage_factory or MemoryStorageFactory()
        self.encoding = encoding
        self._naming = NAMINGS[model_naming] if isinstance(model_naming, str) else model_naming
        self._policy = Policy(authenticate, authorize, require_if_match, max_body, fits)
        self._clock = clock
        self._managers: dict[str, ResourceManager[Any]] = {}
        self._places: dict[Hashable, str] = {}
        self._applied = self._warned = False
        self._told: set[str] = set()  # models of which the log said that they are stopped

    @property
    def managers(self) -> dict[str, ResourceManager[Any]]:
        """All resource managers by model name."""
        return dict(self._managers)

    def add_model(
        self,
        model: type[T],
        *,
        name: str | None = None,
        indexed_fields: Sequence[IndexedField | tuple[str, Any] | str] = (),
        storage_factory: IStorageFactory | None = None,
        encoding: Encoding | None = None,
        schema_version: int = 1,
        retention: Retention | None = None,
    ) -> ResourceManager[T]:
        """Serve a model: a msgspec Struct, a dataclass or a TypedDict.

        name             in URLs and storage; default: from the class by `model_naming`
        indexed_fields   what can be filtered and sorted by: `IndexedField("email", str, unique=True)`, `("author", str)` or `"author"`
        storage_factory  where this model is stored
        encoding         of its new bodies
        schema_version   recorded with every revision
        retention        how long superseded revisions are kept; default: for ever

        Raises ConfigError for a model, a name or a field that cannot be served.
        """
        if self._applied:
            raise ConfigError("add_model comes before apply: the routes are made already")
        name = name or self._naming(model.__name__)
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name) is None:
            raise ConfigError(f"{name!r} cannot name a model: expected up to 63 letters, digits, - or _")
        if name.lower() in RESERVED_NAMES:
            raise ConfigError(f"{name!r} cannot name a model: a route has this name; pass another one as name=")
        if name.lower() in {other.lower() for other in self._managers}:
            raise ConfigError(f"there is a model {name!r} already; pass another name as name=")
        if not isinstance(schema_version, int) or not 1 <= schema_version <= MAX_SCHEMA_VERSION:
            raise ConfigError(
                f"schema_version: expected a whole number from 1 to {MAX_SCHEMA_VERSION}, got {schema_version!r}"
            )
        codec = Codec(model, indexed_fields)
        for field in codec.fields:
            if field in searching.LIST_PARAMETERS or field == "meta" or field.startswith("meta."):
                raise ConfigError(f"{model.__name__}.{field} cannot be indexed: a parameter of searches has this name")
            if re.fullmatch(r"[^\[\]&=,;#\s]+", field) is None or field.startswith("-"):
                raise ConfigError(
                    f"{model.__name__}.{field} cannot be indexed: its name does not fit into a query string"
                )
        manager = ResourceManager(
            name,
            codec,
            (storage_factory or self.storage_factory).build(name),
            encoding=encoding or self.encoding,
            schema_version=schema_version,
            retention=retention,
            clock=self._clock,
        )
        for place in manager.storage.location_keys:
            other = self._places.setdefault(place, name)
            if other != name:
                raise ConfigError(
                    f"models {other!r} and {name!r} would keep their data in the same place, and remove each other's: have the storage factory"
                    " make each one's stores for its name, with a directory, prefix or table of its own"
                )
        self._managers[name] = manager
        return manager

    def resource_manager(self, model: type[T] | str) -> ResourceManager[T]:
        """The manager of a model, by class or by name; KeyError if there is none, or several of this class."""
        if isinstance(model, str):
            return self._managers[model]
        found = [manager for manager in self._managers.values() if manager.codec.model is model]
        if len(found) != 1:
            raise KeyError(f"{model.__name__} was added {len(found)} times; ask by name")
        return found[0]

    def apply(self, app_or_router: Any) -> None:
        """Put the API onto a FastAPI or Starlette application, or a router of theirs.

        An application also gets the OpenAPI description and a docs page with local assets. Stores are opened at its start-up, or at
        their first use where there is no start-up (Lambda), and closed at its shutdown.
        """
        authorize = self._policy.authorize
        if isinstance(authorize, Permissions) and (unknown := authorize.models - set(self._managers)):
            raise ConfigError(
                f"permissions name the model {min(unknown)!r}; there are {', '.join(self._managers)} and *"
            )
        made = service.routes(self._managers, self._policy)
        authenticated = self._policy.authenticate is not None
        service.mount(app_or_router, made, self._lifespan, self._managers, authenticated=authenticated)
        self._applied = True

    def describe(self, app: Any, prefix: str = "") -> None:
        """Add the models to the OpenAPI of an application that included a router which they were applied to."""
        authenticated = self._policy.authenticate is not None
        service.describe_application(app, self._managers, prefix, authenticated=authenticated)

    async def open(self) -> None:
        """Make all stores ready: directories, schemas, indexes. Errors show here instead of at the first request.

        A model whose stored data is damaged stays closed, and the log says so: its requests are answered 503, and all
        others are served. If all models are, StoreDamaged is raised.
        """
        damaged: list[StoreDamaged] = []
        for name, manager in self._managers.items():
            try:
                await manager.open()
            except HeadLost:  # what was acknowledged may be lost: somebody must decide what to do
                raise
            except StoreDamaged as error:
                damaged.append(error)
                if name not in self._told:
                    self._told.add(name)
                    log.error("%s is stopped, the other models are served: %s", name, error.detail)
        if damaged and len(damaged) == len(self._managers):
            raise damaged[0]
        lost = [name for name, manager in self._managers.items() if not manager.storage.durable]
        if lost and not self._warned:
            self._warned = True
            log.warning("not durable, gone when the process ends: %s", ", ".join(lost))

    async def maintain(self, budget_s: float = MAINTAIN_BUDGET_S) -> None:
        """Housekeeping of all models inside a time budget; what is left is done by the next call.

        Each has its share, so none waits for ever; where one fails the others are still done, and then its error is raised.
        """
        failed: Exception | None = None
        for name, manager in self._managers.items():
            try:
                await manager.maintain(budget_s / len(self._managers))
            except Exception as error:
                log.warning("housekeeping of %s failed: %s", name, error)
                failed = failed or error
        if failed is not None:
            raise failed

    async def close(self) -> None:
        """Close all stores; they may be used again."""
        for manager in self._managers.values():
            await manager.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        await self.open()
        housekeeping = asyncio.create_task(self._maintain_forever())
        try:
            yield
        finally:
            housekeeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await housekeeping
            await self.close()

    async def _maintain_forever(self) -> None:
        while True:
            await asyncio.sleep(MAINTAIN_EVERY_S)
            try:
                await self.maintain()
            except CrudError as error:
                log.warning("housekeeping failed, it is tried again: %s", error)
            except Exception:
                log.exception("housekeeping failed, it is tried again")
