"""What a person may say about a stack, in Pulumi.yaml and Pulumi.{stack}.yaml, and what follows from it.

Pulumi itself looks neither into nested values nor at names that it does not know. Here everything is read strictly: a wrong key, a wrong value
or a combination that makes no sense is a ConfigError, before anything is registered. It names the key, what was found and what is allowed.

>>> read({"storage": "postgres-s3", "stage": "prod"}).servers
frozenset({'postgres'})
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from app.autocrud.errors import ConfigError
from app.dev import pulumi_cli
from app.settings import OWN_PATHS, PRESETS, JwtAuth, Pair, Server, Storage
from infra.choices import Broker, Cache, Domain, Postgres

KINDS = {kind: pair for kind, pair in PRESETS.items() if pair.survives_machine}
"""The kinds whose data survives the loss of a function's instance, as pairs."""
NETWORKED: frozenset[Server] = frozenset({"postgres", "cache", "broker"})
"""The servers that a function reaches through a private network only."""

CONNECTIONS = 2
"""That one instance of the function opens to the database at most: it serves one request at a time."""
SPARE_CONNECTIONS = 10
"""Kept for RDS itself, the bootstrap and a person with psql."""
LOG_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
"""That CloudWatch Logs can keep."""
TAG = re.compile(r"[\w .:/=+\-@]*")
"""The characters of a tag."""
MAX_TAGS = 48
"""Beside crudstack:stage and Name."""
API_WAITS_S = 30
"""How long an HTTP API waits for the function."""


class StackConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All keys. The first line below each says what is allowed, the rest what it means; errors and Pulumi.yaml quote them."""

    storage: Storage = "s3-sqlite"
    """s3-sqlite, postgres-s3, redis-postgres, cached-s3, mq-cached-s3, full, or {meta: s3-sqlite | postgres | redis-postgres, resource: s3 | cached-s3 | mq-cached-s3}

    How data is stored, and so what exists."""
    storage_overrides: dict[str, Storage] = {}
    """{MODEL: as storage}

    Models that are stored in another way. What exists is the union of what all of them need."""
    stage: Annotated[str, Meta(pattern=r"^(dev|prod|local|pr-(?=.{1,13}\Z)[a-z0-9]+(-[a-z0-9]+)*)\Z")] = "dev"
    """dev, prod, local, or pr-NAME with up to 13 of a-z and 0-9, and single - between them

    prod protects its data; all others are destroyed without a trace."""
    auth: Literal["token", "none"] | JwtAuth = "token"
    """token, none, or {mode: jwt, issuer: URL, audiences: [NAME]}

    Who is let in: whoever has the API token that is made, everybody, or whose JSON Web Token the HTTP API has verified."""
    token_generation: Annotated[int, Meta(ge=1)] = 1
    """1 or more

    Raise it to replace the API token by a new one, in prod by one at a time."""
    edge: Literal["http-api", "function-url"] = "http-api"
    """http-api, function-url

    What requests come in by. A function URL costs nothing, and has no JWT, domain, throttling or access log."""
    memory_mb: Annotated[int, Meta(ge=128, le=10240)] = 512
    """128 to 10240

    MB of memory of the function; its share of the CPU grows with it."""
    ephemeral_mb: Annotated[int, Meta(ge=512, le=10240)] = 512
    """512 to 10240

    MB of the function's /tmp, where local copies and caches lie."""
    timeout_s: Annotated[int, Meta(ge=1, le=900)] = 29
    """1 to 900, with edge http-api at most 30

    Seconds that the function may take."""
    concurrency: Annotated[int, Meta(ge=1, le=10000)] | None = None
    """1 to 10000, or null

    Instances of the function at most, taken from the account's. null: no limit of its own, but for a database without a proxy, which gets as
    many as its connections suffice for."""
    snap_start: bool = False
    """true, false; true with ephemeral_mb 512 only

    Start instances from a snapshot of an initialized one."""
    cors: list[Annotated[str, Meta(pattern=r"^(\*|https?://[^/\s*]+)\Z")]] = []
    """[https://HOST], or ["*"] outside of prod

    Origins whose pages may call the API."""
    domain: Domain | None = None
    """{name: api.example.org, zone: Z0123456789, base_path: /v1}, of which base_path is optional, or null

    A name of one's own for the HTTP API, the id of the Route 53 zone that it lies in, and a prefix of all paths. The certificate is made and renewed."""
    postgres: Postgres = Postgres()
    """{mode: instance | aurora, class: db.t4g.micro, multi_az: false, proxy: false, storage_gb: 20 to 65536, max_acu: 1 to 256}

    The database, where storage needs one."""
    cache: Cache = Cache()
    """{mode: serverless | nodes, node_type: cache.t4g.micro, max_gb: 1 to 5000}

    The Valkey, where storage needs one."""
    broker: Broker = Broker()
    """{version: "4.2", instance: mq.m7g.medium, mode: single | cluster}; version 4 needs an mq.m7g

    The RabbitMQ, where storage needs one."""
    log_days: int = 30
    """1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653

    Days that the logs of the functions and of the HTTP API are kept. Not those of RDS and RDS Proxy (/aws/rds/...) and Amazon MQ
    (/aws/amazonmq/...), which create their log groups themselves and keep them for ever: docs/deploy.md says how to change that."""
    alarm_email: Annotated[str, Meta(pattern=r"^[^@\s]+@[^@\s]+\Z")] | None = None
    """an address, or null

    Who is written to when an alarm goes off; AWS asks for a confirmation once."""
    budget_usd: Annotated[float, Meta(ge=0.01, le=1e9)] | None = None
    """0.01 to 1000000000, or null; needs alarm_email

    USD a month of the whole account, of which 80 % and what is forecast to exceed it are told."""
    tags: dict[str, str] = {}
    """{NAME: VALUE}, 48 at most

    Tags of every resource, beside crudstack:stage."""

    def __post_init__(self) -> None:
        for key, found, problem in self._problems():
            raise ConfigError(f"{key} is {_shown(found)}: {problem}")

    @property
    def servers(self) -> frozenset[Server]:
        """Return the servers that the storages of all models need beside the bucket."""
        return frozenset().union(*(pair.servers for pair in self.pairs))

    @property
    def needs_network(self) -> bool:
        """Return whether the function needs a private network, to reach one of its servers."""
        return not self.servers.isdisjoint(NETWORKED)

    @property
    def pairs(self) -> list[Pair]:
        """Return the pair of the default storage, then those of the overrides."""
        return [_pair(storage) for storage in (self.storage, *self.storage_overrides.values())]

    @property
    def extras(self) -> frozenset[str]:
        """Return the extras of pyproject.toml whose drivers the zip needs beside the driver for S3."""
        return frozenset().union(*(pair.extras for pair in self.pairs)) - {"s3"}

    @property
    def is_protected(self) -> bool:
        """Whether data outlives mistakes."""
        return self.stage == "prod"

    @property
    def reserved_concurrency(self) -> int | None:
        """Instances of the function at most, so that the database always has a connection for each."""
        if self.concurrency is None and "postgres" in self.servers and not self.postgres.proxy:
            return self._connected
        return self.concurrency

    @property
    def _connected(self) -> int:
        return (self.postgres.max_connections - SPARE_CONNECTIONS) // CONNECTIONS

    def _problems(self) -> Iterator[tuple[str, Any, str]]:
        """Key, what was found, and what it should be."""
        if "" in self.storage_overrides:
            yield "storage_overrides", self.storage_overrides, "a model has a name; expected {MODEL: as storage}"
        for model, storage in (("", self.storage), *self.storage_overrides.items()):
            pair = KINDS.get(storage) if isinstance(storage, str) else storage
            if pair is None or not pair.survives_machine:
                key = f"storage_overrides.{model}" if model else "storage"
                yield (
                    key,
                    storage,
                    f"on AWS it would not outlive a function or lose data; expected {allowed('storage')}",
                )
        if isinstance(self.auth, JwtAuth) and not (
            self.auth.issuer.startswith("https://") and all(self.auth.audiences)
        ):
            yield "auth", self.auth, "expected an issuer like https://login.example.org and audiences that have names"
        if isinstance(self.auth, JwtAuth) and self.edge != "http-api":
            yield (
                "auth",
                self.auth,
                "a function URL verifies no JSON Web Tokens; expected edge http-api, or auth token or none",
            )
        if self.domain is not None and self.edge != "http-api":
            yield "domain", self.domain, "a function URL has a name of its own; expected edge http-api, or domain null"
        if self.domain is not None and self.domain.base_path.split("/")[1:2] in ([name] for name in OWN_PATHS):
            yield (
                "domain.base_path",
                self.domain.base_path,
                f"the app has a path that begins like that; expected another first part than {', '.join(OWN_PATHS)}",
            )
        if self.timeout_s > API_WAITS_S and self.edge == "http-api":
            yield (
                "timeout_s",
                self.timeout_s,
                f"an HTTP API waits {API_WAITS_S} seconds; expected at most {API_WAITS_S}, or edge function-url",
            )
        if self.snap_start and self.ephemeral_mb != 512:
            yield (
                "snap_start",
                True,
                f"with ephemeral_mb {self.ephemeral_mb} there are no snapshots; expected ephemeral_mb 512, or false",
            )
        if self.is_protected and "*" in self.cors:
            yield (
                "cors",
                self.cors,
                "in prod not everybody's pages may call the API; expected a list of origins like https://example.org",
            )
        if "*" in self.cors and len(self.cors) > 1:
            yield "cors", self.cors, '"*" is all of them; expected it alone, or a list of origins'
        if self.log_days not in LOG_DAYS:
            yield "log_days", self.log_days, f"expected {allowed('log_days')}"
        if self.budget_usd is not None and self.alarm_email is None:
            yield "budget_usd", self.budget_usd, "nobody would be told; expected alarm_email to be set"
        yield from self._tag_problems()
        if "postgres" in self.servers:
            yield from self._database_problems()
        if "broker" in self.servers:
            yield from self._broker_problems()
        yield from self._environment_problems()

    def _environment_problems(self) -> Iterator[tuple[str, Any, str]]:
        """The values that AWS fills in count with the greatest length that they may have."""
        from infra import environment

        found = environment.size_at_worst(self)
        if found <= environment.LIMIT:
            return
        parts = environment.parts(self)
        largest, *others = (f"{key} takes {bytes:,}" for key, bytes in parts.items() if bytes > 100)
        problem = (
            f"the function's environment would have {found:,} bytes, of which {', '.join([largest, *others])}; expected at"
            f" most {environment.LIMIT:,}, which Lambda takes: fewer or shorter entries"
        )
        yield next(iter(parts)), "too long", problem

    def _tag_problems(self) -> Iterator[tuple[str, Any, str]]:
        """What AWS refuses, in the strictest of its services: the engine would fail after other changes."""
        seen: dict[str, str] = {}
        for name, value in self.tags.items():
            found = {name: value}
            if name.lower().startswith(("aws:", "crudstack:")):
                yield "tags", found, "names that begin with aws: or crudstack: are taken; expected others"
            if not 1 <= len(name) <= 128 or len(value) > 256:
                yield "tags", found, "expected names of 1 to 128 characters and values of at most 256"
            if not (TAG.fullmatch(name) and TAG.fullmatch(value)):
                yield "tags", found, "expected letters, digits, spaces and _ . : / = + - @"
            if (other := seen.setdefault(name.lower(), name)) != name:
                yield "tags", found, f"IAM takes it for {other}, because it ignores case; expected one of them"
        if len(self.tags) > MAX_TAGS:
            yield "tags", f"{len(self.tags)} names", f"expected at most {MAX_TAGS}: AWS takes 50, and two are used"

    def _database_problems(self) -> Iterator[tuple[str, Any, str]]:
        database = self.postgres
        if database.mode == "aurora" and database.class_ != Postgres().class_:
            yield (
                "postgres.class",
                database.class_,
                "Aurora Serverless has none; expected max_acu instead, or mode instance",
            )
        if not database.proxy and self.concurrency is not None and self.concurrency > self._connected:
            problem = (
                f"{CONNECTIONS} connections for each are more than the {database.max_connections} of this database, of which {SPARE_CONNECTIONS}"
                f" are kept; expected at most {self._connected}, a larger postgres.class or max_acu, or postgres.proxy"
            )
            yield "concurrency", self.concurrency, problem

    def _broker_problems(self) -> Iterator[tuple[str, Any, str]]:
        broker = self.broker
        if broker.version.startswith("4") and not broker.instance.startswith("mq.m7g."):
            yield (
                "broker.instance",
                broker.instance,
                f"RabbitMQ {broker.version} does not run on it; expected mq.m7g.medium or larger",
            )


def read(values: Mapping[str, Any], project: str | None = None) -> StackConfig:
    """Return the config that Pulumi has for the project, by key without namespace: nested values as JSON, others as text.

    Raises ConfigError with one sentence that names the key as it is written in a stack's file, what was found and what
    is allowed.

    project    the name of the project; None: the one in Pulumi.yaml
    """
    types = get_type_hints(StackConfig, include_extras=True)
    try:
        for key in values:
            if key not in types:
                raise ConfigError(f"{key} is no setting; there are {', '.join(types)}")
        return StackConfig(**{key: _decoded(key, value, types[key]) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{project or pulumi_cli.project()}:{error.detail}") from None


def _decoded(key: str, value: Any, type_: Any) -> Any:
    if value == "null":
        value = None
    elif value == "":
        # The CLI hands a null of a stack's YAML on as an empty text.
        if NoneType not in get_args(type_):
            raise ConfigError(f"{key} is empty or null: expected {allowed(key)}, or no such key at all")
        value = None
    nested = isinstance(value, str) and value.lstrip().startswith(("{", "["))
    try:
        # Not strict: Pulumi hands numbers and bools on as text.
        return msgspec.convert(json.loads(value) if nested else value, type_, strict=False)
    except ValueError as error:
        found = value if nested else _shown(value)
        raise ConfigError(f"{key} is {found}: expected {allowed(key)} ({error})") from None


def _pair(storage: Storage) -> Pair:
    return KINDS[storage] if isinstance(storage, str) else storage


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def allowed(key: str) -> str:
    """What may be said for a key."""
    return descriptions()[key].partition("\n")[0]


@cache
def descriptions() -> dict[str, str]:
    """The texts below the keys of StackConfig: a line that says what is allowed, one that says what it means."""
    module = ast.parse(Path(__file__).read_text())
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "StackConfig")
    return {
        ast.unparse(key.target): "\n".join(" ".join(part.split()) for part in str(text.value.value).split("\n\n"))
        for key, text in pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
