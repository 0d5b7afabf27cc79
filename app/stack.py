"""What `pulumi` tells of a stack, for commands that a person runs. It must be on PATH, and run where Pulumi.yaml is."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from .autocrud.errors import ConfigError
from .settings import StackOutputs, parse_outputs

GENERATION = "crudstack:token_generation"


def outputs(stack: str | None) -> StackOutputs:
    """The outputs of a stack (None: the selected one), decoded as the app does. ConfigError."""
    text = _pulumi("stack", "output", "--json", stack=stack)
    if json.loads(text or "{}") == {}:
        raise ConfigError("the stack has no outputs: run `pulumi up` first")
    return parse_outputs(text, "`pulumi stack output`")


def next_generation(stack: str | None) -> int:
    """Set the config to the next generation of the API token, which the next `pulumi up` makes. ConfigError."""
    config: dict[str, Any] = json.loads(_pulumi("config", "--json", stack=stack) or "{}")
    try:
        number = int(config.get(GENERATION, {}).get("value", 1)) + 1
    except ValueError:
        raise ConfigError(f"{GENERATION} is no number; mend Pulumi.STACK.yaml") from None
    _pulumi("config", "set", GENERATION, str(number), stack=stack)
    return number


def up(stack: str | None, *, yes: bool) -> None:
    """`pulumi up`, which the person watches and confirms. ConfigError if it failed or was declined."""
    command = _command(["up", *(["--yes"] if yes else [])], stack)
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise _missing() from None
    if code != 0:
        raise ConfigError("`pulumi up` did not finish; it goes on with the new token when you run it again")


def _pulumi(*arguments: str, stack: str | None) -> str:
    try:
        done = subprocess.run(
            _command([*arguments, "--non-interactive"], stack),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise _missing() from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it did not say why"]
        raise ConfigError(f"`pulumi {' '.join(arguments)}` failed: {said[-1].strip()}")
    return done.stdout


def _command(arguments: list[str], stack: str | None) -> list[str]:
    return ["pulumi", *arguments, *(["--stack", stack] if stack else [])]


def _missing() -> ConfigError:
    return ConfigError(
        "pulumi is not on PATH: install it; or, for outputs, run `pulumi stack output --json > outputs.json` where it is, and set"
        " CRUDSTACK_OUTPUTS=outputs.json"
    )
