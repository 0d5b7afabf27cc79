"""Mistakes to plant in a recording, each a function that takes it and changes it."""

from __future__ import annotations

import copy
import json

from tests.infra.stacks import environment


def without(type):
    def plant(stack):
        stack.resources.remove(next(resource for resource in stack.resources if resource.type == type))

    return plant


def change(type, suffix="", **inputs):
    """Other arguments of one resource; `...` takes one away."""

    def plant(stack):
        resource = next(each for each in stack.all(type) if each.name.endswith(suffix))
        for name, value in inputs.items():
            if value is ...:
                del resource.inputs[name]
            else:
                resource.inputs[name] = value

    return plant


def nested(type, *path, to):
    def plant(stack):
        place = stack.all(type)[0].inputs
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return plant


def statement(number, suffix="-api", **changes):
    def plant(stack):
        role_policy = stack.one("aws:iam/rolePolicy:RolePolicy", suffix)
        document = json.loads(role_policy.inputs["policy"])
        document["Statement"][number] |= changes
        role_policy.inputs["policy"] = json.dumps(document)

    return plant


def another(type, name="planted", parent="bucket"):
    def plant(stack):
        other = copy.deepcopy(stack.resources[-1])
        other.type, other.name, other.inputs = type, name, {}
        other.parent = next(each.urn for each in stack.resources if each.name == parent)
        stack.resources.append(other)

    return plant


def on(type, suffix="", **attributes):
    def plant(stack):
        resource = next(each for each in stack.all(type) if each.name.endswith(suffix))
        for name, value in attributes.items():
            setattr(resource, name, value)

    return plant


def output(**values):
    return lambda stack: stack.outputs.update(values)


def told(**values):
    def plant(stack):
        variables = environment(stack.one("aws:lambda/function:Function", "-api"))
        variables["CRUDSTACK_OUTPUTS"] = json.dumps(json.loads(variables["CRUDSTACK_OUTPUTS"]) | values)

    return plant
