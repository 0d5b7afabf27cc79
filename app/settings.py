"""The settings of the app, read from the environment.

`StackOutputs` is the contract between a stack, which provides storage, and the app, which uses it. `LocalOverrides`
holds the settings of this machine: addresses with passwords, and directories.

| variable | meaning |
| --- | --- |
| CRUDSTACK_OUTPUTS | StackOutputs as JSON, or the path of a file that holds it |
| CRUDSTACK_STORAGE | instead of CRUDSTACK_OUTPUTS: a kind, or a JSON pair: `{"meta": "memory", "resource": "disk"}` |
| CRUDSTACK_STORAGE_OVERRIDES | kinds of single models as JSON: `{"session": "memory"}` |
| CRUDSTACK_DATA_DIR | the directory of stores on disk, and of local copies and caches of S3 (none if not set) |
| CRUDSTACK_CACHE_MB | MB (1024 * 1024 bytes) of the cache on disk; default: a quarter of the disk, 1024 at most |
| CRUDSTACK_KEEP_UPLOADS_HOURS | hours for which an upload is kept that no revision refers to; default: 24 |
| CRUDSTACK_MAX_BLOB_MB | MB (1024 * 1024 bytes) of the largest file in a Blob field; default: 5120 |
| CRUDSTACK_BLOB_QUOTA_MB | MB that all files of a model may take together; no limit if not set |
| CRUDSTACK_BUCKET | the bucket of stores on S3 |
| CRUDSTACK_PREFIX | the beginning of all keys on S3 and in Redis, and a part of the names of tables and exchanges |
| CRUDSTACK_REGION | the region of the bucket |
| CRUDSTACK_PG_DSN | PostgreSQL: postgresql://user:password@host:port/database |
| CRUDSTACK_REDIS_URL | Redis or Valkey: redis://user:password@host:port/0, or rediss:// with TLS |
| CRUDSTACK_AMQP_URL | RabbitMQ: amqp://user:password@host:port, or amqps:// with TLS |
| CRUDSTACK_S3_ENDPOINT_URL | an S3 server other than Amazon's; AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL are read too |
| CRUDSTACK_S3_PUBLIC_URL | the address by which clients reach the S3 server, if the app uses another one |
| CRUDSTACK_CORS | origins whose pages may call the API, separated by commas: https://app.example.org |
| CRUDSTACK_HOSTS | host names of the server besides localhost and 127.0.0.1, separated by commas |
| CRUDSTACK_BASE_PATH | the path in front of all routes at a gateway or a proxy, like `/v1`, for links; `/` for none |
| CRUDSTACK_AUTH | `none`, or JSON: `{"mode": "token", "token_sha256": "..."}`, `{"mode": "jwt", ...}` |

If the server listens on loopback, pages of localhost and 127.0.0.1 with any port may call the API too. On loopback, or
if CRUDSTACK_HOSTS is set, requests to other host names are refused, unless clients authenticate.

Credentials are the ambient ones of AWS: AWS_ACCESS_KEY_ID and so on, or a role. If the URL of a database, cache or
broker is not set, the app uses the one of the stack.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct

from .autocrud.errors import ConfigError
from .autocrud.secret import Secret, endpoint_url
from .settings_errors import found, meant, settings_error

StorageKind = Literal[
    "s3-sqlite", "postgres-s3", "redis-postgres", "cached-s3", "mq-cached-s3", "full", "disk", "memory-disk", "memory"
]
KINDS: tuple[StorageKind, ...] = get_args(StorageKind)


Server = Literal["postgres", "cache", "broker"]
"""A server that a store needs, named like the section of a stack's config that describes it."""


class StoreTraits(NamedTuple):
    """The needs of one store of a pair, and whether it may hold the data of a stack on AWS."""

    uses_s3: bool = False
    """Whether the store keeps its data in the bucket."""
    is_cached: bool = False
    """Whether caches in memory and on disk answer reads of bodies."""
    servers: frozenset[Server] = frozenset()
    extras: frozenset[str] = frozenset()
    """The extras of pyproject.toml that contain the store's drivers."""
    survives_machine: bool = False
    """Whether acknowledged data survives the loss of the machine with its disk."""


META_TRAITS: dict[str, StoreTraits] = {
    "memory": StoreTraits(),
    "disk": StoreTraits(),
    "s3-sqlite": StoreTraits(uses_s3=True, extras=frozenset({"s3"}), survives_machine=True),
    "postgres": StoreTraits(servers=frozenset({"postgres"}), extras=frozenset({"postgres"}), survives_machine=True),
    "redis": StoreTraits(servers=frozenset({"cache"}), extras=frozenset({"redis"})),
    "redis-postgres": StoreTraits(
        servers=frozenset({"postgres", "cache"}), extras=frozenset({"postgres", "redis"}), survives_machine=True
    ),
}
RESOURCE_TRAITS: dict[str, StoreTraits] = {
    "memory": StoreTraits(),
    "disk": StoreTraits(),
    "s3": StoreTraits(uses_s3=True, extras=frozenset({"s3"}), survives_machine=True),
    "cached-s3": StoreTraits(uses_s3=True, is_cached=True, extras=frozenset({"s3"}), survives_machine=True),
    "mq-cached-s3": StoreTraits(
        uses_s3=True,
        is_cached=True,
        servers=frozenset({"broker"}),
        extras=frozenset({"s3", "amqp"}),
        survives_machine=True,
    ),
}


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """A MetaStore and a ResourceStore by name. Kinds are names for pairs."""

    meta: Literal["memory", "disk", "s3-sqlite", "postgres", "redis", "redis-postgres"]
    resource: Literal["memory", "disk", "s3", "cached-s3", "mq-cached-s3"]

    @property
    def traits(self) -> tuple[StoreTraits, StoreTraits]:
        """Return the traits of the MetaStore and of the ResourceStore."""
        return META_TRAITS[self.meta], RESOURCE_TRAITS[self.resource]

    @property
    def servers(self) -> frozenset[Server]:
        """Return the servers that either store needs."""
        return frozenset().union(*(store.servers for store in self.traits))

    @property
    def extras(self) -> frozenset[str]:
        """Return the extras of pyproject.toml that contain the drivers of both stores."""
        return frozenset().union(*(store.extras for store in self.traits))

    @property
    def uses_s3(self) -> bool:
        """Return whether either store keeps its data in the bucket."""
        return any(store.uses_s3 for store in self.traits)

    @property
    def survives_machine(self) -> bool:
        """Return whether the data of both stores survives the loss of the machine with its disk."""
        return all(store.survives_machine for store in self.traits)


Storage = StorageKind | Pair

PRESETS: dict[StorageKind, Pair] = {
    "memory": Pair(meta="memory", resource="memory"),
    "disk": Pair(meta="disk", resource="disk"),
    "memory-disk": Pair(meta="memory", resource="disk"),
    "s3-sqlite": Pair(meta="s3-sqlite", resource="s3"),
    "postgres-s3": Pair(meta="postgres", resource="s3"),
    "redis-postgres": Pair(meta="redis-postgres", resource="s3"),  # on disk if there is no bucket
    "cached-s3": Pair(meta="s3-sqlite", resource="cached-s3"),
    "mq-cached-s3": Pair(meta="s3-sqlite", resource="mq-cached-s3"),
    "full": Pair(meta="redis-postgres", resource="mq-cached-s3"),
}
"""The pair that each kind names."""


class _Auth(Struct, frozen=True, forbid_unknown_fields=True, tag_field="mode", kw_only=True):
    pass


class NoAuth(_Auth, frozen=True, tag="none"):
    """Requests need no credentials, and every caller may do everything."""


class TokenAuth(_Auth, frozen=True, tag="token", kw_only=True):
    """Requests need a bearer token. Only the SHA-256 of the token is known here, as hex digits."""

    token_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class JwtAuth(_Auth, frozen=True, tag="jwt", kw_only=True):
    """Requests need a JSON Web Token of this issuer for one of these audiences. API Gateway verifies it."""

    issuer: str
    audiences: Annotated[list[str], Meta(min_length=1)]
    name_claim: str = "sub"
    roles_claim: str = "scope"


Auth = NoAuth | TokenAuth | JwtAuth


class Db(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A PostgreSQL database. The app signs in as `user`, with tokens that it signs with its role."""

    host: str
    port: int = 5432
    name: str
    user: str
    auth: Literal["iam"] = "iam"


class CacheServer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Valkey or Redis server. The app signs in as `user`, with tokens that it signs for the cache `name`."""

    host: str
    port: int = 6379
    user: str
    name: str
    serverless: bool
    tls: bool = True


class Broker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A RabbitMQ broker. The secret holds `{"username": ..., "password": ...}`."""

    endpoint: Annotated[str, Meta(pattern="^amqps?://[^@]+$")]
    secret_arn: str


class StackOutputs(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The names, endpoints and ARNs that a stack provides. They contain no secret."""

    version: Literal[1]
    storage: Storage
    storage_overrides: dict[str, Storage] = {}
    stage: str = "local"
    bucket: str | None = None
    prefix: str = ""
    region: str | None = None
    api_url: str | None = None
    function_name: str | None = None
    backup_function_name: str | None = None
    """The function that exports and imports, if the stack has servers in a closed network."""
    db: Db | None = None
    cache: CacheServer | None = None
    broker: Broker | None = None
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the API."""
    auth: Auth | None = None
    """None if it is not set; then the server may listen on loopback only."""
    base_path: str | None = None
    """The path in front of all routes at a gateway, like `/v1`."""


class LocalOverrides(Struct, frozen=True, kw_only=True):
    """The settings of this machine. Addresses may contain passwords; the stores parse them."""

    data_dir: str | None = None
    cache_mb: int | None = None
    keep_uploads_hours: int | None = None
    max_blob_mb: int | None = None
    blob_quota_mb: int | None = None
    s3_endpoint_url: str | None = None
    s3_public_url: str | None = None
    pg_dsn: Secret | None = None
    redis_url: Secret | None = None
    amqp_url: Secret | None = None


class Pages(Struct, frozen=True, kw_only=True):
    """The origins of pages that may call the API, and the host names of the server. See `foreign_pages`."""

    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class Settings(Struct, frozen=True):
    """All settings of the app."""

    outputs: StackOutputs
    local: LocalOverrides
    pages: Pages = Pages()
    base_path: str | None = None
    """The path in front of all routes, "" for none; None if it is not set."""


STACK_VARIABLES = (
    "CRUDSTACK_STORAGE",
    "CRUDSTACK_STORAGE_OVERRIDES",
    "CRUDSTACK_BUCKET",
    "CRUDSTACK_PREFIX",
    "CRUDSTACK_REGION",
    "CRUDSTACK_AUTH",
)
VARIABLES = (
    "CRUDSTACK_OUTPUTS",
    *STACK_VARIABLES,
    "CRUDSTACK_DATA_DIR",
    "CRUDSTACK_CACHE_MB",
    "CRUDSTACK_KEEP_UPLOADS_HOURS",
    "CRUDSTACK_MAX_BLOB_MB",
    "CRUDSTACK_BLOB_QUOTA_MB",
    "CRUDSTACK_S3_ENDPOINT_URL",
    "CRUDSTACK_S3_PUBLIC_URL",
    "CRUDSTACK_PG_DSN",
    "CRUDSTACK_REDIS_URL",
    "CRUDSTACK_AMQP_URL",
    "CRUDSTACK_CORS",
    "CRUDSTACK_HOSTS",
    "CRUDSTACK_BASE_PATH",
)
EXPOSED_HEADERS = (
    *("etag", "location", "link", "retry-after", "idempotency-replayed", "x-request-id"),
    *("accept-ranges", "content-range", "content-disposition"),
)
"""Headers of responses that pages of allowed origins may read."""
EXPORTS = "_exports/"
"""The beginning of the keys of archives that pass through the bucket of a stack. They are removed within a day.
The name of a model begins with a letter or a digit, so the keys of data differ."""
BASE_PATH = r"/|(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+"
OWN_PATHS = ("healthz", "readyz", "docs", "openapi.json")
"""First segments of the app's own paths. No base path may begin with one."""
MAX_CACHE_MB = 1_000_000
MAX_KEEP_HOURS = 100 * 366 * 24
MAX_BLOB_MB = 1_000_000
MAX_QUOTA_MB = 100_000_000
ORIGIN = r"\*|https?://[^/\s*@]+"
PAIR = '{"meta": "postgres", "resource": "s3"}'
AUTH = '{"mode": "jwt", "issuer": "https://...", "audiences": ["..."]}, or what `crudstack token new` prints'
ENDPOINT_VARIABLES = ("CRUDSTACK_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def load(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings in the environment. Raises ConfigError with one sentence about the wrong setting."""
    for name in environment:
        if name.startswith("CRUDSTACK_") and name not in VARIABLES:
            raise ConfigError(f"{name} is no setting; there are {', '.join(VARIABLES)}{meant(name, VARIABLES)}")
    given = {name: value for name in VARIABLES if (value := environment.get(name))}
    local = LocalOverrides(
        data_dir=given.get("CRUDSTACK_DATA_DIR"),
        cache_mb=_whole_number(given, "CRUDSTACK_CACHE_MB", "megabytes", MAX_CACHE_MB),
        keep_uploads_hours=_whole_number(given, "CRUDSTACK_KEEP_UPLOADS_HOURS", "hours", MAX_KEEP_HOURS),
        max_blob_mb=_whole_number(given, "CRUDSTACK_MAX_BLOB_MB", "megabytes", MAX_BLOB_MB),
        blob_quota_mb=_whole_number(given, "CRUDSTACK_BLOB_QUOTA_MB", "megabytes", MAX_QUOTA_MB),
        s3_endpoint_url=s3_endpoint(environment),
        s3_public_url=_url(given, "CRUDSTACK_S3_PUBLIC_URL"),
        pg_dsn=_secret(given, "CRUDSTACK_PG_DSN"),
        redis_url=_secret(given, "CRUDSTACK_REDIS_URL"),
        amqp_url=_secret(given, "CRUDSTACK_AMQP_URL"),
    )
    if "CRUDSTACK_OUTPUTS" in given:
        for name in STACK_VARIABLES:
            if name in given:
                raise ConfigError(f"CRUDSTACK_OUTPUTS and {name} are both set: unset one of them")
        outputs = _outputs(given["CRUDSTACK_OUTPUTS"])
        return Settings(outputs, local, _pages(given, outputs.cors), _base_path(given, outputs.base_path))
    if "CRUDSTACK_STORAGE" not in given:
        raise ConfigError(f"CRUDSTACK_STORAGE is not set: expected one of {', '.join(KINDS)}, or set CRUDSTACK_OUTPUTS")
    return Settings(
        StackOutputs(
            version=1,
            storage=parse_storage(given["CRUDSTACK_STORAGE"], "CRUDSTACK_STORAGE"),
            storage_overrides=_decoded(
                given.get("CRUDSTACK_STORAGE_OVERRIDES", "{}"),
                dict[str, Storage],
                "CRUDSTACK_STORAGE_OVERRIDES",
                '{"session": "memory"}',
            ),
            bucket=given.get("CRUDSTACK_BUCKET"),
            prefix=given.get("CRUDSTACK_PREFIX", ""),
            region=given.get("CRUDSTACK_REGION"),
            auth=parse_auth(given["CRUDSTACK_AUTH"]) if "CRUDSTACK_AUTH" in given else None,
        ),
        local,
        _pages(given),
        _base_path(given),
    )


def _secret(given: Mapping[str, str], name: str) -> Secret | None:
    return Secret(given[name]) if name in given else None


def _url(given: Mapping[str, str], name: str) -> str | None:
    return endpoint_url(given[name], name) if name in given else None


def _shown(address: str) -> str:
    return "an address with an @" if "@" in address else repr(address)


def _pages(given: Mapping[str, str], of_stack: Sequence[str] = ()) -> Pages:
    """Return the origins in CRUDSTACK_CORS and the host names in CRUDSTACK_HOSTS.

    Commas or blanks separate them. Raises ConfigError if one of them is invalid.
    """
    origins, hosts = (
        re.split(r"[,\s]+", given.get(name, "").strip(", ")) for name in ("CRUDSTACK_CORS", "CRUDSTACK_HOSTS")
    )
    for origin in filter(None, origins):
        if re.fullmatch(ORIGIN, origin) is None:
            raise ConfigError(
                f"CRUDSTACK_CORS has {_shown(origin)}: expected origins like https://app.example.org, without a path,"
                " or * for all"
            )
    for host in filter(None, hosts):
        if re.fullmatch(r"[A-Za-z0-9._-]+(:\d{1,5})?", host) is None:
            raise ConfigError(
                f"CRUDSTACK_HOSTS has {_shown(host)}: expected host names like api.example.test, or with a port"
            )
    return Pages(origins=(*of_stack, *filter(None, origins)), hosts=tuple(filter(None, hosts)))


def _base_path(given: Mapping[str, str], of_stack: str | None = None) -> str | None:
    """Return the base path without a slash at its end. Raises ConfigError unless it is a path of plain segments."""
    name = "CRUDSTACK_BASE_PATH" if "CRUDSTACK_BASE_PATH" in given else "base_path"
    path = given.get("CRUDSTACK_BASE_PATH", of_stack)
    if path is None:
        return None
    if re.fullmatch(BASE_PATH, path) is None:
        raise ConfigError(
            f"{name} is {_shown(path)}: expected a path like /v1, of letters, digits and - . _ ~ with a slash before"
            " each part, or / for none"
        )
    return path.rstrip("/")


def s3_endpoint(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL of an S3 server other than Amazon's, or None if none is set.

    Raises ConfigError if the URL is invalid or contains credentials.
    """
    name = next((name for name in ENDPOINT_VARIABLES if environment.get(name)), None)
    return None if name is None else endpoint_url(environment[name], name)


def _whole_number(given: Mapping[str, str], name: str, unit: str, most: int) -> int | None:
    text = given.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
        raise ConfigError(f"{name} is {text[:40]!r}: expected a whole number of {unit} from 1 to {most}, like 128")
    return int(text)


def parse_storage(text: str, name: str) -> Storage:
    """Return the storage that a text names: a kind, or a pair as JSON. Raises ConfigError if it names none.

    name  the name of the setting, for errors
    """
    if text.lstrip().startswith("{"):
        pair: Pair = _decoded(text, Pair, name, PAIR)
        return pair
    for kind in KINDS:
        if text == kind:
            return kind
    raise ConfigError(
        f"{name} is {found(text, KINDS)}: expected one of {', '.join(KINDS)}, or a pair as JSON, like"
        f" {PAIR}{meant(text, KINDS)}"
    )


def parse_auth(text: str) -> Auth:
    """Return the authentication that CRUDSTACK_AUTH names: `none`, or JSON. Raises ConfigError."""
    if text == "none":
        return NoAuth()
    if not text.lstrip().startswith("{"):
        raise ConfigError(f"CRUDSTACK_AUTH: expected none, or JSON like {AUTH}")
    auth: Auth = _decoded(text, Auth, "CRUDSTACK_AUTH", AUTH)
    return auth


def _outputs(text: str) -> StackOutputs:
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            is_path = re.fullmatch(r"[~.]{0,2}/[^@]*|[^@]*\.json", text)  # other text may be a misplaced secret
            which = f"the file {text!r}, which" if is_path else "a file that"
            raise ConfigError(
                f"CRUDSTACK_OUTPUTS names {which} cannot be read ({reason}): expected its path, or JSON"
            ) from None
    return parse_outputs(text, "CRUDSTACK_OUTPUTS")


def parse_outputs(text: str, name: str) -> StackOutputs:
    """Decode StackOutputs from JSON. Raises ConfigError if they are invalid.

    name  the setting or file that contains the JSON, for errors
    """
    outputs: StackOutputs = _decoded(text, StackOutputs, name)
    return outputs


def _decoded(text: str, type_: Any, name: str, like: str | None = None) -> Any:
    """Decode JSON. Raises ConfigError, with `like` as an example of what is expected."""
    expected = "" if like is None else f"; expected JSON like {like}"
    try:
        return msgspec.json.decode(text, type=type_)
    except msgspec.ValidationError as error:
        raise ConfigError(
            settings_error(msgspec.json.decode(text), type_, name) or f"{name} does not fit: {error}{expected}"
        ) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error}{expected}") from None


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address, so that no other machine can reach it."""
    import ipaddress  # late: AWS Lambda does not need it

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
