"""The names of the options of an import in its messages: those of the command, or the parameters of `POST /import`.

A message that names an option takes the name from `option_names()`, so it is right where it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class OptionNames(NamedTuple):
    """How a caller writes the options of an import.

    on_conflict  the text before the value, as in `--on-conflict skip`
    """

    model: str
    on_conflict: str
    max_bytes: str
    resume: str
    abort: str


COMMAND = OptionNames("--model", "--on-conflict ", "--max-bytes", "--resume", "--abort")
PARAMETERS = OptionNames("model=", "on_conflict=", "max_bytes=", "resume=true", "abort=true")
_names: ContextVar[OptionNames] = ContextVar("crudstack.option_names", default=COMMAND)


def option_names() -> OptionNames:
    """Return the names of the options for the caller of the import that is running."""
    return _names.get()


@contextmanager
def options_named(names: OptionNames) -> Iterator[None]:
    """Use these names in the messages of an import, also in the tasks and threads that it starts."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)
