"""Runs a program of this process under the CLI, as the Automation API does, and reads the engine's events.

The Automation API's own functions request outputs and history after each operation, which takes longer than the
operation. Its server also leaves its event loop open if the engine ends before the program, which causes a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from pulumi import automation as auto
from pulumi.automation._server import LanguageServer
from pulumi.automation._stack import ExecKind
from pulumi.runtime import reset_options, run_in_stack, set_all_config
from pulumi.runtime.proto import language_pb2, language_pb2_grpc

GRACE_S, STOP_S = 2, 60
"""How long a program may continue after its engine has ended, and how long it may take to stop it."""


@dataclass
class Step:
    """A step of the engine for one resource: done, or planned by a preview."""

    op: str
    """"create", "same", "update", "replace", "delete", "refresh" and the like."""
    type: str
    urn: str
    changed: list[str]

    @property
    def name(self) -> str:
        return self.urn.rpartition("::")[2]


@dataclass
class CommitResult:
    """The result of an operation."""

    steps: list[Step] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)
    """As the engine counts them: {"create": 34}; without "same"."""
    diagnostics: list[str] = field(default_factory=list)
    """Errors and warnings, without colours."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Outputs of the stack, as the engine shows them. wire.UNKNOWN stands for values that a preview does not know."""
    error: str = ""
    """The output of the CLI if it failed."""

    def of(self, *ops: str) -> list[Step]:
        return [step for step in self.steps if step.op in ops]

    def changed(self, *ops: str) -> set[str]:
        """Return the resources with one of these steps, as "Function crudstack-dev-api"; without components."""
        return {f"{step.type.rpartition(':')[2]} {step.name}" for step in self.of(*ops) if step.type.startswith("aws:")}


class ProgramServer(LanguageServer):
    """The SDK's server for inline programs. Closes its event loop also if the program fails."""

    def __init__(self, program: Callable[[], None]) -> None:
        super().__init__(program)
        self._ended = threading.Event()
        self._ended.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def end(self) -> None:
        """Stop a program whose engine has ended.

        It would wait for answers for ever, and disturb the next program, because the SDK keeps its state in globals.
        """
        if not self._ended.wait(GRACE_S):
            assert self._loop is not None, "the program began"
            with contextlib.suppress(RuntimeError):  # it ended just now, and its loop is closed
                self._loop.call_soon_threadsafe(self._loop.stop)
            assert self._ended.wait(STOP_S), "the program did not stop"

    def Run(self, request: Any, context: Any) -> Any:
        self._ended.clear()
        try:
            return contextvars.copy_context().run(self._run, request)
        finally:
            self._ended.set()

    def _run(self, request: Any) -> Any:
        reset_options(
            project=request.project,
            monitor_address=request.monitor_address,
            engine_address=request.args[0] if request.args else "",
            stack=request.stack,
            parallel=request.parallel,
            preview=request.dryRun,
            organization=request.organization or "organization",
        )
        set_all_config(request.config, request.configSecretKeys or None)
        loop, executor = asyncio.new_event_loop(), ThreadPoolExecutor(max_workers=4 * max(request.parallel, 1))
        self._loop = loop
        loop.set_default_executor(executor)
        loop.set_exception_handler(lambda *_: None)  # results that are no longer needed
        try:
            loop.run_until_complete(run_in_stack(self.program))
        except Exception as error:
            return language_pb2.RunResponse(error=f"{type(error).__name__}: {error}")
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            executor.shutdown(wait=False)
            loop.close()
        return language_pb2.RunResponse()


def run(stack: auto.Stack, operation: str, arguments: list[str], program: Callable[[], None]) -> CommitResult:
    """Run an operation of the CLI on a stack. A failure is in `error` of the result.

    arguments    flags in addition to those that an inline program needs
    """
    done, log = CommitResult(), Path(stack.workspace.work_dir, "events.json")
    log.unlink(missing_ok=True)
    with contextlib.ExitStack() as running:
        if operation in ("preview", "up"):
            programs, server = ProgramServer(program), grpc.server(futures.ThreadPoolExecutor(max_workers=4))
            language_pb2_grpc.add_LanguageRuntimeServicer_to_server(programs, server)
            arguments = [*arguments, f"--client=127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"]
            server.start()
            running.callback(programs.end)
            running.callback(lambda: server.stop(None).wait())
        command = [operation, *arguments, "--exec-kind", ExecKind.INLINE.value, "--event-log", str(log)]
        try:
            stack._run_pulumi_cmd_sync([*command, "--color", "never"])
        except auto.CommandError as error:
            done.error = str(error)
    if log.exists():
        for line in log.read_text().splitlines():
            _note(json.loads(line), done)
    return done


def _note(event: dict[str, Any], done: CommitResult) -> None:
    if "diagnosticEvent" in event and event["diagnosticEvent"]["severity"] in ("error", "warning"):
        done.diagnostics.append(event["diagnosticEvent"]["message"].strip())
    elif "resourcePreEvent" in event:
        told = event["resourcePreEvent"]["metadata"]
        changed = sorted(told.get("detailedDiff") or told.get("diffs") or [])
        done.steps.append(Step(told["op"], told["type"], told["urn"], changed))
    elif "resOutputsEvent" in event and event["resOutputsEvent"]["metadata"]["type"] == "pulumi:pulumi:Stack":
        done.outputs = (event["resOutputsEvent"]["metadata"].get("new") or {}).get("outputs") or {}
    elif "summaryEvent" in event:
        counted = Counter(event["summaryEvent"]["resourceChanges"])
        done.changes = {op: number for op, number in counted.items() if op != "same" and number}
