"""The commands `crudstack export`, `import` and `snapshot`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from msgspec.structs import replace

from .archive_place import ArchivePlace
from .autocrud.errors import ConfigError, CrudError, InvalidData
from .dev.environment import environment
from .progress_line import MB, ProgressBar
from .settings import Pair, Settings, load
from .wiring import needs_s3, pairs

if TYPE_CHECKING:
    from .autocrud import AutoCRUD
    from .autocrud.backup.importing import ImportResult, ModelImport, ModelSurvey

T = TypeVar("T")

FAILED, INTERRUPTED = 1, 130
SHOWN_IDS = 10
Flag = Annotated[bool, Parameter(negative="")]
Models = Annotated[list[str] | None, Parameter(negative="")]
Archive = Annotated[str, Parameter(allow_leading_hyphen=True)]  # for `-`


def export(
    archive: Archive,
    *,
    storage: str | None = None,
    stack: str | None = None,
    local_s3: Flag = False,
    model: Models = None,
    per_resource: Flag = False,
    force: Flag = False,
    json: Flag = False,
) -> None:
    """Write an archive of all models, or of some, while programs read and write them.

    The archive holds all fields of all resources, deleted ones too.

    The exit code is 0 if the archive is complete, 1 if the export failed,
    and 2 if an argument or a setting is wrong.

    Parameters
    ----------
    archive
        A file whose name ends with .tar.gz or .tar.zst, s3://bucket/key, or - for stdout (.tar.gz).
    storage
        The value of `serve --storage`.
    stack
        The value of `serve --stack`.
    local_s3
        Use the S3 server of `serve --local-s3` and `make run`, which may run or not.
    model
        Export this model only. May be given several times.
    per_resource
        Export each resource as at some moment, and not all of a model as at the same one.
    force
        Replace an archive that exists.
    json
        Print one JSON document instead of sentences.
    """
    from .autocrud.backup.compression import Compression
    from .autocrud.backup.exporting import ExportResult, export_all

    place = ArchivePlace(archive)
    from .stack_backup import export_stack, needs_function

    compression = Compression.gzip if place.is_stdio else Compression.of_name(place.name)
    place.check_stdout()
    settings = load(environment(storage, stack))
    _check_data_directory(settings)
    running = ExitStack()
    if local_s3:
        settings = _with_local_s3(settings, running)

    async def work(crud: AutoCRUD | None) -> ExportResult:
        options: dict[str, Any] = {"models": model, "each_resource": per_resource, "compression": compression}
        options |= {"progress": progress, "replace": force}
        async with place.writing(settings, force=force) as output:
            if crud is None:
                return await export_stack(settings, output, **options)
            return await export_all(crud.managers, output, **options)

    progress = ProgressBar(" files", "download")
    with running:
        result = _run(settings, model, work, progress, in_function=needs_function(settings))
    report = sys.stderr if place.is_stdio else sys.stdout
    if json:
        models = [one._asdict() for one in result.models]
        _print_json({"archive": archive, "sha256": result.sha256, "size": result.size, "models": models}, report)
        return
    print(f"{archive}: {_megabytes(result.size)}, SHA-256 {result.sha256}", file=report)
    for one in result.models:
        moment = "" if one.one_moment else "; each resource as at some moment"
        print(
            f"{one.name}: {one.resources} resources, {one.revisions} revisions, {one.blobs} files{moment}", file=report
        )
        if one.absent:
            print(f"{one.name}: not in the archive, because they were purged: {_some(one.absent)}", file=report)


def import_archive(
    archive: Archive,
    *,
    storage: str | None = None,
    stack: str | None = None,
    local_s3: Flag = False,
    model: Models = None,
    on_conflict: Literal["fail", "skip", "replace"] = "fail",
    sha256: str | None = None,
    max_bytes: Annotated[int | None, Parameter(validator=Number(gt=0))] = None,
    check: Flag = False,
    resume: Flag = False,
    abort: Flag = False,
    json: Flag = False,
) -> None:
    """Put the resources of an archive into the models, while programs read and write them.

    The whole archive is verified before anything is changed. Then stderr tells
    how many bodies do not fit the models. If the import is killed, run it
    again with --resume or with --abort. If it still runs, they stop it.

    The exit code is 0 if all is imported, 1 if the import failed or if it left
    out resources whose unique values other resources have, and 2 if an argument
    or a setting is wrong. Resources that "skip" keeps count as imported.

    Parameters
    ----------
    archive
        A file, s3://bucket/key, or - for stdin.
    storage
        The value of `serve --storage`.
    stack
        The value of `serve --stack`.
    local_s3
        Use the S3 server of `serve --local-s3` and `make run`, which may run or not.
    model
        Import this model only. May be given several times.
    on_conflict
        If a model has a resource of the archive already: "fail" refuses the import, "skip" keeps the stored one,
        "replace" takes the one of the archive.
    sha256
        Refuse an archive with another SHA-256.
    max_bytes
        Refuse an archive that takes more bytes when it is decompressed. The default is the free disk space.
    check
        Change nothing: only verify the archive, look for conflicts, and tell what does not fit the models.
    resume
        Continue an import of the same archive that is not finished, with its --on-conflict or, if that is given,
        with "skip" or "replace".
    abort
        Take back an import of the same archive that is not finished.
    json
        Print one JSON document instead of sentences.
    """
    from .autocrud.backup.importing import import_all
    from .stack_backup import import_stack, needs_function

    place = ArchivePlace(archive)
    settings = load(environment(storage, stack))
    running = ExitStack()
    if local_s3:
        settings = _with_local_s3(settings, running)

    async def work(crud: AutoCRUD | None) -> ImportResult:
        options: dict[str, Any] = {"models": model, "on_conflict": on_conflict, "sha256": sha256}
        options |= {"max_bytes": max_bytes, "resume": resume, "abort": abort, "check": check}
        options |= {"surveyed": surveyed, "progress": progress}
        async with place.reading(settings) as source:
            if crud is None:
                return await import_stack(settings, source, **options)
            return await import_all(crud.managers, source, **options)

    def surveyed(models: Mapping[str, ModelSurvey]) -> None:
        progress.clear()
        for name, one in models.items():
            found[name] = f"{one.resources} resources, {one.revisions} revisions"
            if one.not_fitting:
                print(_unfit(name, one), file=sys.stderr)

    found: dict[str, str] = {}
    progress = ProgressBar("verify", " files", "upload")
    with running:
        result = _run(settings, model, work, progress, in_function=needs_function(settings))
    if json:
        _print_json({"archive": archive, **result._asdict()}, sys.stdout)
    else:
        print(f"{archive}: {_megabytes(result.size)}, SHA-256 {result.sha256}")
        for name, one in result.models.items():
            print(f"{name}: {', '.join([found[name], *_left_out(one)]) if check else _outcome(one)}")
            if one.ids:
                print(f"{name}: {_some(one.ids)}")
    if _tell_left_out(result.models, "would be" if check else "were"):
        sys.exit(FAILED)


def _tell_left_out(models: Mapping[str, ModelImport], are: str) -> bool:
    """Print how many resources of each model were or would be left out, and return whether there are any."""
    found = False
    for name, model in models.items():
        if counts := [f"{count} for the value of {field}" for field, count in model.unique_conflicts.items() if count]:
            found = True
            print(
                f"crudstack: resources of {name!r} {are} left out, because other resources have their unique values:"
                f" {', '.join(counts)}",
                file=sys.stderr,
            )
    return found


def _unfit(name: str, model: ModelSurvey) -> str:
    is_one = model.not_fitting == 1
    fit, kept = ("does not fit", "is kept as it is") if is_one else ("do not fit", "are kept as they are")
    return f"{model.not_fitting:,} of {model.revisions:,} bodies of {name!r} {fit} today's model, and {kept}"


def _outcome(one: ModelImport) -> str:
    """Return what an import did to a model, as one line."""
    amounts = {
        "created": one.created,
        "replaced": one.replaced,
        "skipped": one.skipped,
        "taken back": one.taken_back,
        "not taken back": one.not_taken_back,
        "files": one.blobs,
        "bodies that do not fit the model": one.not_fitting,
    }
    told = [f"{count} {what}" for what, count in amounts.items() if count]
    return ", ".join(told + _left_out(one)) or "nothing to do"


def _left_out(one: ModelImport) -> list[str]:
    return [f"{count} left out for the value of {field}" for field, count in one.unique_conflicts.items() if count]


def snapshot(directory: Path, *, storage: str | None = None, json: Flag = False) -> None:
    """Copy the data directory of the kinds disk and memory-disk while the server runs.

    The copy can be used as CRUDSTACK_DATA_DIR. The files of resources are linked
    if it is on the same file system.

    The exit code is 0 if the copy is complete, 1 if it failed or if the data
    directory lacks files, and 2 if an argument or a setting is wrong.

    Parameters
    ----------
    directory
        The new directory.
    storage
        The value of `serve --storage`.
    json
        Print one JSON document instead of sentences.
    """
    from .autocrud.backup.directory_snapshot import snapshot_directory

    settings = load(environment(storage, None))
    _check_on_disk(pairs(settings))
    if settings.local.data_dir is None:
        raise ConfigError("CRUDSTACK_DATA_DIR is not set: it names the directory to copy")
    progress = ProgressBar(" index", " bodies")
    with _failures(progress):
        models = snapshot_directory(Path(settings.local.data_dir).expanduser(), directory, progress)
    damaged = [one for one in models if one.damaged]
    if json:
        _print_json({"directory": str(directory), "models": [one._asdict() for one in models]}, sys.stdout)
    else:
        for one in models:
            print(f"{one.name}: {one.resources} resources, {one.files} files")
            if one.purged:
                print(f"{one.name}: not in the copy, because they were purged: {_some(one.purged)}")
    for one in damaged:
        print(f"{one.name}: the data directory lacks files of these resources: {_some(one.damaged)}", file=sys.stderr)
    if damaged:
        sys.exit(FAILED)


def _check_data_directory(settings: Settings) -> None:
    """Raise ConfigError if the directory of the data does not exist: an archive of nothing is no backup."""
    if settings.local.data_dir is None or not any("disk" in (pair.meta, pair.resource) for pair in pairs(settings)):
        return
    directory = Path(settings.local.data_dir).expanduser()
    if not directory.is_dir():
        raise ConfigError(f"CRUDSTACK_DATA_DIR is {str(directory)!r}, and there is no such directory")


def _check_on_disk(stores: Collection[Pair]) -> None:
    for pair in stores:
        if pair.resource != "disk" or pair.meta not in ("disk", "memory"):
            raise ConfigError(
                f"found a model with metadata in {pair.meta!r} and bodies in {pair.resource!r}; expected the kinds disk"
                " and memory-disk, which keep all data in the data directory: use `crudstack export`"
            )


def _run(
    settings: Settings,
    models: Collection[str] | None,
    work: Callable[[AutoCRUD | None], Awaitable[T]],
    progress: ProgressBar,
    *,
    in_function: bool,
) -> T:
    """Export or import the models of the settings. Ends the program if that fails.

    in_function  whether the function of the stack does the work, because only it reaches the servers
    """
    crud: AutoCRUD | None = None
    if not in_function:
        from .main import create_app

        crud = create_app(settings).state.crud
        _check_readable(crud, models)

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None, "asyncio.run makes one"
        with suppress(NotImplementedError, RuntimeError):  # not on this platform, or not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            if crud is not None and needs_s3(settings):
                from .bucket_check import check_bucket_of_settings

                await check_bucket_of_settings(settings)
            return await work(crud)
        finally:
            if crud is not None:
                await crud.close()

    with _failures(progress):
        return asyncio.run(run())


@contextmanager
def _failures(progress: ProgressBar) -> Iterator[None]:
    """End the program with one sentence if the work is stopped or fails. Wrong arguments and settings are raised."""
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.clear()
        print("crudstack: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ConfigError, InvalidData):
        progress.clear()
        raise
    except CrudError as error:
        progress.clear()
        print(f"crudstack: {error.detail}", file=sys.stderr)
        sys.exit(FAILED)
    else:
        progress.clear()


def _with_local_s3(settings: Settings, running: ExitStack) -> Settings:
    """Use the S3 server of `serve --local-s3`. Runs one until `running` ends, if none runs."""
    from .dev import local_s3

    if settings.local.s3_endpoint_url is not None or not needs_s3(settings):
        return settings
    return replace(settings, local=local_s3.start(settings.local, running, share=True))


def _check_readable(crud: AutoCRUD, models: Collection[str] | None) -> None:
    """Raise ConfigError if a model is in the memory of a server, which only the server can read."""
    for name, manager in crud.managers.items():
        if manager.storage.in_process and (not models or name in models):
            raise ConfigError(
                f"the model {name!r} is in the memory of the running server: export it with"
                " `curl -fo backup.tar.gz http://localhost:8000/export`, and import it with"
                " `curl -f -X POST -T backup.tar.gz http://localhost:8000/import`; choose other models by --model"
            )


def _print_json(document: Mapping[str, Any], file: IO[str]) -> None:
    print(msgspec.json.format(msgspec.json.encode(document)).decode(), file=file)


def _megabytes(size: int) -> str:
    return f"{size / MB:,.1f} MB"


def _some(ids: Collection[str]) -> str:
    shown = ", ".join(list(ids)[:SHOWN_IDS])
    return shown if len(ids) <= SHOWN_IDS else f"{shown} and {len(ids) - SHOWN_IDS} more"
