"""Runs the Pulumi program under Pulumi's own CLI and engine, isolated from all settings of the user.

    with Engine(directory, cli) as engine:
        stack = engine.stack("dev", StackConfig(storage="full"))
        stack.up().changes      # {"create": 92}
        stack.outputs()

The CLI, the engine, the state and its encryption are real; AWS is tests/engine/provider.py. Programs run in this
process by the Automation API, so the SDK is imported once.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self
from unittest import mock

import msgspec
import pulumi
import yaml
from pulumi import automation as auto

from infra.artifact import ROOT
from infra.config import StackConfig, read
from infra.config_keys import check_keys, of_program
from infra.protected import check, deployed_stage
from infra.stack import build
from tests.engine.inline import CommitResult, run
from tests.engine.provider import VERSION, Provider, serve
from tests.infra.sdk_classes import load_services

load_services()

PASSPHRASE = "a passphrase of the tests"  # noqa: S105
PROJECT = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["name"]
LIMIT_S = 300
"""The timeout of one command. The longest takes about a minute."""


def isolated(directory: Path, cli: Path) -> dict[str, str]:
    """Return an environment without the user's home, state, plugins, passphrase and AWS account."""
    home = directory / "home"
    home.mkdir(parents=True, exist_ok=True)
    (directory / "state").mkdir(exist_ok=True)
    return {
        "HOME": str(home),
        "PATH": os.pathsep.join(
            [str(cli.parent), str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]
        ),
        "LANG": "C.UTF-8",
        "PULUMI_HOME": str(directory / "pulumi-home"),
        "PULUMI_BACKEND_URL": f"file://{directory / 'state'}",
        "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
    }


def install_plugin(directory: Path) -> None:
    """Install the tests' provider as a plugin of the Pulumi home below this directory."""
    plugin = directory / f"pulumi-home/plugins/resource-aws-v{VERSION}/pulumi-resource-aws"
    plugin.parent.mkdir(parents=True, exist_ok=True)
    called = shlex.join([sys.executable, "-m", "tests.engine.provider"])
    account = shlex.quote(str(directory / "account"))
    plugin.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} CRUDSTACK_TEST_ACCOUNT={account} exec {called} "$@"\n'
    )
    plugin.chmod(0o755)
    (plugin.parent / "PulumiPlugin.yaml").write_text("runtime: go\n")


class EngineStack:
    """A stack of an Engine. Each operation runs the program with the present `config`."""

    def __init__(self, engine: Engine, name: str, config: StackConfig) -> None:
        self.engine, self.name, self.config = engine, name, config
        self._work = engine.directory / f"work-{name}"
        self._work.mkdir(parents=True, exist_ok=True)
        self._file = self._work / f"Pulumi.{name}.yaml"
        # The project's own Pulumi.yaml, so that its config is checked too; an inline program has no `main`.
        lines = (ROOT / "Pulumi.yaml").read_text().splitlines()
        (self._work / "Pulumi.yaml").write_text("\n".join(line for line in lines if not line.startswith("main:")))
        with engine.environment():
            self._stack = auto.create_or_select_stack(
                stack_name=name,
                project_name=PROJECT,
                program=self._program,
                opts=auto.LocalWorkspaceOptions(work_dir=str(self._work), pulumi_command=_command(engine.cli)),
            )
            if "aws:region" not in self._settings():
                self._stack.set_config("aws:region", auto.ConfigValue("eu-central-1"))
        self.program: Callable[[], Mapping[str, Any]] | None = None
        """If set, runs instead of the project's own program."""
        self.checks_protection = True
        """Whether the program checks for protected resources before the engine does."""

    def _program(self) -> None:
        """Do what infra/__main__.py does, with an existing zip."""
        if self.program is not None:
            outputs = self.program()
        else:
            keys = of_program(self._work)
            check_keys(keys, lambda: deployed_stage(self._work))
            config = read({name: value.text for name, value in keys.own.items()}, keys.project)
            state = check(config, self._work) if self.checks_protection else None
            outputs = build(config, zip=self.engine.zip, state=state)
        for name, value in outputs.items():
            pulumi.export(name, value)

    def preview(self, **options: Any) -> CommitResult:
        return self._do("preview", **options)

    def up(self, **options: Any) -> CommitResult:
        return self._do("up", **options)

    def refresh(self, **options: Any) -> CommitResult:
        return self._do("refresh", **options)

    def destroy(self, **options: Any) -> CommitResult:
        return self._do("destroy", **options)

    def _do(self, operation: str, **options: Any) -> CommitResult:
        """Run an operation. A failure is in `error` of the result, which the test must check."""
        arguments = ["--yes", "--skip-preview"] if operation != "preview" else []
        self._write_config()
        with self.engine.environment():
            return run(self._stack, operation, [*arguments, *_flags(options)], self._program)

    def _write_config(self) -> None:
        """Write the settings that differ from the defaults into Pulumi.STACK.yaml. Region and salt stay."""
        content = yaml.safe_load(self._file.read_text())
        kept = {key: value for key, value in content["config"].items() if not key.startswith(f"{PROJECT}:")}
        content["config"] = {**kept, **{f"{PROJECT}:{key}": value for key, value in written(self.config).items()}}
        self._file.write_text(yaml.safe_dump(content))

    def _settings(self) -> dict[str, Any]:
        """Return what Pulumi.STACK.yaml holds."""
        found: dict[str, Any] = yaml.safe_load(self._file.read_text()).get("config", {}) if self._file.exists() else {}
        return found

    def outputs(self) -> dict[str, Any]:
        text = self.engine.run("stack", "output", "--json", "--stack", self.name, cwd=self._work)
        outputs: dict[str, Any] = json.loads(text)
        return outputs

    def exported(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.engine.run("stack", "export", "--stack", self.name, cwd=self._work))
        return state

    def command(self, *arguments: str, check: bool = True) -> str:
        """Run a command of the CLI for this stack, and return its output."""
        return self.engine.run(*arguments, "--stack", self.name, cwd=self._work, check=check)


class Engine:
    """A CLI with a home, a state and an AWS account of its own, all below one directory."""

    def __init__(self, directory: Path, cli: Path) -> None:
        self.directory, self.cli = directory, cli
        self.zip = directory / "app.zip"

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.provider: Provider
        self.provider, port = self._stack.enter_context(serve(self.directory / "account"))
        self.account, self.faults = self.provider.account, self.provider.faults
        self._environment = {**isolated(self.directory, self.cli), "PULUMI_DEBUG_PROVIDERS": f"aws:{port}"}
        install_plugin(self.directory)
        self.zip.write_bytes(b"PK\x05\x06" + bytes(18))  # the engine hashes the file, so it must exist
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stack(self, name: str, config: StackConfig) -> EngineStack:
        return EngineStack(self, name, config)

    @contextmanager
    def environment(self) -> Iterator[None]:
        with mock.patch.dict(os.environ, self._environment, clear=True):
            yield

    def run(self, *arguments: str, cwd: Path, check: bool = True) -> str:
        command = [str(self.cli), *arguments, "--non-interactive", "--color", "never"]
        done = subprocess.run(
            command, cwd=cwd, env=self._environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout if check else done.stdout + done.stderr


@functools.cache
def _command(cli: Path) -> auto.PulumiCommand:
    """Return the CLI for the Automation API, which would ask it for its version for each stack. It is first on PATH."""
    with mock.patch.dict(os.environ, {"PATH": str(cli.parent)}):
        return auto.PulumiCommand()


def written(config: StackConfig) -> dict[str, Any]:
    """Return the keys of a config that differ from the defaults, as a person writes them into Pulumi.STACK.yaml."""
    usual = StackConfig()
    return {
        name: msgspec.to_builtins(value)
        for name in StackConfig.__struct_fields__
        if (value := getattr(config, name)) != getattr(usual, name)
    }


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [f"{flag}={value}"]
    return flags
