"""Packages that only some stores need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ...errors import ConfigError


@contextlib.contextmanager
def driver(*extras: str) -> Iterator[None]:
    """Around the import of a store or its driver, which these extras bring. ConfigError where it is missing."""
    try:
        yield
    except ImportError as error:
        package, names = str(error.name).partition(".")[0], ",".join(extras)
        raise ConfigError(f"the package {package} is missing: install crudstack[{names}]") from None
