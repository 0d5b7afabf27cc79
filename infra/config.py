"""The config of a stack: what its user sets in Pulumi.yaml and Pulumi.{stack}.yaml, and values derived from it.

Pulumi does not check nested values and unknown keys. Here everything is read strictly: a wrong key, a wrong value or a
combination that makes no sense is a ConfigError before anything is registered. The error names the key, the
value that was found, and the values that are allowed.

>>> read({"storage": "postgres-s3", "stage": "prod"}).servers
frozenset({'postgres'})
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from app.autocrud.errors import ConfigError
from app.dev import pulumi_cli
from app.settings import OWN_PATHS, PRESETS, JwtAuth, Pair, Server, Storage
from infra import environment
from infra.choices import Broker, Cache, Domain, Postgres

KINDS = {kind: pair for kind, pair in PRESETS.items() if pair.survives_machine}
"""The kinds whose data survives the loss of a function's instance, as pairs."""
NETWORKED: frozenset[Server] = frozenset({"postgres", "cache", "broker"})
"""The servers that a function reaches through a private network only."""

CONNECTIONS = 2
"""Connections that one instance of the function opens to the database at most. It serves one request at a time."""
SPARE_CONNECTIONS = 10
"""Connections that are left for RDS itself, the functions that create the app's user, and a person with psql."""
LOG_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
"""The retention periods that CloudWatch Logs offers, in days."""
TAG = re.compile(r"[\w .:/=+\-@]*")
"""The characters of a tag."""
MAX_TAGS = 48
"""Tags that a user may set: AWS allows 50 for each resource, and crudstack:stage and Name are two of them."""
API_WAITS_S = 30
"""Seconds that an HTTP API waits for the function."""


class StackConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All keys. Below each, the first paragraph lists the allowed values, the second says what the key means.

    Errors, Pulumi.yaml and docs/config.md quote these texts.
    """

    storage: Storage = "s3-sqlite"
    """s3-sqlite, postgres-s3, redis-postgres, cached-s3, mq-cached-s3, full,
    or {meta: s3-sqlite | postgres | redis-postgres, resource: s3 | cached-s3 | mq-cached-s3}

    How data is stored. The stack has the resources that this storage needs."""
    storage_overrides: dict[str, Storage] = {}
    """{MODEL: as storage}

    Storages of single models that differ from `storage`. The stack has the resources that any of its models needs."""
    stage: Annotated[str, Meta(pattern=r"^(dev|prod|local|pr-(?=.{1,13}\Z)[a-z0-9]+(-[a-z0-9]+)*)\Z")] = "dev"
    """dev, prod, local, or pr-NAME with up to 13 of a-z and 0-9, and single - between them

    The stage prod protects its data. `pulumi destroy` of any other stage deletes all of its data."""
    auth: Literal["token", "none"] | JwtAuth = "token"
    """token, none, or {mode: jwt, issuer: URL, audiences: [NAME]}

    Which requests are accepted: requests with the API token that the stack creates (token), all requests (none), or
    requests whose JSON Web Token the HTTP API has verified (jwt)."""
    token_generation: Annotated[int, Meta(ge=1)] = 1
    """1 or more

    Raise it to replace the API token by a new one. In prod raise it by one at a time."""
    edge: Literal["http-api", "function-url"] = "http-api"
    """http-api, function-url

    The entry point of requests. A function URL costs nothing, and has no JWT, domain, throttling or access log."""
    memory_mb: Annotated[int, Meta(ge=128, le=10240)] = 512
    """128 to 10240

    Memory of the function in MB. Its share of the CPU grows with it."""
    ephemeral_mb: Annotated[int, Meta(ge=512, le=10240)] = 512
    """512 to 10240

    Size of the function's /tmp in MB, which holds local copies and caches."""
    timeout_s: Annotated[int, Meta(ge=1, le=900)] = 29
    """1 to 900, with edge http-api at most 30

    Seconds after which Lambda ends a request."""
    concurrency: Annotated[int, Meta(ge=1, le=10000)] | None = None
    """1 to 10000, or null

    The largest number of instances of the function, reserved from the account's quota. With null there is no limit,
    except for a database without a proxy, whose connections limit the number of instances."""
    snap_start: bool = False
    """true, false; true with ephemeral_mb 512 only

    Start instances from a snapshot of an initialized one."""
    cors: list[Annotated[str, Meta(pattern=r"^(\*|https?://[^/\s*]+)\Z")]] = []
    """[https://HOST], or ["*"] outside of prod

    Origins whose pages may call the API, and send files to the bucket and read them from it."""
    domain: Domain | None = None
    """{name: api.example.org, zone: Z0123456789, base_path: /v1}, of which base_path is optional, or null

    A custom domain name of the HTTP API, the id of its hosted zone of Route 53, and a prefix of all paths. The
    certificate is created and renewed automatically."""
    postgres: Postgres = Postgres()
    """{mode: instance | aurora, class: db.t4g.micro, multi_az: false, proxy: false, storage_gb: 20 to 65536,
    max_acu: 1 to 256}

    The database, if a storage needs one."""
    cache: Cache = Cache()
    """{mode: serverless | nodes, node_type: cache.t4g.micro, max_gb: 1 to 5000}

    The Valkey, if a storage needs one."""
    broker: Broker = Broker()
    """{version: "4.2", instance: mq.m7g.medium, mode: single | cluster}; version 4 needs an mq.m7g

    The RabbitMQ, if a storage needs one."""
    log_days: int = 30
    """1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653

    Days that the logs of the functions and of the HTTP API are kept. RDS and RDS Proxy (/aws/rds/...) and Amazon MQ
    (/aws/amazonmq/...) create their log groups themselves and keep them for ever: docs/deploy.md says how to change
    that."""
    alarm_email: Annotated[str, Meta(pattern=r"^[^@\s]+@[^@\s]+\Z")] | None = None
    """an address, or null

    The address that gets a message if an alarm goes off. AWS asks it for a confirmation once."""
    budget_usd: Annotated[float, Meta(ge=0.01, le=1e9)] | None = None
    """0.01 to 1000000000, or null; needs alarm_email

    A budget of the whole account in USD a month. The address gets a message at 80 % of it, and if the forecast exceeds
    it."""
    tags: dict[str, str] = {}
    """{NAME: VALUE}, 48 at most

    Tags of every resource, in addition to crudstack:stage."""

    def __post_init__(self) -> None:
        for problem in problems(self):
            raise ConfigError(f"{problem.key} is {_shown(problem.found)}: {problem.text}")

    @property
    def pairs(self) -> list[Pair]:
        """Return the pair of `storage`, then those of the overrides."""
        return [_pair(storage) for storage in (self.storage, *self.storage_overrides.values())]

    @property
    def servers(self) -> frozenset[Server]:
        """Return the servers that the storages of all models need beside the bucket."""
        return frozenset().union(*(pair.servers for pair in self.pairs))

    @property
    def needs_network(self) -> bool:
        """Return whether the function needs a private network, to reach one of its servers."""
        return not self.servers.isdisjoint(NETWORKED)

    @property
    def extras(self) -> frozenset[str]:
        """Return the extras of pyproject.toml whose drivers the zip needs beside the driver for S3."""
        return frozenset().union(*(pair.extras for pair in self.pairs)) - {"s3"}

    @property
    def is_protected(self) -> bool:
        """Return whether Pulumi and AWS protect the data from being deleted by mistake."""
        return self.stage == "prod"

    @property
    def max_instances(self) -> int:
        """Return the number of the function's instances for which the database has enough connections."""
        return (self.postgres.max_connections - SPARE_CONNECTIONS) // CONNECTIONS

    @property
    def reserved_concurrency(self) -> int | None:
        """Return the largest number of the function's instances; None if the account's quota alone limits it."""
        if self.concurrency is None and "postgres" in self.servers and not self.postgres.proxy:
            return self.max_instances
        return self.concurrency

    def outputs(self, token_sha256: Any) -> dict[str, Any]:
        """Return the outputs of the stack that repeat its config.

        token_sha256    the SHA-256 of the API token, which may be an Output; it is not used unless `auth` is token
        """
        auth: Any = {"mode": "none"}
        if isinstance(self.auth, JwtAuth):
            auth = msgspec.to_builtins(self.auth)
        elif self.auth == "token":
            auth = {"mode": "token", "token_sha256": token_sha256}
        storage = msgspec.to_builtins({"storage": self.storage, "storage_overrides": self.storage_overrides})
        domain = self.domain
        base_path = {"base_path": domain.base_path} if domain is not None and domain.base_path else {}
        return {"version": 1, **storage, "stage": self.stage, "cors": self.cors, **base_path, "auth": auth}

    def largest_outputs(self) -> dict[str, Any]:
        """Return the outputs that the function gets, with the longest values that AWS may fill in."""
        return {**self.outputs("f" * 64), **environment.largest_values(self.stage, self.servers)}


class Problem(NamedTuple):
    """A value that is refused."""

    key: str
    found: Any
    text: str
    """The reason for the refusal, and the expected value."""


class Rule(NamedTuple):
    """A combination of values that is refused."""

    key: str
    """The key whose value the error shows, such as `domain.base_path`."""
    is_broken: Callable[[StackConfig], bool]
    text: Callable[[StackConfig], str]
    """The reason for the refusal, and the expected value."""


def _has_wrong_jwt(config: StackConfig) -> bool:
    auth = config.auth
    return isinstance(auth, JwtAuth) and not (auth.issuer.startswith("https://") and all(auth.audiences))


def _has_taken_base_path(config: StackConfig) -> bool:
    return config.domain is not None and config.domain.base_path.split("/")[1:2] in ([name] for name in OWN_PATHS)


def _has_too_many_instances(config: StackConfig) -> bool:
    is_limited = "postgres" in config.servers and not config.postgres.proxy
    return is_limited and config.concurrency is not None and config.concurrency > config.max_instances


def _has_wrong_broker(config: StackConfig) -> bool:
    broker = config.broker
    is_4 = broker.version.startswith("4")
    return "broker" in config.servers and is_4 and not broker.instance.startswith("mq.m7g.")


RULES = (
    Rule(
        "auth",
        _has_wrong_jwt,
        lambda _: "expected an issuer like https://login.example.org and audiences that have names",
    ),
    Rule(
        "auth",
        lambda config: isinstance(config.auth, JwtAuth) and config.edge != "http-api",
        lambda _: "a function URL verifies no JSON Web Tokens; expected edge http-api, or auth token or none",
    ),
    Rule(
        "domain",
        lambda config: config.domain is not None and config.edge != "http-api",
        lambda _: "a function URL has a name of its own; expected edge http-api, or domain null",
    ),
    Rule(
        "domain.base_path",
        _has_taken_base_path,
        lambda _: f"the app has a path that begins like that; expected another first part than {', '.join(OWN_PATHS)}",
    ),
    Rule(
        "timeout_s",
        lambda config: config.timeout_s > API_WAITS_S and config.edge == "http-api",
        lambda _: f"an HTTP API waits {API_WAITS_S} seconds; expected at most {API_WAITS_S}, or edge function-url",
    ),
    Rule(
        "snap_start",
        lambda config: config.snap_start and config.ephemeral_mb != 512,
        lambda config: (
            f"with ephemeral_mb {config.ephemeral_mb} there are no snapshots; expected ephemeral_mb 512, or false"
        ),
    ),
    Rule(
        "cors",
        lambda config: config.is_protected and "*" in config.cors,
        lambda _: (
            "in prod only pages of named origins may call the API; expected a list of origins like https://example.org"
        ),
    ),
    Rule(
        "cors",
        lambda config: "*" in config.cors and len(config.cors) > 1,
        lambda _: '"*" is all of them; expected it alone, or a list of origins',
    ),
    Rule(
        "log_days",
        lambda config: config.log_days not in LOG_DAYS,
        lambda _: f"expected {allowed('log_days')}",
    ),
    Rule(
        "budget_usd",
        lambda config: config.budget_usd is not None and config.alarm_email is None,
        lambda _: "no address would get its messages; expected alarm_email to be set",
    ),
    Rule(
        "postgres.class",
        lambda config: (
            "postgres" in config.servers
            and config.postgres.mode == "aurora"
            and config.postgres.class_ != Postgres().class_
        ),
        lambda _: "Aurora Serverless has none; expected max_acu instead, or mode instance",
    ),
    Rule(
        "concurrency",
        _has_too_many_instances,
        lambda config: (
            f"{CONNECTIONS} connections for each are more than the {config.postgres.max_connections} of this database,"
            f" of which {SPARE_CONNECTIONS} are kept; expected at most {config.max_instances}, a larger postgres.class"
            " or max_acu, or postgres.proxy"
        ),
    ),
    Rule(
        "broker.instance",
        _has_wrong_broker,
        lambda config: f"RabbitMQ {config.broker.version} does not run on it; expected mq.m7g.medium or larger",
    ),
)
"""The combinations that are refused. Rules about each entry of a setting are functions below."""


def problems(config: StackConfig) -> Iterator[Problem]:
    """Yield the values that are refused although each has the right type, and why."""
    yield from _storage_problems(config)
    for rule in RULES:
        if rule.is_broken(config):
            yield Problem(rule.key, _value(config, rule.key), rule.text(config))
    yield from _tag_problems(config)
    yield from _environment_problems(config)


def _value(config: StackConfig, key: str) -> Any:
    """Return the value at a key, which may have a part for a nested value."""
    values = msgspec.to_builtins(config)
    for part in key.split("."):
        values = values[part]
    return values


def _storage_problems(config: StackConfig) -> Iterator[Problem]:
    if "" in config.storage_overrides:
        text = "the name of a model is missing; expected {MODEL: as storage}"
        yield Problem("storage_overrides", config.storage_overrides, text)
    storages = {"storage": config.storage}
    storages |= {f"storage_overrides.{model}": storage for model, storage in config.storage_overrides.items()}
    for key, storage in storages.items():
        pair = KINDS.get(storage) if isinstance(storage, str) else storage
        if pair is None or not pair.survives_machine:
            text = f"on AWS it would lose data with the function's instance; expected {allowed('storage')}"
            yield Problem(key, storage, text)


def _tag_problems(config: StackConfig) -> Iterator[Problem]:
    """Yield the tags that any service of AWS would refuse: the engine would fail after other changes."""
    seen: dict[str, str] = {}
    for name, value in config.tags.items():
        found = {name: value}
        if name.lower().startswith(("aws:", "crudstack:")):
            yield Problem("tags", found, "names that begin with aws: or crudstack: are taken; expected others")
        if not 1 <= len(name) <= 128 or len(value) > 256:
            yield Problem("tags", found, "expected names of 1 to 128 characters and values of at most 256")
        if not (TAG.fullmatch(name) and TAG.fullmatch(value)):
            yield Problem("tags", found, "expected letters, digits, spaces and _ . : / = + - @")
        if (other := seen.setdefault(name.lower(), name)) != name:
            yield Problem("tags", found, f"IAM takes it for {other}, because it ignores case; expected one of them")
    if len(config.tags) > MAX_TAGS:
        text = f"expected at most {MAX_TAGS}: AWS takes 50, and two are used"
        yield Problem("tags", f"{len(config.tags)} names", text)


def _environment_problems(config: StackConfig) -> Iterator[Problem]:
    """Refuse settings that do not fit into the function's environment with the longest values that AWS may fill in."""
    found = environment.size_of_outputs(config.largest_outputs())
    if found <= environment.LIMIT:
        return
    sizes = environment.sizes(_settings_without_limit(config))
    largest, *others = (f"{key} takes {bytes:,}" for key, bytes in sizes.items() if bytes > 100)
    text = (
        f"the function's environment would have {found:,} bytes, of which {', '.join([largest, *others])}; expected at"
        f" most {environment.LIMIT:,}, which Lambda takes: fewer or shorter entries"
    )
    yield Problem(next(iter(sizes)), "too long", text)


def _settings_without_limit(config: StackConfig) -> dict[str, Any]:
    """Return the settings in the environment whose length has no limit of its own, or a large one."""
    settings: dict[str, Any] = {"storage_overrides": config.storage_overrides, "cors": config.cors}
    if isinstance(config.auth, JwtAuth):
        settings["auth"] = config.auth
    if config.domain is not None and config.domain.base_path:
        settings["domain"] = config.domain.base_path
    return settings


def read(values: Mapping[str, Any], project: str | None = None) -> StackConfig:
    """Return the config of a stack. Raises ConfigError if a key, a value or a combination of values is wrong.

    The error is one sentence that names the key as it is written in a stack's file, what was found and what is allowed.

    values     by key without namespace, as Pulumi gives them: nested values as JSON, all others as text
    project    the name of the project; if it is None, the one in Pulumi.yaml
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
        # The CLI passes a null of a stack's YAML to the program as an empty text.
        if NoneType not in get_args(type_):
            raise ConfigError(f"{key} is empty or null: expected {allowed(key)}, or no such key at all")
        value = None
    nested = isinstance(value, str) and value.lstrip().startswith(("{", "["))
    try:
        # Not strict, because Pulumi passes numbers and bools as text.
        return msgspec.convert(json.loads(value) if nested else value, type_, strict=False)
    except ValueError as error:
        found = value if nested else _shown(value)
        raise ConfigError(f"{key} is {found}: expected {allowed(key)} ({error})") from None


def _pair(storage: Storage) -> Pair:
    return KINDS[storage] if isinstance(storage, str) else storage


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def allowed(key: str) -> str:
    """Return the text that lists the allowed values of a key."""
    return descriptions()[key].partition("\n")[0]


@cache
def descriptions() -> dict[str, str]:
    """Return the texts below the keys of StackConfig: one line for the allowed values, one line for the meaning."""
    module = ast.parse(Path(__file__).read_text())
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "StackConfig")
    return {
        ast.unparse(key.target): "\n".join(" ".join(part.split()) for part in str(text.value.value).split("\n\n"))
        for key, text in pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
