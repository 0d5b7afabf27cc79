"""The nested values of a stack's config: database, cache, broker and domain."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""A label of a host name by RFC 1123: at most 63 letters, digits and hyphens. `Domain.name` limits the whole name."""
TOP_LEVEL = r"([a-z]{1,63}|xn--[a-z0-9]([a-z0-9-]{0,57}[a-z0-9])?)"
"""The last label: letters, or another script in punycode, such as xn--p1ai."""


class Domain(Struct, frozen=True, forbid_unknown_fields=True):
    """A custom domain name of the API.

    `zone` is the id of the Route 53 hosted zone of the name, `base_path` the prefix of all paths under it.
    """

    name: Annotated[str, Meta(pattern=rf"^({LABEL}\.)+{TOP_LEVEL}\Z", max_length=64)]
    """In lower case, other scripts in punycode (xn--...). At most 64 characters, because AWS issues no certificate for
    a longer name."""
    zone: Annotated[str, Meta(pattern=r"^Z[A-Z0-9]+\Z")]
    base_path: Annotated[str, Meta(pattern=r"^(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._-]+)*\Z", max_length=300)] = ""
    """Like /v1; empty for none. No model may have the name of its first part."""


class Postgres(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """RDS for PostgreSQL, or Aurora Serverless v2.

    Aurora has no `class` and no `storage_gb`. It grows up to `max_acu`, with 2 GiB of memory for each ACU.
    """

    mode: Literal["instance", "aurora"] = "instance"
    class_: Annotated[
        str,
        Meta(pattern=r"^db\.((t3|t4g)\.(micro|small|medium|large|2?xlarge)|[mr]\d\w*\.(large|([1-9]\d*)?xlarge))\Z"),
    ] = field(name="class", default="db.t4g.micro")
    multi_az: bool = False
    """A second copy in another availability zone, which takes over if the first one fails. It doubles the price."""
    proxy: bool = False
    """RDS Proxy: all instances of the function share a few connections of the database, each for one transaction at a
    time. So the function needs no reservation. Without a proxy, the connections of the database limit the number of
    instances."""
    storage_gb: Annotated[int, Meta(ge=20, le=65536)] = 20
    """It can only be raised: RDS refuses a smaller value than the one before."""
    max_acu: Annotated[float, Meta(ge=1, le=256, multiple_of=0.5)] = 4

    @property
    def max_connections(self) -> int:
        """Return the number of connections that the database allows by default.

        The default is LEAST(memory / 9531392, 5000), which is 80 for each GiB with the memory that RDS leaves it.
        """
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
