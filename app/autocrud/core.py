"""AutoCRUD: serves Structs as a versioned CRUD API.

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
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from .access import Authorize, Permissions
from .errors import ConfigError, CrudError, HeadLost, StoreDamaged
from .http import backups, searching, service
from .http.guard import Authenticate
from .http.model_context import Policy
from .resource_manager.basic import Encoding, IndexedField
from .resource_manager.contract.limits import MAX_SCHEMA_VERSION
from .resource_manager.core import MAX_BLOB, BlobLimits, ResourceManager
from .resource_manager.engine.operations import Retention
from .resource_manager.model.codec import Codec
from .resource_manager.storage_factory import IStorageFactory, MemoryStorageFactory

if TYPE_CHECKING:
    from .backup.exporting import ExportResult, Progress
    from .backup.importing import ImportResult, OnConflict, Surveyed

T = TypeVar("T")

log = logging.getLogger("crudstack")

RESERVED_NAMES = frozenset({"blobs", "docs", "redoc", "openapi.json", "healthz", "readyz", "export", "import", "admin"})
MAX_BODY = 6 * 1024 * 1024
MAINTAIN_EVERY_S = 3600.0
MAINTAIN_BUDGET_S = 10.0


def kebab(name: str) -> str:
    """Return a class name in kebab case: `TodoItem` becomes `todo-item`, `HTTPLog2` becomes `http-log2`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).replace("_", "-").lower()


NAMINGS: dict[str, Callable[[str], str]] = {
    "kebab": kebab,
    "snake": lambda name: kebab(name).replace("-", "_"),
    "same": lambda name: name,
}


def utc_now() -> dt.datetime:
    """Return the current time, in UTC."""
    return dt.datetime.now(dt.UTC)


def _checked(limits: BlobLimits) -> BlobLimits:
    for name, value in (("max_blob", limits.max_size), ("blob_quota", limits.quota)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ConfigError(f"{name}: expected a number of bytes above 0, got {value!r}")
    return limits


class AutoCRUD:
    """The models of a service, their stores, and the HTTP API that serves them.

    Args:
        storage_factory: Makes the stores of each model that has no factory of its own. The default keeps data in the
            memory of this process.
        encoding: The encoding of new bodies. A model or a store may set another one.
        model_naming: How a class becomes a name in URLs: "kebab", "snake", "same", or a function of the class name.
        require_if_match: Whether a write to a resource without If-Match is answered with 428.
        authenticate: A function of the request that returns a Principal, or raises Unauthenticated. It may be async.
            The default accepts every caller as anonymous.
        authorize: What a principal may do; see `access.Permissions`. The default allows everything.
        max_body: The largest request body, in bytes.
        max_blob: The largest file, in bytes.
        blob_quota: The largest size of all files of a model together, in bytes, for models without their own quota.
            None means no limit.
        fits: A function of a response body that returns whether it can be sent. If the response to a write cannot be
            sent, the response leaves out the data.
        clock: Returns the current time, with a time zone. Tests replace it.

    Raises ConfigError if `model_naming` is unknown.
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
        max_blob: int = MAX_BLOB,
        blob_quota: int | None = None,
        fits: Callable[[bytes], bool] = lambda _: True,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        if isinstance(model_naming, str) and model_naming not in NAMINGS:
            raise ConfigError(f"model_naming: expected one of {', '.join(NAMINGS)} or a function, got {model_naming!r}")
        self.storage_factory = storage_factory or MemoryStorageFactory()
        self.encoding = encoding
        self._naming = NAMINGS[model_naming] if isinstance(model_naming, str) else model_naming
        self._policy = Policy(authenticate, authorize, require_if_match, max_body, fits)
        self._clock, self._blob_limits = clock, _checked(BlobLimits(max_blob, blob_quota))
        self._managers: dict[str, ResourceManager[Any]] = {}
        self._model_at: dict[Hashable, str] = {}  # the model that keeps its data at a location
        self._applied = self._warned = False
        self._reported: set[str] = set()  # the models that the log has reported as stopped

    @property
    def managers(self) -> dict[str, ResourceManager[Any]]:
        """All resource managers, by model name."""
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
        max_blob: int | None = None,
        blob_quota: int | None = None,
    ) -> ResourceManager[T]:
        """Add a model: a msgspec Struct, a dataclass or a TypedDict. Does no I/O.

            crud.add_model(User, indexed_fields=[IndexedField("email", str, unique=True), ("age", int), "address.city"])

        Args:
            model: The class.
            name: The name in URLs and in storage. The default is made from the class by `model_naming`.
            indexed_fields: The fields that searches can filter and sort by. Each is an `IndexedField`, a pair of name
                and type, or a name whose type is taken from the model.
            storage_factory: Makes the store of this model. The default is that of this AutoCRUD.
            encoding: The encoding of new bodies of this model.
            schema_version: A number that is recorded with every revision.
            retention: Which superseded revisions are kept. The default keeps all.
            max_blob: The largest file of this model, in bytes. The default is that of this AutoCRUD.
            blob_quota: The largest size of all its files together, in bytes. The default is that of this AutoCRUD.

        Returns the resource manager of the model. Raises ConfigError if the model, its name or a field is not accepted.
        """
        if self._applied:
            raise ConfigError("add_model was called after apply, which makes the routes: add all models first")
        name = name or self._naming(model.__name__)
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name) is None:
            raise ConfigError(f"{name!r} cannot name a model: expected up to 63 letters, digits, - or _")
        if name.lower() in RESERVED_NAMES:
            raise ConfigError(f"{name!r} cannot name a model: a route has this name; pass another one as name=")
        if name.lower() in {other.lower() for other in self._managers}:
            raise ConfigError(f"there is already a model {name!r}; pass another name as name=")
        if not isinstance(schema_version, int) or not 1 <= schema_version <= MAX_SCHEMA_VERSION:
            raise ConfigError(
                f"schema_version: expected a whole number from 1 to {MAX_SCHEMA_VERSION}, got {schema_version!r}"
            )
        limits = BlobLimits(
            self._blob_limits.max_size if max_blob is None else max_blob,
            self._blob_limits.quota if blob_quota is None else blob_quota,
        )
        _checked(limits)
        codec = Codec(model, indexed_fields)
        for field in codec.fields:
            if field in searching.LIST_PARAMETERS or field == "meta" or field.startswith("meta."):
                raise ConfigError(
                    f"{model.__name__}.{field} cannot be indexed: a query parameter of searches has this name"
                )
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
            blob_limits=limits,
        )
        for key in manager.storage.location_keys:
            other = self._model_at.setdefault(key, name)
            if other != name:
                raise ConfigError(
                    f"models {other!r} and {name!r} would keep their data in the same place, and remove each"
                    " other's; let the storage factory use the name of the model in the directory, prefix or table"
                )
        self._managers[name] = manager
        return manager

    def resource_manager(self, model: type[T] | str) -> ResourceManager[T]:
        """Return the resource manager of a model, by class or by name.

        Raises KeyError if no model matches, or if several models have this class.
        """
        if isinstance(model, str):
            return self._managers[model]
        found = [manager for manager in self._managers.values() if manager.codec.model is model]
        if len(found) != 1:
            raise KeyError(f"{model.__name__} was added {len(found)} times; ask by name")
        return found[0]

    def apply(self, app_or_router: Any) -> None:
        """Add the routes to a FastAPI or Starlette application, or to a router of either.

        An application also gets the OpenAPI document and a docs page whose assets are local. The stores are opened when
        the application starts, and closed when it shuts down. On AWS Lambda there is no start-up: the stores are opened
        when they are first used.

        Raises ConfigError if `authorize` names a model that was not added.
        """
        authorize = self._policy.authorize
        if isinstance(authorize, Permissions) and (unknown := authorize.models - set(self._managers)):
            raise ConfigError(
                f"permissions name the model {min(unknown)!r}; there are {', '.join(self._managers)} and *"
            )
        made = service.routes(self._managers, self._policy)
        made += backups.routes(self._managers, self._policy, self._export_to, self._import_from)
        authenticated = self._policy.authenticate is not None
        service.mount(app_or_router, made, self._lifespan, self._managers, authenticated=authenticated)
        self._applied = True

    def describe(self, app: Any, prefix: str = "") -> None:
        """Add the models to the OpenAPI document of an application that includes the router given to `apply`.

        `prefix` is the path under which the application includes the router.
        """
        authenticated = self._policy.authenticate is not None
        service.describe_application(app, self._managers, prefix, authenticated=authenticated)

    async def open(self) -> None:
        """Open all stores: create directories and schemas, and build indexes. Configuration errors are raised here.

        If the stored data of a model is damaged, the model stays closed and the error is logged. Its requests are
        answered with 503; all other models are served. Raises StoreDamaged if all models are damaged, and HeadLost if
        acknowledged data of any model may be lost.
        """
        damaged: list[StoreDamaged] = []
        for name, manager in self._managers.items():
            try:
                await manager.open()
            except HeadLost:  # acknowledged data may be lost: an operator must decide what to do
                raise
            except StoreDamaged as error:
                damaged.append(error)
                if name not in self._reported:
                    self._reported.add(name)
                    log.error("%s is stopped, the other models are served: %s", name, error.detail)
        if damaged and len(damaged) == len(self._managers):
            raise damaged[0]
        if not self._warned:
            self._warned = True
            self._warn_of_losses()

    def _warn_of_losses(self) -> None:
        lost = [name for name, manager in self._managers.items() if not manager.storage.durable]
        in_process = [name for name in lost if self._managers[name].storage.in_process]
        if in_process:
            log.warning("not durable, gone when the process ends: %s", ", ".join(in_process))
        if elsewhere := [name for name in lost if name not in in_process]:
            log.warning("not durable, may be lost when the server of the store ends: %s", ", ".join(elsewhere))

    async def maintain(self, budget_s: float = MAINTAIN_BUDGET_S) -> None:
        """Run the housekeeping of all models for at most `budget_s` seconds; the next call does the remaining work.

        Every model gets an equal share of the time. If the housekeeping of a model fails, the other models are still
        maintained, and then the first error is raised.
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

    async def export_all(
        self,
        output_path: str | Path,
        *,
        models: Collection[str] | None = None,
        each_resource: bool = False,
        progress: Progress | None = None,
    ) -> ExportResult:
        """Write an archive of all models, or of some: their resources, revisions, files and Idempotency-Keys.

            await crud.export_all(output_path="./backup.tar.gz")

        Programs may read and write meanwhile: each model is as at one moment. The archive has the mode 0600, and its
        name only once it is complete. It holds all fields of all resources, deleted ones too.

        Args:
            output_path: A name that ends with `.tar.gz` or `.tar.zst`. An existing file is replaced.
            models: Names of models. The default is all.
            each_resource: Whether each resource may be as at some moment, so that no long transaction is needed.
            progress: Called with the amount that is done, the total if it is known, and what is counted.

        Raises StoreDamaged if data is missing that was not purged, and PinLost if the export was interrupted for too
        long.
        """
        from .backup.exporting import export_all

        return await export_all(
            self._managers, output_path, models=models, each_resource=each_resource, progress=progress
        )

    async def import_all(
        self,
        input_path: str | Path,
        *,
        on_conflict: OnConflict = "fail",
        models: Collection[str] | None = None,
        sha256: str | None = None,
        max_bytes: int | None = None,
        resume: bool = False,
        abort: bool = False,
        without_journal: bool = False,
        check: bool = False,
        surveyed: Surveyed | None = None,
        progress: Progress | None = None,
    ) -> ImportResult:
        """Put the resources of an archive into the stores. The whole archive is verified before anything is changed.

            await crud.import_all(input_path="./backup.tar.gz")

        Args:
            input_path: An archive that `export_all` or `crudstack export` wrote, from any kind of storage.
            on_conflict: What happens to a resource whose id the model has already: "fail" refuses the import, "skip"
                keeps the stored one, "replace" takes that of the archive.
            models: Names of models of the archive. The default is all.
            sha256: The SHA-256 that the archive must have.
            max_bytes: How many bytes the archive may take when it is decompressed. The default is the free disk space.
            resume: Whether to continue an import of the same archive that is not finished. It keeps its `on_conflict`,
                unless "skip" or "replace" is given.
            abort: Whether to take back an import of the same archive that is not finished.
            without_journal: Whether to import into a model with data whose custom storage keeps no journal.
            check: Whether to verify the archive, and to stop before anything is changed.
            surveyed: Called before anything is changed, with a ModelSurvey for each model: it tells how many bodies do
                not fit.
            progress: Called with the amount that is done, the total if it is known, and what is counted.

        Raises BadArchive, ArchiveTooLarge, ImportConflict, ImportUnfinished or ImportTakenOver. Raises ImportIncomplete
        or an error of the stores if the import fails after it has changed something; the message says how much is
        imported, and what to do.
        """
        from .backup.importing import import_all

        return await import_all(
            self._managers,
            input_path,
            on_conflict=on_conflict,
            models=models,
            sha256=sha256,
            max_bytes=max_bytes,
            resume=resume,
            abort=abort,
            without_journal=without_journal,
            check=check,
            surveyed=surveyed,
            progress=progress,
        )

    async def _export_to(self, output: BinaryIO, options: backups.ExportOptions) -> object:
        from .backup.compression import Compression
        from .backup.exporting import export_all

        compression = Compression.gzip if options.format == "tar.gz" else Compression.zstd
        return await export_all(
            self._managers,
            output,
            models=options.models,
            each_resource=options.each_resource,
            compression=compression,
        )

    async def _import_from(self, archive: AsyncIterator[bytes], options: backups.ImportOptions) -> object:
        from .backup.importing import import_all
        from .backup.option_names import PARAMETERS, options_named

        with options_named(PARAMETERS):
            result = await import_all(
                self._managers,
                archive,
                on_conflict=cast("OnConflict", options.on_conflict),
                models=options.models,
                sha256=options.sha256,
                max_bytes=options.max_bytes,
                resume=options.resume,
                abort=options.abort,
                undo=True,
                check=options.check,
            )
        return result._asdict()

    async def close(self) -> None:
        """Close all stores. The next use opens them again."""
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
                log.warning("housekeeping failed, it will be tried again: %s", error)
            except Exception:
                log.exception("housekeeping failed, it will be tried again")
