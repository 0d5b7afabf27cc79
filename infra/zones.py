"""The availability zones of the two subnets. AWS is asked for them before anything is registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi_aws as aws

from app.autocrud.errors import ConfigError

ZONES = 2
"""RDS and Lambda need subnets in two zones."""
INCOMPLETE_ZONES = ["use1-az3", "usw1-az2", "cac1-az3", "apne1-az3"]
"""The ids of availability zones that lack Lambda, RDS Proxy or Amazon MQ."""
INCOMPLETE = "short of Lambda, RDS Proxy or Amazon MQ"


def subnet_zones(name: str, state: Any) -> list[str | None]:
    """Return the zone for each subnet. Blocks until AWS answers.

    A subnet that exists stays in its zone, because Pulumi ignores its new zone. So it is no error if a zone is missing
    later. For a new subnet without a zone, AWS would choose one, perhaps the same for both subnets. So ConfigError is
    raised if there are too few zones for new subnets.

    name     the prefix of the names of the stack's resources
    state    the exported state of the stack; None if there is none
    """
    found = _ask(
        state="available",
        filters=[{"name": "opt-in-status", "values": ["opt-in-not-required"]}],
        exclude_zone_ids=INCOMPLETE_ZONES,
    )
    names = list(found.names)
    wanted = {f"{name}-private-{index}" for index in range(ZONES)}
    if len(names) < ZONES and not wanted <= _subnets(state):
        raise ConfigError(_too_few(found.id, names))
    return [names[index] if index < len(names) else None for index in range(ZONES)]


def _subnets(state: Any) -> set[str]:
    """Return the names of the subnets that a stack has."""
    resources = ((state or {}).get("deployment") or {}).get("resources") or []
    subnets = (each for each in resources if each["type"] == "aws:ec2/subnet:Subnet" and not each.get("delete"))
    return {each["urn"].rpartition("::")[2] for each in subnets}


def _ask(**arguments: Any) -> aws.GetAvailabilityZonesResult:
    """Ask AWS for zones. Raises ConfigError if the provider cannot."""
    try:
        return aws.get_availability_zones(**arguments)
    except Exception as error:  # the SDK raises plain exceptions for errors of a provider
        raise ConfigError(f"AWS does not tell the availability zones: {' '.join(str(error).split())}") from None


def _too_few(region: str, names: Sequence[str]) -> str:
    every = _ask(all_availability_zones=True, filters=[{"name": "zone-type", "values": ["availability-zone"]}])
    left_out = [
        f"{name} ({INCOMPLETE if id in INCOMPLETE_ZONES else 'not open to this account'})"
        for name, id in zip(every.names, every.zone_ids, strict=True)
        if name not in names
    ]
    shown = f"{len(names)} usable availability zone{'' if len(names) == 1 else 's'}"
    return (
        f"the region {region} shows {shown}{f' ({names[0]})' if names else ''}, expected {ZONES} for the subnets of a"
        f" database, cache or broker; left out: {', '.join(left_out) or 'none'}. Set another region by `pulumi config"
        " set aws:region NAME`, or a storage that needs no network, such as s3-sqlite or cached-s3"
    )
