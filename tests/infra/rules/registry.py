"""The list that `@rule` adds the rules to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from infra.config import StackConfig
from tests.infra.recorder import Recording

Rule = Callable[[Recording, StackConfig], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function
