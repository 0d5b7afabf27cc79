"""The rules that every stack obeys, in each stage and with each storage. A rule is a function that yields its findings.

registry: the list that `@rule` adds the rules to
services: the rules for the resources of single services
whole_stack: the rules for all resources of a stack together
"""

from __future__ import annotations

from tests.infra.rules import services, whole_stack
from tests.infra.rules.registry import RULES

__all__ = ["RULES", "services", "whole_stack"]
