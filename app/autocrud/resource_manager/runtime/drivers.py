"""Optional packages, which only some stores need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ...errors import ConfigError


@contextlib.contextmanager
def driver(*extras: str) -> Iterator[None]:
    """Raise ConfigError that names the extras to install, if the import of an optional package fails.

    The import is the body of the `with` statement.
    """
    try:
        yield
    except ImportError as error:
        package, names = str(error.name).partition(".")[0], ",".join(extras)
        raise ConfigError(f"the package {package} is missing: install crudstack[{names}]") from None
