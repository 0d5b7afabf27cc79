"""The command line `crudstack`. For a wrong or missing setting, it prints one sentence to stderr and exits with 2."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import logging.handlers
import os
import secrets
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import apsw
import msgspec
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from fastapi import FastAPI
from msgspec.structs import replace

from . import backup_commands, iam_auth
from .autocrud.errors import ConfigError, CrudError, HeadLost, StoreDamaged, StoreUnavailable
from .autocrud.resource_manager.backends.s3.errors import describe
from .dev import local_s3 as s3_server
from .dev import pulumi_cli
from .dev.aws_account import check_profile, stack_profile, use_profile
from .dev.environment import environment
from .main import create_app
from .s3_tools.lost_copies import lost_copies, remedy
from .server import serve as http_server
from .settings import TokenAuth, is_loopback, load
from .wiring import needs_s3, region_of

cli = App(
    name="crudstack",
    help="A versioned CRUD HTTP API for the Structs in app/models.py.",
    help_format="plaintext",
    version_flags=[],
)


tokens = App(name="token", help="Bearer tokens, for CRUDSTACK_AUTH.", help_format="plaintext", version_flags=[])
cli.command(tokens)
cli.command(backup_commands.export)
cli.command(backup_commands.import_archive, name="import")
cli.command(backup_commands.snapshot)


@cli.command
def serve(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8000,
    storage: str | None = None,
    stack: str | None = None,
    local_s3: Annotated[bool, Parameter(negative="")] = False,
    make_bucket: Annotated[bool, Parameter(negative="")] = False,
    access_log: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Serve the API until Ctrl-C.

    Settings come from CRUDSTACK_STORAGE, CRUDSTACK_DATA_DIR, CRUDSTACK_BUCKET and the like, or from CRUDSTACK_OUTPUTS
    (JSON, or the path of a file).

    Parameters
    ----------
    host
        The address to listen on. If other machines can reach it, CRUDSTACK_AUTH must be set.
    port
        The port to listen on; 0 selects a free one.
    storage
        A storage kind, or a pair as JSON, instead of CRUDSTACK_STORAGE.
    stack
        Serve the data of this Pulumi stack with your own credentials.
    local_s3
        Run an S3 server (ministack) with its data in CRUDSTACK_DATA_DIR, unless an endpoint is set.
    make_bucket
        Create the bucket if it does not exist.
    access_log
        Write one JSON line to stdout for each request.
    """
    settings = load(environment(storage, stack))
    if settings.outputs.auth is None and not is_loopback(host):
        raise ConfigError(
            f"every client that reaches {host} could read and write: set CRUDSTACK_AUTH (`crudstack token new` creates"
            " a token), or CRUDSTACK_AUTH=none to give every client access"
        )
    with contextlib.ExitStack() as running:
        if needs_s3(settings):
            if local_s3 and settings.local.s3_endpoint_url is None:
                settings = replace(settings, local=s3_server.start(settings.local, running))
            if make_bucket and settings.outputs.bucket is not None:
                s3_server.make_bucket(settings.outputs.bucket, settings.local.s3_endpoint_url, region_of(settings))
        app = create_app(settings, loopback=is_loopback(host))
        _serve(app, host, port, access_log=access_log)


@cli.command
def outputs(*, stack: str | None = None) -> None:
    """Print the outputs of a Pulumi stack as JSON for CRUDSTACK_OUTPUTS: names, endpoints and ARNs, no secrets.

    Parameters
    ----------
    stack
        The name of the stack; by default the selected one.
    """
    found = pulumi_cli.outputs(stack)
    check_profile(stack_profile(pulumi_cli.config(stack)))
    print(msgspec.json.format(msgspec.json.encode(found)).decode())


@cli.command
def s3_check(store: str, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Test whether an S3 store is fit, before you store data there. All objects of the test are deleted.

    The endpoint is CRUDSTACK_S3_ENDPOINT_URL; keys and region are those of `serve`. The exit code is 0 if the store is
    fit, and 1 if it is not.

    Parameters
    ----------
    store
        s3://bucket/prefix, or s3://bucket.
    json
        Print one JSON document instead of sentences.
    """
    from .s3_tools.s3_check_command import run

    if code := run(store, as_json=json):
        sys.exit(code)


@tokens.command
def rotate(*, stack: str | None = None, yes: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Replace the API token of a stack with `pulumi up`. The stack then refuses the old token.

    Parameters
    ----------
    stack
        The name of the stack; by default the selected one.
    yes
        Do not ask for confirmation.
    """
    check_profile(stack_profile(pulumi_cli.config(stack)))
    before = pulumi_cli.token_sha256(stack)
    key, number = pulumi_cli.next_generation(stack)
    print(f"{key} is {number} now", file=sys.stderr)
    pulumi_cli.up(stack, yes=yes)
    if (after := pulumi_cli.token_sha256(stack)) is not None and after == before:
        raise ConfigError(
            f"the API token is the same as before, and still valid: `pulumi up` created no new one, although {key} is"
            f" {number}; find out with `pulumi config` and `pulumi preview` why the program does not read that key"
        )
    show(stack=stack)


@tokens.command
def show(*, stack: str | None = None) -> None:
    """Print the API token of a stack, from Secrets Manager.

    Parameters
    ----------
    stack
        The name of the stack; by default the selected one.
    """
    found = pulumi_cli.outputs(stack)
    use_profile(stack_profile(pulumi_cli.config(stack)))
    try:
        print(iam_auth.api_token(found))
    except StoreUnavailable as error:
        raise ConfigError(f"{error.detail}{f': {describe(error.__cause__)}' if error.__cause__ else ''}") from None


@tokens.command
def new() -> None:
    """Create a token, and print it with the setting that accepts it. The setting holds only its SHA-256."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    setting = msgspec.json.encode(TokenAuth(token_sha256=digest)).decode()
    print(f"token    {token}\nsetting  CRUDSTACK_AUTH='{setting}'")


@cli.command(name="s3-rescue")
def s3_rescue(
    file: Path,
    *,
    storage: str | None = None,
    stack: str | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the acknowledged writes that the object storage lost (`history-forked`) to a file, as JSON lines.

    Run it on the machine, and with the settings, of the program that answered `history-forked`.

    Parameters
    ----------
    file
        The file to write. It must be new, or contain all lost changes already.
    storage
        The value of `serve --storage`.
    stack
        The value of `serve --stack`.
    resume
        Remove the record of the fork and the local copies afterwards, so that the program serves again. Stop the
        program first.
    """
    from .s3_tools.s3_rescue import rescue

    settings = load(environment(storage, stack))
    if settings.local.data_dir is None:
        raise ConfigError(
            "CRUDSTACK_DATA_DIR is not set: forks are recorded in that directory; without it only the log names"
            " lost data"
        )

    crud = create_app(settings).state.crud

    async def run() -> None:
        try:
            done = await rescue(crud.managers, file, resume=resume)
        finally:
            await crud.close()
        without = f", {done.without_data} of them without data" if done.without_data else ""
        print(f"{file}: {done.changes} lost changes of {done.transactions} transactions{without}")
        for path in done.copies:
            print(f"{path}: the local copy, because the log of some transactions is gone")
        if resume:
            print("start the program again, on an object storage that decides between concurrent writers")
        else:
            print(f"to resume, stop the program and run `crudstack s3-rescue {file} --resume`")

    asyncio.run(run())


def _serve(app: FastAPI, host: str, port: int, *, access_log: bool) -> None:
    with http_server.bind(host, port) as listener:
        _open(app)
        http_server.run(app, listener, host, access_log=access_log)


def _open(app: FastAPI) -> None:
    """Open the stores, so that their errors are shown before the server listens."""

    async def opened() -> None:
        try:
            await app.state.crud.open()
            for manager in app.state.crud.managers.values():
                with contextlib.suppress(StoreDamaged):  # the log names such a model, which answers 503
                    await manager.degradations()  # tries optional parts too; the log names failures
        except HeadLost as error:
            copies = await lost_copies(app.state.crud.managers.values())
            await app.state.crud.close()
            raise ConfigError(f"{error.detail}{remedy(copies)}") from None
        except BaseException:
            await app.state.crud.close()  # pending connection attempts would keep the event loop from ending
            raise

    with _said_afterwards() as records:
        try:
            asyncio.run(opened())
        except StoreUnavailable as error:
            records.clear()  # the error below says the same
            raise ConfigError(_why(error)) from None


def _why(error: StoreUnavailable) -> str:
    """Return the reason why a store cannot be opened, without advice for clients such as "try again"."""
    what, cause = error.detail.partition(";")[0], error.__cause__
    hint = "do its address and credentials fit?"
    if "directory" in what or isinstance(cause, apsw.Error):
        hint = "is CRUDSTACK_DATA_DIR a directory to write to?"
    return f"{what}{f' ({describe(cause)})' if cause is not None else ''}; {hint}"


@contextlib.contextmanager
def _said_afterwards() -> Iterator[list[logging.LogRecord]]:
    """Buffer log records, and log each distinct message at the end. The caller may change the list."""
    held = logging.handlers.BufferingHandler(sys.maxsize)
    records = held.buffer
    logging.root.addHandler(held)
    try:
        yield records
    finally:
        logging.root.removeHandler(held)
        for record in {record.getMessage(): record for record in records}.values():
            logging.getLogger(record.name).handle(record)


def main() -> None:
    """Run the console script, and end it with the exit code of the command."""
    try:
        try:
            code = _run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # Exit as after SIGPIPE. Buffered output is discarded, because Python would report an error at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _run() -> int:
    """Run the command that the arguments name. Return 0, or 2 after one sentence on stderr."""
    try:
        cli(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"crudstack: {error}".strip(), file=sys.stderr)
        return 2
    except CrudError as error:
        print(f"crudstack: {error.detail}", file=sys.stderr)
        return 2
    return 0


def _reader_is_gone() -> bool:
    """Return whether stdout or stderr is a pipe whose reader has ended, as in `crudstack outputs | true`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
