"""The config: what is read, what is refused, and that it says so in words that help."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import yaml
from msgspec import Struct

from app.autocrud.errors import ConfigError
from app.settings import JwtAuth, Pair
from app.wiring import PRESETS
from infra.artifact import ROOT
from infra.choices import Postgres
from infra.config import KINDS, LOG_DAYS, MAX_TAGS, StackConfig, allowed, descriptions, read
from infra.stack import build
from tests.infra.recorder import record

JWT = '{"mode": "jwt", "issuer": "https://login.example.org", "audiences": ["crudstack"]}'


def test_without_any_key_it_is_the_bucket_alone():
    assert read({}) == StackConfig()
    assert (StackConfig().storage, StackConfig().stage, StackConfig().servers) == ("s3-sqlite", "dev", frozenset())


def test_values_come_as_text_and_nested_ones_as_json():
    values = {
        "storage": '{"meta": "redis-postgres", "resource": "mq-cached-s3"}',
        "storage_overrides": '{"session": "s3-sqlite"}',
        "auth": JWT,
        "memory_mb": "1024",
        "concurrency": "20",
        "snap_start": "true",
        "cors": '["https://www.example.org"]',
        "domain": '{"name": "api.example.org", "zone": "Z0123456789"}',
        "postgres": '{"class": "db.r6g.2xlarge", "multi_az": true}',
        "budget_usd": "50",
        "alarm_email": "ops@example.org",
        "tags": '{"team": "blue"}',
    }
    config = read(values)
    assert config.storage == Pair(meta="redis-postgres", resource="mq-cached-s3")
    assert config.auth == JwtAuth(issuer="https://login.example.org", audiences=["crudstack"])
    assert (config.memory_mb, config.concurrency, config.snap_start, config.budget_usd) == (1024, 20, True, 50.0)
    assert config.postgres == Postgres(class_="db.r6g.2xlarge", multi_az=True)
    assert read({"concurrency": "null"}).concurrency is None


@pytest.mark.parametrize("top", ["org", "xn--p1ai", "xn--fiqs8s", "xn--vermgensberatung-pwb", "xn--a", "museum"])
def test_names_in_punycode_are_taken_everywhere(top):
    name = f"xn--e1afmkfd.{top}"
    config = read(
        {
            "domain": json.dumps({"name": f"api.{name}", "zone": "Z0123456789"}),
            "alarm_email": f"ops@{name}",
            "cors": json.dumps([f"https://www.{name}", f"http://{name}:8080"]),
            "auth": json.dumps({"mode": "jwt", "issuer": f"https://login.{name}/", "audiences": ["api"]}),
        }
    )
    assert config.domain is not None
    assert config.domain.name == f"api.{name}"
    assert read({"domain": json.dumps({"name": f"{'a' * 59}.xn", "zone": "Z0"})}).domain is not None


def test_the_kinds_are_those_of_the_app():
    assert {kind: pair for kind, pair in PRESETS.items() if kind in KINDS} == KINDS
    assert set(PRESETS) - set(KINDS) == {"memory", "disk", "memory-disk"}


@pytest.mark.parametrize(
    ("storage", "needs", "extras"),
    [
        ("s3-sqlite", set(), set()),
        ("cached-s3", set(), set()),
        ("postgres-s3", {"postgres"}, {"postgres"}),
        ("redis-postgres", {"postgres", "cache"}, {"postgres", "redis"}),
        ("mq-cached-s3", {"broker"}, {"amqp"}),
        ("full", {"postgres", "cache", "broker"}, {"postgres", "redis", "amqp"}),
        (Pair(meta="postgres", resource="cached-s3"), {"postgres"}, {"postgres"}),
    ],
)
def test_the_servers_and_extras_of_a_storage(storage, needs, extras):
    assert StackConfig(storage=storage).servers == needs
    assert StackConfig(storage=storage).extras == extras
    assert StackConfig(storage_overrides={"article": storage}).servers == needs


def test_overrides_need_their_union():
    config = StackConfig(storage_overrides={"a": "postgres-s3", "b": "mq-cached-s3"})
    assert config.servers == {"postgres", "broker"}


REFUSED = [
    *(
        (
            {"domain": json.dumps({"name": "api.example.org", "zone": "Z0", "base_path": path})},
            f'domain.base_path is "{path}": the app has a path that begins like that; expected another first part than',
        )
        for path in ("/healthz", "/docs/v1", "/openapi.json")
    ),
    ({"storag": "s3-sqlite"}, "storag is no setting; there are storage, "),
    ({"storage": "s3"}, 'storage is "s3": expected s3-sqlite, postgres-s3'),
    ({"storage": "memory"}, 'storage is "memory": on AWS it would lose data with'),
    ({"storage": '{"meta": "redis", "resource": "s3"}'}, '{"meta":"redis","resource":"s3"}: on AWS'),
    ({"storage": '{"meta": "postgres", "resource": "disk"}'}, "storage is"),
    ({"storage": '{"meta": "postgres", "ressource": "s3"}'}, "(Object "),
    ({"storage_overrides": '{"session": "memory"}'}, 'storage_overrides.session is "memory": on AWS'),
    ({"stage": "production"}, 'stage is "production": expected dev, prod, local, or pr-NAME'),
    ({"stage": "pr-" + "x" * 14}, "stage is"),
    ({"auth": "password"}, 'auth is "password": expected token, none, or {mode: jwt'),
    ({"auth": '{"mode": "jwt", "issuer": "https://login.example.org"}'}, "missing required field `audiences`"),
    ({"auth": '{"mode": "jwt", "issuer": "x", "audiences": []}'}, "auth is"),
    ({"auth": JWT, "edge": "function-url"}, "a function URL verifies no JSON Web Tokens; expected edge http-api"),
    (
        {"domain": '{"name": "api.example.org", "zone": "Z0"}', "edge": "function-url"},
        "expected edge http-api, or domain null",
    ),
    ({"domain": '{"name": "api.example.org", "zone": "example.org"}'}, "`$.zone`"),
    ({"token_generation": "0"}, 'token_generation is "0": expected 1 or more'),
    ({"edge": "rest-api"}, 'edge is "rest-api": expected http-api, function-url'),
    ({"memory_mb": "64"}, 'memory_mb is "64": expected 128 to 10240'),
    ({"memory_mb": "1 GB"}, "memory_mb is"),
    ({"ephemeral_mb": "10241"}, "ephemeral_mb is"),
    ({"timeout_s": "0"}, "timeout_s is"),
    ({"timeout_s": "901", "edge": "function-url"}, "timeout_s is"),
    ({"timeout_s": "31"}, "timeout_s is 31: an HTTP API waits 30 seconds; expected at most 30, or edge function-url"),
    ({"concurrency": "0"}, "concurrency is"),
    (
        {"concurrency": "36", "storage": "postgres-s3"},
        "expected at most 35, a larger postgres.class or max_acu, or postgres.proxy",
    ),
    ({"snap_start": "maybe"}, "snap_start is"),
    ({"snap_start": "true", "ephemeral_mb": "1024"}, "expected ephemeral_mb 512, or false"),
    ({"cors": '["*"]', "stage": "prod"}, 'cors is ["*"]: in prod only pages of named origins'),
    ({"cors": '["*", "https://example.org"]'}, "expected it alone"),
    ({"cors": '["example.org"]'}, "cors is"),
    ({"cors": '["https://*.example.org"]'}, "cors is"),
    ({"postgres": '{"clas": "db.t4g.micro"}'}, "Object contains unknown field `clas`"),
    ({"postgres": '{"class": "t4g.micro"}'}, "`$.class`"),
    ({"postgres": '{"storage_gb": 5}'}, "`$.storage_gb`"),
    ({"postgres": '{"mode": "aurora", "class": "db.t4g.large"}', "storage": "full"}, "Aurora Serverless has none"),
    ({"cache": '{"mode": "cluster"}'}, "`$.mode`"),
    ({"broker": '{"version": 4.2}'}, "Expected `str`, got `float` - at `$.version`"),
    ({"broker": '{"instance": "mq.m5.large"}', "storage": "full"}, "RabbitMQ 4.2 does not run on it"),
    ({"broker": '{"version": "3.13", "instance": "mq.t3.micro"}', "storage": "full"}, "`$.instance`"),
    ({"log_days": "31"}, "log_days is 31: expected 1, 3, 5"),
    ({"alarm_email": "ops"}, "alarm_email is"),
    ({"alarm_email": "ops@example.org\n"}, "alarm_email is"),
    ({"budget_usd": "0", "alarm_email": "a@b"}, "budget_usd is"),
    ({"budget_usd": "50"}, "no address would get its messages; expected alarm_email"),
    ({"domain": json.dumps({"name": "a" * 61 + ".org", "zone": "Z0"})}, "`str` of length <= 64"),
    *(
        ({"domain": json.dumps({"name": name, "zone": "Z0"})}, "`$.name`")
        for name in (
            *(
                "example",
                "a_b.example.org",
                "-a.org",
                "a-.org",
                "a..org",
                ".org",
                "a.org.",
                "a.org\n",
                "API.example.org",
            ),
            *(
                "api.example.xn--",
                "api.example.xn--a-",
                "api.example.xn--a_b",
                "api.example.0rg",
                "api.10",
                "api.пример",
            ),
            *("*.example.org", "https://a.org", f"{'a' * 64}.org", f"a.xn--{'a' * 60}"),
        )
    ),
    ({"tags": '{"aws:team": "x"}'}, "are taken"),
    ({"tags": '{"AWS:team": "x"}'}, "are taken"),
    ({"tags": '{"crudstack:stage": "prod"}'}, "are taken"),
    ({"tags": '{"": "x"}'}, "expected names of 1 to 128 characters"),
    ({"tags": json.dumps({"x" * 129: "x"})}, "expected names of 1 to 128 characters"),
    ({"tags": json.dumps({"x": "x" * 257})}, "and values of at most 256"),
    ({"tags": '{"team": "a,b"}'}, 'tags is {"team":"a,b"}: expected letters, digits, spaces'),
    ({"tags": '{"te*m": "a"}'}, "expected letters, digits, spaces"),
    ({"tags": '{"team": "a\\nb"}'}, "expected letters, digits, spaces"),
    ({"tags": '{"Team": "a", "team": "b"}'}, "IAM takes it for Team, because it ignores case; expected one"),
    ({"tags": json.dumps({f"n{number}": "x" for number in range(49)})}, 'tags is "49 names": expected at most 48'),
    ({"tags": '{"team": 5}'}, "`$[...]`"),
    ({"tags": '{"team": '}, "tags is"),
]


@pytest.mark.parametrize(
    ("values", "sentence"), REFUSED, ids=[f"{n}-{'-'.join(v)}" for n, (v, _) in enumerate(REFUSED)]
)
def test_a_wrong_value_is_one_sentence_with_key_found_and_allowed(values, sentence):
    with pytest.raises(ConfigError) as refused:
        read(values)
    said = str(refused.value)
    assert sentence in said
    assert said.startswith("crudstack:")
    assert "\n" not in said
    assert any(said.startswith(f"crudstack:{key}") for key in values)
    assert "expected" in said or "is no setting" in said or "are taken" in said


def test_tags_that_aws_takes_are_taken():
    full = {f"{number}".rjust(128, "x"): "_.:/=+-@ é漢".ljust(256, "0") for number in range(48)}
    assert read({"tags": json.dumps(full)}).tags == full
    assert read({"domain": json.dumps({"name": "a" * 60 + ".org", "zone": "Z0"})}).domain.name == "a" * 60 + ".org"


def test_a_tag_more_than_the_limit_would_be_one_too_many_for_aws():
    """On a resource that has a Name: 50."""
    tags = {f"{number}": "" for number in range(MAX_TAGS)}
    stack = record(lambda: build(StackConfig(storage="mq-cached-s3", tags=tags), zip=Path("app.zip")))
    assert max(len(each.inputs.get("tags", {})) for each in stack.resources) == 50


def test_connections_suffice_for_all_instances_of_the_function():
    assert StackConfig().reserved_concurrency is None
    assert StackConfig(storage="postgres-s3").reserved_concurrency == 35
    assert StackConfig(storage="postgres-s3", concurrency=10).reserved_concurrency == 10
    assert StackConfig(storage="postgres-s3", postgres=Postgres(proxy=True)).reserved_concurrency is None
    assert (
        StackConfig(storage="postgres-s3", postgres=Postgres(proxy=True), concurrency=900).reserved_concurrency == 900
    )
    sizes = {
        "db.t4g.micro": 80,
        "db.t4g.medium": 320,
        "db.m7g.large": 640,
        "db.r6g.large": 1280,
        "db.r6g.16xlarge": 5000,
    }
    assert {name: Postgres(class_=name).max_connections for name in sizes} == sizes
    assert Postgres(mode="aurora", max_acu=4).max_connections == 640


def test_pulumi_yaml_declares_every_key_that_has_a_default():
    """The CLI refuses a stack that lacks a value for a declared key, and takes null for no default."""
    fields = {field.name: field for field in msgspec.structs.fields(StackConfig)}
    assert list(descriptions()) == list(fields)
    defaults = {name: default_of(field) for name, field in fields.items()}
    project = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())
    declared = project["config"]
    assert list(declared) == [name for name, default in defaults.items() if default is not None]
    assert set(defaults) - set(declared) == {"concurrency", "domain", "alarm_email", "budget_usd"}
    types = {str: "string", int: "integer", bool: "boolean"}
    for name, key in declared.items():
        default, (what, meaning) = defaults[name], descriptions()[name].split("\n")
        assert key["description"] == f"{meaning} Allowed: {what}."
        assert key["default"] == ({} if isinstance(default, Struct) else default)
        assert type(key["default"]) is (dict if isinstance(default, Struct) else type(default))
        # One type is not enough for a key that takes a text or an object, and the CLI has none for objects.
        several = name in {"storage", "auth"} or isinstance(default, dict | list | Struct)
        assert key.get("type") == (None if several else types[type(default)])
    assert project["runtime"] == {"name": "python", "options": {"virtualenv": ".venv"}}
    assert project["main"] == "infra/"


def default_of(field):
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default


def test_the_declared_defaults_are_the_config_without_any_key():
    """The CLI hands them on as it does the values of a stack."""
    declared = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    assert read({name: handed_on(key["default"]) for name, key in declared.items()}) == StackConfig()


def handed_on(value):
    """As Pulumi hands a value of YAML on: null becomes an empty text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def test_a_null_is_taken_where_the_page_says_so():
    for key in ("concurrency", "domain", "alarm_email", "budget_usd"):
        assert allowed(key).split(";")[0].endswith(", or null")
        assert getattr(read({key: handed_on(None)}), key) is None
    for field in msgspec.structs.fields(StackConfig):
        if default_of(field) is not None:
            with pytest.raises(ConfigError, match=f"^crudstack:{field.name} is empty or null: expected "):
                read({field.name: handed_on(None)})


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_example_stacks_can_be_read(name):
    values = yaml.safe_load((ROOT / f"Pulumi.{name}.yaml.example").read_text())["config"]
    # Pulumi takes a key without a namespace for one of the project, whatever its name is.
    assert {key for key in values if ":" in key} == {"aws:region"}
    assert read({key: handed_on(value) for key, value in values.items() if ":" not in key}).stage == name


def test_an_error_names_the_key_as_the_project_s_file_has_it(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^myproject:log_days is 31: expected"):
        read({"log_days": "31"}, "myproject")
    (tmp_path / "Pulumi.yaml").write_text("name: another\n")
    (tmp_path / "infra").mkdir()
    monkeypatch.chdir(tmp_path / "infra")
    with pytest.raises(ConfigError, match=r"^another:log_day is no setting; "):
        read({"log_day": "30"})


def test_log_days_are_described_as_they_are():
    assert allowed("log_days") == ", ".join(map(str, LOG_DAYS))
