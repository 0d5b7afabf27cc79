"""The command line. A wrong or missing setting is one sentence on stderr and exit code 2."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
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

from . import iam_auth as sign_in
from .autocrud.errors import ConfigError, CrudError, HeadLost, StoreDamaged, StoreUnavailable
from .autocrud.resource_manager.backends.s3.errors import said
from .dev import local_s3 as buckets
from .dev import pulumi_cli as stacks
from .dev.aws_account import check_profile, stack_profile, use_profile
from .main import create_app
from .s3_tools.lost_copies import lost_copies, remedy
from .server import serve as server
from .settings import STACK_VARIABLES, LocalOverrides, TokenAuth, load, parse_storage
from .wiring import needs_s3, region_of

cli = App(
    name="crudstack",
    help="A versioned CRUD HTTP API for the Structs in app/models.py.",
    help_format="plaintext",
    version_flags=[],
)


tokens = App(name="token", help="Bearer tokens, for CRUDSTACK_AUTH.", help_format="plaintext", version_flags=[])
cli.command(tokens)


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

    Settings come from CRUDSTACK_STORAGE, CRUDSTACK_DATA_DIR, CRUDSTACK_BUCKET and the like, or from CRUDSTACK_OUTPUTS (JSON, or the path
    of a file).

    Parameters
    ----------
    host
        The address to listen on. For one that others reach, CRUDSTACK_AUTH must say who is let in.
    port
        The port to listen on; 0 takes a free one.
    storage
        A storage kind, or a pair as JSON, instead of CRUDSTACK_STORAGE.
    stack
        Serve the data of this Pulumi stack, as its outputs say, with your own credentials.
    local_s3
        Run an S3 of its own (ministack) with its data in CRUDSTACK_DATA_DIR, unless an endpoint is set.
    make_bucket
        Make the bucket if it is not there.
    access_log
        Write a line of JSON for every request.
    """
    settings = load(_environment(storage, stack))
    if settings.outputs.auth is None and not _is_loopback(host):
        raise ConfigError(
            f"whoever reaches {host} could read and write: say in CRUDSTACK_AUTH who is let in (`crudstack token new` makes a token), or"
            " CRUDSTACK_AUTH=none for everybody"
        )
    with contextlib.ExitStack() as running:
        if needs_s3(settings):
            if local_s3 and settings.local.s3_endpoint_url is None:
                settings = replace(settings, local=_start_s3(settings.local, running))
            if make_bucket and settings.outputs.bucket is not None:
                buckets.make_bucket(settings.outputs.bucket, settings.local.s3_endpoint_url, region_of(settings))
        app = create_app(settings, loopback=_is_loopback(host))
        _serve(app, host, port, access_log=access_log)


@cli.command
def outputs(*, stack: str | None = None) -> None:
    """Print what a Pulumi stack provides, as JSON for CRUDSTACK_OUTPUTS: names, endpoints and ARNs, never a secret.

    Parameters
    ----------
    stack
        Its name; the selected one if none is given.
    """
    found = stacks.outputs(stack)
    check_profile(stack_profile(stacks.config(stack)))
    print(msgspec.json.format(msgspec.json.encode(found)).decode())


@cli.command
def s3_check(store: str, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Say whether an S3 store is fit, before anything is put there. Every object that is written for it is deleted.

    The endpoint comes from CRUDSTACK_S3_ENDPOINT_URL, keys and region as for `serve`. The exit code is 0 if the store is fit, 1 if it is not.

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
    """Replace a stack's API token by a new one, by `pulumi up`. The old one is refused from then on.

    Parameters
    ----------
    stack
        Its name; the selected one if none is given.
    yes
        Do not ask before the changes are made.
    """
    check_profile(stack_profile(stacks.config(stack)))
    before = stacks.token_sha256(stack)
    key, number = stacks.next_generation(stack)
    print(f"{key} is {number} now", file=sys.stderr)
    stacks.up(stack, yes=yes)
    if (after := stacks.token_sha256(stack)) is not None and after == before:
        raise ConfigError(
            f"the API token is the same as before, and still valid: `pulumi up` made no new one, although {key} is"
            f" {number}; look with `pulumi config` and `pulumi preview` why the program does not read that key"
        )
    show(stack=stack)


@tokens.command
def show(*, stack: str | None = None) -> None:
    """Print a stack's API token, which Secrets Manager keeps.

    Parameters
    ----------
    stack
        Its name; the selected one if none is given.
    """
    found = stacks.outputs(stack)
    use_profile(stack_profile(stacks.config(stack)))
    try:
        print(sign_in.api_token(found))
    except StoreUnavailable as error:
        raise ConfigError(f"{error.detail}{f': {said(error.__cause__)}' if error.__cause__ else ''}") from None


@tokens.command
def new() -> None:
    """Make a token, and the setting that lets whoever has it in. It is shown once: only its SHA-256 is kept."""
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
    """Write the writes that were acknowledged here and that the object storage lost to a file, as JSON lines (`history-forked`).

    Run it on the machine and with the settings of the program that answered `history-forked`.

    Parameters
    ----------
    file
        The file to write. It must not exist, or have all lost changes already.
    storage
        What `serve --storage` was given.
    stack
        What `serve --stack` was given.
    resume
        Remove the record of the fork and the local copies afterwards, so that the program serves again. Stop the program before.
    """
    from .s3_tools.s3_rescue import rescue

    settings = load(_environment(storage, stack))
    if settings.local.data_dir is None:
        raise ConfigError(
            "CRUDSTACK_DATA_DIR is not set: forks are recorded in that directory; without it the log names what is lost"
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


def _environment(storage: str | None, stack: str | None) -> dict[str, str]:
    """Return the environment with the settings of the options --storage and --stack instead of its own."""
    environment = dict(os.environ)
    if storage is not None:
        parse_storage(storage, "--storage")  # what is wrong with it is no fault of a variable
        environment["CRUDSTACK_STORAGE"] = storage
        environment.pop("CRUDSTACK_OUTPUTS", None)
    if stack is not None:
        for name in STACK_VARIABLES:
            environment.pop(name, None)
        environment["CRUDSTACK_OUTPUTS"] = msgspec.json.encode(stacks.outputs(stack)).decode()
        use_profile(stack_profile(stacks.config(stack)))
    return environment


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _start_s3(local: LocalOverrides, running: contextlib.ExitStack) -> LocalOverrides:
    """Run an S3 as long as `running`, and take keys that it accepts."""
    if local.data_dir is None:
        raise ConfigError("CRUDSTACK_DATA_DIR is not set: --local-s3 keeps its data in that directory")
    url = running.enter_context(buckets.ministack(Path(local.data_dir) / "ministack"))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(buckets.LOCAL_KEYS)
    return replace(local, s3_endpoint_url=url)


def _serve(app: FastAPI, host: str, port: int, *, access_log: bool) -> None:
    with server.bind(host, port) as listener:
        _open(app)
        server.run(app, listener, host, access_log=access_log)


def _open(app: FastAPI) -> None:
    """Open the stores, so that what is wrong with them shows before anything listens."""

    async def opened() -> None:
        try:
            await app.state.crud.open()
            for manager in app.state.crud.managers.values():
                with contextlib.suppress(StoreDamaged):  # such a model is stopped, as the log says
                    await manager.impairments()  # what can be done without is tried too: the log says what fails
        except HeadLost as error:
            copies = await lost_copies(app.state.crud.managers.values())
            await app.state.crud.close()
            raise ConfigError(f"{error.detail}{remedy(copies)}") from None
        except BaseException:
            await app.state.crud.close()  # what still tries to connect would keep the event loop from ending
            raise

    with _said_afterwards() as records:
        try:
            asyncio.run(opened())
        except StoreUnavailable as error:
            records.clear()  # it is said once, here
            raise ConfigError(_why(error)) from None


def _why(error: StoreUnavailable) -> str:
    """What keeps a store from being opened, for whoever starts it; "try again" and the like are for clients."""
    what, cause = error.detail.partition(";")[0], error.__cause__
    hint = "do its address and credentials fit?"
    if "directory" in what or isinstance(cause, apsw.Error):
        hint = "is CRUDSTACK_DATA_DIR a directory to write to?"
    return f"{what}{f' ({said(cause)})' if cause is not None else ''}; {hint}"


@contextlib.contextmanager
def _said_afterwards() -> Iterator[list[logging.LogRecord]]:
    """Hold back what is logged meanwhile, and log it afterwards, each message once; the list may be changed."""
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
        # As if SIGPIPE had ended it. What is still buffered goes nowhere, or Python would complain when it exits.
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
    """Return whether stdout or stderr is a pipe that nobody reads any more, like that of `crudstack outputs | true`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
