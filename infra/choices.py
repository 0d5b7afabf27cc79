"""What may be chosen for a database, a cache, a broker and a domain: the nested values of the config."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""Of a host name, by RFC 1123: at most 63 letters, digits and hyphens. The name as a whole is limited where it is used."""
TOP_LEVEL = r"([a-z]{1,63}|xn--[a-z0-9]([a-z0-9-]{0,57}[a-z0-9])?)"
"""The last label: letters, or another script in punycode, such as xn--p1ai."""


class Domain(Struct, frozen=True, forbid_unknown_fields=True):
    """A name of one's own for the API: `zone` is the id of the Route 53 hosted zone that the name lies in, `base_path` the
    prefix of all paths under that name."""

    name: Annotated[str, Meta(pattern=rf"^({LABEL}\.)+{TOP_LEVEL}\Z", max_length=64)]
    """In lower case, other scripts in punycode (xn--...). At most 64 characters: AWS makes no certificate for a longer one."""
    zone: Annotated[str, Meta(pattern=r"^Z[A-Z0-9]+\Z")]
    base_path: Annotated[str, Meta(pattern=r"^(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._-]+)*\Z", max_length=300)] = ""
    """Like /v1; empty for none. No model may have the name of its first part."""


class Postgres(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """RDS for PostgreSQL, or Aurora Serverless v2, which has no class and no storage to choose and grows up to `max_acu` (2 GiB each)."""

    mode: Literal["instance", "aurora"] = "instance"
    class_: Annotated[
        str,
        Meta(pattern=r"^db\.((t3|t4g)\.(micro|small|medium|large|2?xlarge)|[mr]\d\w*\.(large|([1-9]\d*)?xlarge))\Z"),
    ] = field(name="class", default="db.t4g.micro")
    multi_az: bool = False
    """A second copy in another availability zone that takes over; twice the price."""
    proxy: bool = False
    """RDS Proxy: any number of the function's instances share a few connections of the database, each for one transaction.
    So it needs no reservation; without it, the function's instances are limited to those that the database has connections for."""
    storage_gb: Annotated[int, Meta(ge=20, le=65536)] = 20
    """It can only grow: RDS refuses a smaller value than the one before."""
    max_acu: Annotated[float, Meta(ge=1, le=256, multiple_of=0.5)] = 4

    @property
    def max_connections(self) -> int:
        """What the database's default, LEAST(memory / 9531392, 5000), comes to with the memory that RDS leaves it: 80 a GiB."""
        return min(5000 if self.mode == "instance" else 2000, int(80 * self._gib()))

    def _gib(self) -> float:
        if self.mode == "aurora":
            return 2 * self.max_acu
        _, family, size = self.class_.split(".")
        small = {"micro": 1, "small": 2, "medium": 4, "large": 8, "xlarge": 16}
        gib = small[size] if size in small else 16 * int(size.removesuffix("xlarge"))
        return gib * (2 if family.startswith("r") else 1)


class Cache(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ElastiCache for Valkey: serverless, which holds up to `max_gb`, or nodes of `node_type`."""

    mode: Literal["serverless", "nodes"] = "serverless"
    node_type: Annotated[str, Meta(pattern=r"^cache\.[a-z0-9]+\.[a-z0-9]+\Z")] = "cache.t4g.micro"
    max_gb: Annotated[int, Meta(ge=1, le=5000)] = 1


class Broker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Amazon MQ for RabbitMQ; version 4 runs on mq.m7g instances only, and a cluster is three of them."""

    version: Annotated[str, Meta(pattern=r"^(3\.13|4\.2)\Z")] = "4.2"
    instance: Annotated[
        str, Meta(pattern=r"^mq\.(m5\.(large|[24]?xlarge)|m7g\.(medium|large|(2|4|8|12|16)?xlarge))\Z")
    ] = "mq.m7g.medium"
    """AWS offers mq.m7g.medium for evaluation. In prod take mq.m7g.large or larger."""
    mode: Literal["single", "cluster"] = "single"
