"""The environment of commands, with the storage that their options select."""

from __future__ import annotations

import os

import msgspec

from ..settings import STACK_VARIABLES, parse_storage
from . import pulumi_cli
from .aws_account import stack_profile, use_profile


def environment(storage: str | None, stack: str | None) -> dict[str, str]:
    """Return the environment. The options --storage and --stack replace its settings of the storage."""
    variables = dict(os.environ)
    if storage is not None:
        parse_storage(storage, "--storage")  # so that an error names the option, not a variable
        variables["CRUDSTACK_STORAGE"] = storage
        variables.pop("CRUDSTACK_OUTPUTS", None)
    if stack is not None:
        for name in STACK_VARIABLES:
            variables.pop(name, None)
        variables["CRUDSTACK_OUTPUTS"] = msgspec.json.encode(pulumi_cli.outputs(stack)).decode()
        use_profile(stack_profile(pulumi_cli.config(stack)))
    return variables
