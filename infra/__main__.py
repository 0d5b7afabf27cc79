"""The Pulumi program: it reads the config, registers the resources, and exports the outputs that the app needs."""

import sys
from pathlib import Path
from typing import NoReturn

import pulumi

# Pulumi runs this directory as a script, so the packages `app` and `infra` are not on the path. ROOT comes first,
# because another checkout may be installed here.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHOWN = 32
"""The exit code after which Pulumi's language host adds no line of its own, because the error was shown."""


def end(message: str) -> NoReturn:
    """Show one error and end the program. Blocks until the message was sent."""
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
