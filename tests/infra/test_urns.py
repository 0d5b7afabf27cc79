"""A stack that exists keeps its resources: no URN differs from those that an earlier commit registered.

The engine knows a resource by its URN, which is made of the type of its component, its own type and its logical name.
If one of them changes, the engine deletes the resource, with its data, and creates another one. So `deployed_urns.json`
is never written again; a URN that a later commit adds or removes on purpose is added or removed there by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.infra.recorder import Recording
from tests.infra.stacks import CONFIGS, recording

DEPLOYED: dict[str, str] = json.loads(Path(__file__).with_name("deployed_urns.json").read_text())
"""The names of the stacks that have the resource, by URN, separated by spaces. An earlier commit wrote them."""


def deployed(stack: str) -> set[str]:
    return {urn for urn, stacks in DEPLOYED.items() if stack in stacks.split()}


def registered(stack: Recording) -> list[str]:
    return sorted(resource.urn for resource in stack.resources)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stack_has_the_urns_that_it_was_deployed_with(name):
    assert registered(recording(name)) == sorted(deployed(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_urn_ends_with_the_type_and_the_name_of_its_resource(name):
    for resource in recording(name).resources:
        path, _, logical_name = resource.urn.rpartition("::")
        assert path.endswith((f"::{resource.type}", f"${resource.type}"))
        assert logical_name == resource.name


def test_the_list_has_no_other_stacks():
    assert {stack for stacks in DEPLOYED.values() for stack in stacks.split()} == CONFIGS.keys()
