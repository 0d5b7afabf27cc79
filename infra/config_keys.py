"""Refuse keys of a stack's config that the program would ignore, and keys that were set as secrets.

A key of Pulumi's config is NAMESPACE:NAME, and the project's own keys begin with its name in Pulumi.yaml. Pulumi passes
every key to the program and checks no namespace. So after the project was renamed, `crudstack:stage: prod` would be
ignored, and the stack would not be protected. The program and `make deploy` both call `check_keys`.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import msgspec
import pulumi
import yaml
from msgspec import Struct
from pulumi.runtime import config as runtime

from app.autocrud.errors import ConfigError
from app.dev.pulumi_cli import ConfigValue
from infra.config import StackConfig, read

FIRST_NAME = "crudstack"
"""The name that the project has until its user changes it."""
OF_PULUMI = "pulumi"
"""The namespace of the engine's own keys."""
TAKEN = ("aws", OF_PULUMI)
"""Names that the project must not have: its keys would be mixed with others, such as aws:region."""

DeployedStage = Callable[[], str | None]
"""Returns the stage that the stack's resources have; None if there are none. Raises ConfigError."""


class Keys(Struct, frozen=True, kw_only=True):
    """The config of a stack, and the names that its keys are compared with."""

    project: str
    """The name in Pulumi.yaml."""
    stack: str
    values: Mapping[str, ConfigValue]
    """All values by full key, with the defaults of Pulumi.yaml."""
    in_project_file: Collection[str] = ()
    """The keys in Pulumi.yaml, which `pulumi config` cannot change."""

    @property
    def own(self) -> dict[str, ConfigValue]:
        """Return the values of the project's keys, by name."""
        start = f"{self.project}:"
        return {key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)}

    def command(self, *words: str) -> str:
        """Return a `pulumi config` command for this stack, quoted for a shell."""
        return " ".join(["pulumi config", words[0], "--stack", shlex.quote(self.stack), *words[1:]])


def of_program(root: Path) -> Keys:
    """Return the config of the running program. `root` is the directory of Pulumi.yaml."""
    given = {**runtime.get_config_env(), **runtime.CONFIG.get()}
    secret = runtime.get_config_secret_keys_env()
    values = {key: ConfigValue(text, key in secret or runtime.is_config_secret(key)) for key, text in given.items()}
    project, stack = pulumi.get_project(), pulumi.get_stack()
    return Keys(project=project, stack=stack, values=values, in_project_file=project_file_keys(root / "Pulumi.yaml"))


def project_file_keys(file: Path) -> frozenset[str]:
    """Return the keys below `config:` in Pulumi.yaml."""
    return frozenset((yaml.safe_load(file.read_text()) or {}).get("config") or {})


def check_keys(keys: Keys, deployed_stage: DeployedStage) -> None:
    """Raise ConfigError if a key would be ignored, if one of the project's keys is a secret, or if its name is `TAKEN`.

    The error names the keys and the command that corrects them. It never holds the value of a secret.
    """
    if keys.project in TAKEN:
        raise ConfigError(
            f"the `name` in Pulumi.yaml is {keys.project}, with which keys like {keys.project}:"
            f"{'region' if keys.project == 'aws' else 'tags'} begin that are not the project's: expected another name"
        )
    if leftovers := [key for key in sorted(keys.values) if _is_leftover(keys, key)]:
        raise ConfigError(_leftover(keys, leftovers, deployed_stage))
    if secrets := [name for name, value in keys.own.items() if value.secret]:
        raise ConfigError(_secret(keys, secrets))


def _is_leftover(keys: Keys, key: str) -> bool:
    """Return whether a key was meant for this project, but begins with another name.

    Every key that begins with the project's first name was meant for it. A key of another namespace was meant for it if
    it has the name of a setting, unless the namespace belongs to a provider: `auth0:domain` and `pulumi:tags` are
    legal.
    """
    namespace, _, name = key.rpartition(":")
    if namespace == keys.project:
        return False
    return namespace == FIRST_NAME or (name in StackConfig.__struct_fields__ and not _is_provider(namespace))


def _is_provider(namespace: str) -> bool:
    """Return whether a namespace is that of a provider whose package is installed. The program can use no other."""
    package = f"pulumi_{namespace.replace('-', '_')}"
    return namespace == OF_PULUMI or (package.isidentifier() and importlib.util.find_spec(package) is not None)


def _leftover(keys: Keys, leftovers: list[str], deployed_stage: DeployedStage) -> str:
    found = f"{_list(leftovers)} {'is' if len(leftovers) == 1 else 'are'} set, but"
    reads = f"the `name` in Pulumi.yaml is {keys.project}, so the program reads keys like {keys.project}:stage only"
    if in_file := [key for key in leftovers if key in keys.in_project_file]:
        # The file declares every setting, so a renamed key would be in it twice.
        settings = [name for key in in_file if (name := key.rpartition(":")[2]) in StackConfig.__struct_fields__]
        set_there = f"set the `default` of {_list(settings)} there instead, and " if settings else ""
        return f"{found} {reads}: in Pulumi.yaml, {set_there}remove {_list(in_file)}"
    moved, notes = [], []
    for key in leftovers:
        name, value = key.rpartition(":")[2], keys.values[key]
        if name == "stage" and (stage := deployed_stage()) is not None and stage != value.text:
            own = f"{keys.project}:stage"
            if keys.values.get(own, ConfigValue(None)).text != stage:
                moved.append(keys.command("set", "--plaintext", shlex.quote(own), shlex.quote(stage)))
            notes.append(
                f"this stack was deployed with the stage {stage}, and another stage would replace all resources and"
                f" delete their data, so the command keeps {stage}; deploy another stack for another stage"
            )
        elif name not in StackConfig.__struct_fields__:
            notes.append(f"{name} is no setting, so the command removes it")
        elif value.text == "":  # a null
            continue
        elif (other := _set_otherwise(keys, name, value)) is not None:
            notes.append(f"{keys.project}:{name} is set to {other} as well, and the command keeps that")
        else:
            moved.append(_set(keys, key, f"{keys.project}:{name}"))
    command = " && ".join([*moved, keys.command("rm-all" if leftovers[1:] else "rm", *map(shlex.quote, leftovers))])
    beside = f" ({'; '.join(notes)})" if notes else ""
    return f"{found} {reads}: run `{command}`, then this again{beside}{_of_no_provider(leftovers)}"


def _of_no_provider(leftovers: Iterable[str]) -> str:
    others = sorted({key.rpartition(":")[0] for key in leftovers} - {FIRST_NAME})
    if not others:
        return ""
    return f". If {_list(others)} is a provider of Pulumi, install its package into .venv instead"


def _set_otherwise(keys: Keys, name: str, value: ConfigValue) -> str | None:
    """Return the value of the project's own key if a person has set it to another one than `value`."""
    own = keys.own.get(name)
    if own is None or own.text == value.text:
        return None
    if own.secret or own.text is None:
        return "a secret"
    try:
        is_default = getattr(read({name: own.text}, keys.project), name) == getattr(StackConfig(), name)
    except ConfigError:
        is_default = False
    return None if is_default else own.text


def _secret(keys: Keys, names: list[str]) -> str:
    full = [f"{keys.project}:{name}" for name in names]
    are = "is set as a secret" if len(full) == 1 else "are set as secrets"
    command = " && ".join(_set(keys, key, key) for key in full)
    return (
        f"{_list(full)} {are}, expected plain text: no setting holds a secret, and the stack's state would show it"
        f" as plain text; run `{command}`, which sets it without --secret, then this again"
    )


def _set(keys: Keys, old: str, new: str) -> str:
    """Return the command that sets a key to the value of another one, as plain text.

    If the value is a secret, the command reads it, so that the error does not hold it.
    """
    value = keys.values[old]
    if value.secret or value.text is None:
        # If `config get` fails, the JSON is not valid and nothing is set. `config set` would set an empty value, and
        # the next command would remove the old key. `config set` would also turn an object into text.
        get = keys.command("get", shlex.quote(old))
        plain = f'{get} --json | sed \'s/"secret": true/"secret": false/\''
        return keys.command("set-all", "--json", f'"{{\\"{new}\\": $({plain})}}"')
    nested = _nested(value.text)
    if nested is None and value.text.isprintable() and "`" not in value.text:
        ends_flags = "-- " if value.text.startswith("-") else ""
        return keys.command("set", "--plaintext", shlex.quote(new), f"{ends_flags}{shlex.quote(value.text)}")
    content: dict[str, object] = {"value": value.text}
    if nested is not None:
        content["objectValue"] = nested
    return keys.command("set-all", "--json", shlex.quote(json.dumps({new: content}).replace("`", "\\u0060")))


def _nested(text: str) -> object:
    """Return a list or an object; None for all other texts."""
    try:
        found: object = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    return found if isinstance(found, dict | list) else None


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
