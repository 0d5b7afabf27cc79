"""A network needs two availability zones. The preview refuses a region or account with fewer."""

from __future__ import annotations

import pytest

from infra.config import StackConfig
from infra.zones import INCOMPLETE_ZONES
from tests.engine.test_life import assert_unchanged

NETWORK = StackConfig(storage="mq-cached-s3")
OPEN = {"euc1-az1": "eu-central-1c", "euc1-az2": "eu-central-1a", "euc1-az3": "eu-central-1b"}
EXCLUDED = {INCOMPLETE_ZONES[0]: "eu-central-1x"}


def of(number):
    return dict(list(OPEN.items())[:number])


@pytest.mark.parametrize(
    ("zones", "says"),
    [
        ({}, "shows 0 usable availability zones, expected 2 for the subnets"),
        (of(1), "shows 1 usable availability zone (eu-central-1c), expected 2"),
        (of(1) | EXCLUDED, "shows 1 usable availability zone (eu-central-1c), expected 2"),
    ],
    ids=["none", "one", "one-and-one-that-is-excluded"],
)
def test_too_few_zones_are_refused_with_one_sentence_before_any_resource_is_created(engine, zones, says):
    stack = engine.stack("test", NETWORK)
    engine.faults.set(zones=zones)
    for done in (stack.preview(), stack.up()):
        error = next(line for line in done.diagnostics if "usable" in line)
        assert f"the region eu-central-1 {says}" in error
        for name in {*OPEN.values()} - {*zones.values()}:
            assert f"{name} (not open to this account)" in error
        if EXCLUDED.items() <= zones.items():
            assert "eu-central-1x (short of Lambda, RDS Proxy or Amazon MQ)" in error
        assert "`pulumi config set aws:region NAME`" in error
    assert engine.account.all() == {}
    # A stack without a network needs no zones.
    stack.config = StackConfig()
    assert stack.preview().error == ""


@pytest.mark.parametrize("number", [2, 3])
def test_the_subnets_are_in_the_first_two_zones(engine, number):
    stack = engine.stack("test", NETWORK)
    engine.faults.set(zones=of(number) | EXCLUDED)
    assert stack.up().error == ""
    subnets = engine.account.all("aws:ec2/subnet:Subnet").values()
    assert sorted(each["availabilityZone"] for each in subnets) == ["eu-central-1a", "eu-central-1c"]
    # If zones disappear later, nothing changes: the subnets stay.
    for zones in (of(1), {}):
        engine.faults.set(zones=zones)
        assert_unchanged(stack.up())
    assert stack.destroy().error == ""


def test_a_network_that_lacks_a_subnet_needs_its_zone(engine):
    stack = engine.stack("test", NETWORK)
    engine.faults.set(create="Subnet::crudstack-dev-private-1")
    assert stack.up().error != ""
    engine.faults.set(zones=of(1))
    done = stack.up()
    assert "shows 1 usable availability zone" in "".join([done.error, *done.diagnostics])
    engine.faults.clear()
    assert stack.up().error == ""
