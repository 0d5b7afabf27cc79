"""The `pulumi` command, as `crudstack` runs it. It must be on PATH; the working directory must be in the clone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..autocrud.errors import ConfigError
from ..settings import StackOutputs, TokenAuth, parse_outputs

GENERATION = "token_generation"
"""The key without its namespace, which is the name of the project."""


class ConfigValue(NamedTuple):
    """A value of a stack's config."""

    text: str | None
    """Nested values as JSON; None if pulumi does not show a secret."""
    secret: bool = False
    """Whether the value, or a value in it, was set with --secret."""


def project() -> str:
    """Return the name of the Pulumi project, which is the namespace of its config keys.

    Reads `name` from the Pulumi.yaml in this directory or in its nearest parent that has one, as the `pulumi` command
    does. Raises ConfigError if there is none.
    """
    import yaml

    here = Path.cwd()
    file = next((file for parent in (here, *here.parents) if (file := parent / "Pulumi.yaml").is_file()), None)
    if file is None:
        raise ConfigError(f"there is no Pulumi.yaml in {here} and its parents: run this in the directory of the clone")
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{file} has no name: expected a line like `name: crudstack`")
    return name


def outputs(stack: str | None) -> StackOutputs:
    """Return the outputs of a stack, or of the selected one (None). Raises ConfigError if it has none."""
    text = ask("stack", "output", "--json", stack=stack)
    if json.loads(text or "{}") == {}:
        raise ConfigError("the stack has no outputs: run `pulumi up` first")
    return parse_outputs(text, "`pulumi stack output`")


def token_sha256(stack: str | None) -> str | None:
    """Return the SHA-256 of a stack's API token, or None if the stack uses other authentication."""
    auth = outputs(stack).auth
    return auth.token_sha256 if isinstance(auth, TokenAuth) else None


def config(stack: str | None) -> dict[str, ConfigValue]:
    """Return the config of a stack by full key, with the defaults of Pulumi.yaml. Raises ConfigError on failure."""
    found: dict[str, dict[str, Any]] = json.loads(ask("config", "--json", stack=stack) or "{}")
    return {key: ConfigValue(value.get("value"), bool(value.get("secret"))) for key, value in found.items()}


def next_generation(stack: str | None) -> tuple[str, int]:
    """Raise `token_generation` in the config by one, so that the next `pulumi up` creates a new API token.

    Returns the key and its new value. Raises ConfigError before any change if the present value is not a plain number,
    or if a key of another project is set: the Pulumi program refuses such a config.
    """
    key, values = f"{project()}:{GENERATION}", config(stack)
    others = [other for other in values if other.rpartition(":")[2] == GENERATION and other != key]
    if others:
        raise ConfigError(
            f"{others[0]} is set, expected {key}, because the `name` in Pulumi.yaml is {project()}: run `pulumi"
            " preview`, which says how to move it, and then this again"
        )
    present = values.get(key, ConfigValue("1"))
    if present.secret:
        raise ConfigError(
            f"{key} is a secret, expected a plain number: set it again without --secret, and then run this"
        )
    try:
        number = int(present.text or "") + 1
    except ValueError:
        raise ConfigError(f"{key} is not a number: correct it in Pulumi.STACK.yaml") from None
    ask("config", "set", key, str(number), stack=stack)
    return key, number


def up(stack: str | None, *, yes: bool) -> None:
    """Run `pulumi up` in the user's terminal. Raises ConfigError if it failed or was declined."""
    if watch("up", *(["--yes"] if yes else []), stack=stack) != 0:
        raise ConfigError("`pulumi up` did not finish; run it again to continue with the new token")


def watch(*arguments: str, stack: str | None = None) -> int:
    """Run pulumi in the user's terminal and return its exit code.

    After Ctrl-C, waits until pulumi has ended the update in an orderly way, then raises KeyboardInterrupt. Python's
    default handler would kill pulumi after a quarter of a second and leave the stack locked.
    """
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    sys.stdout.flush()  # keeps the order of our output and pulumi's
    # A function and not SIG_IGN, because pulumi would inherit an ignored signal.
    before = signal.signal(signal.SIGINT, note)
    try:
        code = subprocess.run(_command(arguments, stack), check=False).returncode
    except FileNotFoundError:
        raise _missing() from None
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
    return code


def ask(*arguments: str, stack: str | None = None) -> str:
    """Run pulumi without a terminal and return its output. Raises ConfigError with pulumi's reason if it fails."""
    done = run(*arguments, stack=stack)
    if done.returncode != 0:
        raise ConfigError(f"`pulumi {' '.join(arguments)}` failed: {reason(done)}")
    return done.stdout


def run(*arguments: str, stack: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run pulumi without a terminal and return its result. Raises ConfigError if it is not on PATH."""
    command = _command([*arguments, "--non-interactive"], stack)
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _missing() from None


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line of pulumi's last error, which is not always the last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it did not say why"])[-1]


def _command(arguments: tuple[str, ...] | list[str], stack: str | None) -> list[str]:
    return ["pulumi", *arguments, *(["--stack", stack] if stack else [])]


def _missing() -> ConfigError:
    return ConfigError(
        "pulumi is not on PATH: install it; or, for outputs, run `pulumi stack output --json > outputs.json` where it"
        " is, and set CRUDSTACK_OUTPUTS=outputs.json"
    )
