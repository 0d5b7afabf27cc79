"""The Pulumi program: read the config, register what it asks for, export what the app has to know."""

import sys
from pathlib import Path
from typing import NoReturn

import pulumi

# Pulumi runs this directory as a script, so the packages `app` and `infra` are not on the path by themselves. First, so
# that another checkout that is installed here does not come before this one.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHOWN = 32
"""The exit code that tells Pulumi's language host that the error was shown: with any other one it adds a line of its own."""


def end(message: str) -> NoReturn:
    """Show one error and end the program. The message is sent before this returns, not by a task in the background."""
    pulumi.log.error(message)
    sys.exit(SHOWN)


try:
    from app.autocrud.errors import ConfigError
    from infra.config import read
    from infra.config_keys import check_keys, of_program
    from infra.protected import check, deployed_stage
    from infra.stack import build
except ImportError as error:
    end(f"{error.name or error} cannot be imported by {sys.executable}: run `make setup-infra`, then this again")

try:
    keys = of_program(ROOT)
    check_keys(keys, lambda: deployed_stage(ROOT))
    config = read({name: value.text for name, value in keys.own.items()}, keys.project)
    state = check(config, ROOT)
    for name, value in build(config, state=state).items():
        pulumi.export(name, value)
except ConfigError as error:
    end(error.detail)
