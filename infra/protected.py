"""Refuse an update that would delete protected resources, before it changes anything.

The engine would refuse too, but only after it has created, updated and deleted everything else. Therefore `check` reads
the protected resources from the stack's state, and compares them with the resources that the config asks for.
`tests/infra/test_protected.py` checks that this comparison agrees with the program.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pulumi

from app.autocrud.errors import ConfigError
from infra.config import StackConfig

EXPORT_S = 60
"""Seconds after which reading the state is given up. Reading it from a file takes 0.2 seconds."""
DATABASE = {
    "Instance": "instance",
    "ParameterGroup": "instance",
    "Cluster": "aurora",
    "ClusterInstance": "aurora",
    "ClusterParameterGroup": "aurora",
    "SubnetGroup": None,
    "SecurityGroup": None,
}
"""The types of a database's resources. The value is the `postgres.mode` with this type, or None if both have it."""


DATA_BUCKET = re.compile(r"crudstack-(.+)-data")
"""The name of the bucket of a stack. The group is the stage."""


class Protected(NamedTuple):
    """A protected resource of the state."""

    urn: str
    type: str
    name: str


class Refusal(NamedTuple):
    """A value of the config with which an update would delete a protected resource."""

    key: str
    found: str
    lost: str
    """The resource that an update would remove, in a few words."""
    expected: str


def check(config: StackConfig, root: Path) -> Any:
    """Raise ConfigError if an update of the running program's stack would delete protected resources.

    The error names the key, and the command that unprotects exactly these resources. After that command the update is
    possible. Returns the state of the stack. If the state cannot be read, returns None after a warning that says why;
    the engine then refuses such an update itself.

    root    the directory of Pulumi.yaml
    """
    try:
        state = export(_stack(), root)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        pulumi.log.warn(
            f"`pulumi stack export` did not tell what is protected ({_reason(error)}): if this update would delete a"
            " protected resource, Pulumi refuses that at its end, after the other changes"
        )
        return None
    refuse(config, protected(state), pulumi.get_stack(), pulumi.get_project())
    return state


def deployed_stage(root: Path) -> str | None:
    """Return the stage that the resources of the running program's stack have; None if there are none.

    Raises ConfigError if the state cannot be read.

    root    the directory of Pulumi.yaml
    """
    try:
        return stage_of(export(_stack(), root))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"`pulumi stack export` did not tell the stage of this stack ({_reason(error)}): correct that, then run"
            " this again"
        ) from None


def stage_of(state: Any) -> str | None:
    """Return the stage in the name of the bucket in an exported state; None if there is no such bucket."""
    for each in (state.get("deployment") or {}).get("resources") or []:
        name = each["urn"].rpartition("::")[2]
        if each["type"] == "aws:s3/bucket:Bucket" and (found := DATA_BUCKET.fullmatch(name)):
            return found[1]
    return None


def _stack() -> str:
    return f"{pulumi.get_organization()}/{pulumi.get_project()}/{pulumi.get_stack()}"


def export(stack: str, root: Path) -> Any:
    """Return the state of a stack as JSON, secrets encrypted. Needs no passphrase and takes no lock.

    The program has the environment of the CLI that runs it, so this is the same login and backend. Raises OSError if
    there is no `pulumi` on PATH, SubprocessError if it fails or takes too long, ValueError if it prints no JSON.
    """
    done = subprocess.run(
        ["pulumi", "stack", "export", "--stack", stack, "--non-interactive"],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=EXPORT_S,
    )
    return json.loads(done.stdout)


def protected(state: Any) -> list[Protected]:
    """Return the protected resources of an exported state, without replaced ones that are yet to be deleted."""
    resources = (state.get("deployment") or {}).get("resources") or []
    return [
        Protected(each["urn"], each["type"], each["urn"].rpartition("::")[2])
        for each in resources
        if each.get("protect") and not each.get("delete")
    ]


def refuse(config: StackConfig, found: Iterable[Protected], stack: str, project: str) -> None:
    """Raise ConfigError if the program no longer registers one of these resources.

    The error contains the names of the stack and the project.
    """
    by_refusal: dict[Refusal, list[str]] = {}
    for resource in found:
        if (refusal := refusal_of(config, resource)) is not None:
            by_refusal.setdefault(refusal, []).append(resource.urn)
    for refusal, urns in by_refusal.items():
        quoted = " ".join(f"'{urn}'" for urn in urns)
        raise ConfigError(
            f"{project}:{refusal.key} is {refusal.found}: the update would remove {refusal.lost}, which this stack"
            f" protects; expected {refusal.expected}, or, to give it up, first"
            f" `pulumi state unprotect {quoted} --stack {shlex.quote(stack)}`"
        )


def refusal_of(config: StackConfig, resource: Protected) -> Refusal | None:
    """Return the value of the config because of which the program would no longer register a resource.

    Returns None if the program would register the resource, or if the resource does not belong to the program.
    """
    if not resource.name.startswith("crudstack-") or not resource.type.startswith("aws:"):
        return None
    prefix, type_ = f"crudstack-{config.stage}-", resource.type.rpartition(":")[2]
    if not resource.name.startswith(prefix):
        before = resource.name.split("-")[1]
        lost = f"all resources of the stage {before}"
        return Refusal("stage", config.stage, lost, f"{before}, and another stack for another stage")
    name = resource.name.removeprefix(prefix)
    if type_ in DATABASE and name.startswith("database"):
        return _database(config, DATABASE[type_], name)
    if type_ in {"Vpc", "Subnet"}:
        return None if config.needs_network else _storage(config)
    if type_ in {"Secret", "SecretVersion"} and name.startswith("token"):
        return _token(config, name)
    if resource.type.startswith("aws:apigatewayv2/") and config.edge != "http-api":
        return Refusal("edge", config.edge, "the HTTP API and with it the URL", "http-api")
    if type_ == "FunctionUrl" and config.edge != "function-url":
        return Refusal("edge", config.edge, "the URL of the function", "function-url")
    return None


def _database(config: StackConfig, mode: str | None, name: str) -> Refusal | None:
    if "postgres" not in config.servers:
        return _storage(config)
    if mode not in (None, config.postgres.mode):
        return Refusal("postgres.mode", config.postgres.mode, "the database", str(mode))
    if name == "database-1" and not config.postgres.multi_az:
        return Refusal("postgres.multi_az", "false", "the second instance of the database", "true")
    return None


def _storage(config: StackConfig) -> Refusal:
    expected = "a storage, or an entry of storage_overrides, that needs it, such as postgres-s3"
    return Refusal("storage", _shown(config.storage), "the database", expected)


def _token(config: StackConfig, name: str) -> Refusal | None:
    if config.auth != "token":
        return Refusal("auth", _shown(config.auth), "the API token", "token")
    generation = name.removeprefix("token-")
    # The program also registers the generation before, so that a rotation deletes no protected resource.
    if not generation.isdecimal() or int(generation) in (config.token_generation, config.token_generation - 1):
        return None
    lost = f"the API token of generation {generation}"
    expected = f"{generation}, or {int(generation) + 1} for a new token"
    return Refusal("token_generation", f"{config.token_generation}", lost, expected)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _reason(error: Exception) -> str:
    """Return the last line of an error."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {error.returncode}"
    return str(error)
