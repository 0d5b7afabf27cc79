"""What prod protects: an update that would delete it is refused before anything is changed, and says how to go on."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pulumi
import pytest

from app.autocrud.errors import ConfigError
from infra.choices import Broker, Cache, Domain, Postgres
from infra.config import StackConfig
from infra.protected import Protected, check, protected, refusal_of, refuse
from infra.stack import build
from tests.infra.recorder import record
from tests.infra.stacks import JWT

PROD = {
    "plain": {},
    "auth none": {"auth": "none"},
    "jwt": {"auth": JWT, "cors": ["https://example.org"]},
    "function-url": {"edge": "function-url"},
    "generation 2": {"token_generation": 2},
    "generation 3": {"token_generation": 3},
    "generation 5": {"token_generation": 5},
    "database": {"storage": "postgres-s3"},
    "database of one model": {"storage_overrides": {"user": "postgres-s3"}},
    "larger database": {"storage": "postgres-s3", "postgres": Postgres(class_="db.t4g.small", proxy=True)},
    "aurora": {"storage": "postgres-s3", "postgres": Postgres(mode="aurora")},
    "two of aurora": {"storage": "postgres-s3", "postgres": Postgres(mode="aurora", multi_az=True)},
    "broker": {"storage": "mq-cached-s3"},
    "all": {"storage": "full", "domain": Domain("api.example.org", "Z0"), "broker": Broker(mode="cluster")},
    "nodes": {"storage": "redis-postgres", "cache": Cache(mode="nodes")},
}
CONFIGS = {name: StackConfig(stage="prod", **values) for name, values in PROD.items()}
URN = "urn:pulumi:main::crudstack::"


@pytest.fixture(scope="module")
def stacks():
    """The resources of each config, and of those the protected ones."""
    recorded = {
        name: record(lambda config=config: build(config, zip=Path("app.zip"))) for name, config in CONFIGS.items()
    }
    return {
        name: (
            {resource.urn for resource in stack.resources},
            [Protected(each.urn, each.type, each.name) for each in stack.resources if each.protect],
        )
        for name, stack in recorded.items()
    }


def test_a_refusal_is_for_what_the_program_no_longer_registers_and_for_nothing_else(stacks):
    refused = 0
    for before, after in itertools.product(CONFIGS, repeat=2):
        registered, config = stacks[after][0], CONFIGS[after]
        for resource in stacks[before][1]:
            refusal = refusal_of(config, resource)
            assert (refusal is None) == (resource.urn in registered), (before, after, resource, refusal)
            refused += refusal is not None
    assert refused > 500


CHANGES = [
    ("plain", "function-url", "edge is function-url: ", "expected http-api, or, to give it up, first `pulumi"),
    ("function-url", "plain", "edge is http-api: ", "expected function-url, or"),
    ("plain", "auth none", "auth is none: ", "expected token, or"),
    ("plain", "jwt", 'auth is {"mode":"jwt",', "expected token, or"),
    ("plain", "generation 3", "token_generation is 3: ", "expected 1, or 2 for a new token, or"),
    ("generation 3", "plain", "token_generation is 1: ", "expected 3, or 4 for a new token, or"),
    ("database", "plain", "storage is s3-sqlite: ", "such as postgres-s3, or"),
    ("all", "broker", "storage is mq-cached-s3: ", "such as postgres-s3, or"),
    ("database of one model", "plain", "storage is s3-sqlite: ", "an entry of storage_overrides"),
    ("database", "aurora", "postgres.mode is aurora: ", "expected instance, or"),
    ("aurora", "nodes", "postgres.mode is instance: ", "expected aurora, or"),
    ("two of aurora", "aurora", "postgres.multi_az is false: ", "expected true, or"),
]


@pytest.mark.parametrize(("before", "after", "says", "expects"), CHANGES, ids=lambda value: value.split(":")[0])
def test_one_sentence_names_the_key_and_unprotects_exactly_what_would_go(stacks, before, after, says, expects):
    registered, there = stacks[after][0], stacks[before][1]
    with pytest.raises(ConfigError) as refused:
        refuse(CONFIGS[after], there, "main", "crudstack")
    said = refused.value.detail
    assert said.startswith(f"crudstack:{says}")
    assert expects in said
    assert "\n" not in said
    (command,) = re.findall("`(.*)`", said)
    *unprotect, _, stack = shlex.split(command)
    assert (unprotect[:3], stack) == (["pulumi", "state", "unprotect"], "main")
    assert set(unprotect[3:]) == {each.urn for each in there} - registered
    # After that command the config is accepted.
    refuse(CONFIGS[after], [each for each in there if each.urn not in unprotect], "main", "crudstack")


def test_one_key_after_the_other_if_several_are_about_protected_resources(stacks):
    there, config = stacks["plain"][1], StackConfig(stage="prod", edge="function-url", auth="none")
    keys = []
    while True:
        try:
            refuse(config, there, "main", "crudstack")
        except ConfigError as error:
            keys.append(error.detail.partition(" ")[0])
            urns = re.findall("'(urn:.*?)'", error.detail)
            there = [each for each in there if each.urn not in urns]
        else:
            break
    assert sorted(keys) == ["crudstack:auth", "crudstack:edge"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plain", "generation 2"),
        ("generation 2", "generation 3"),
        ("plain", "broker"),
        ("plain", "all"),
        ("broker", "plain"),
        ("all", "nodes"),
        ("nodes", "all"),
        ("database", "larger database"),
        ("larger database", "database"),
        ("aurora", "two of aurora"),
    ],
)
def test_rotation_and_all_that_deletes_nothing_protected_is_possible(stacks, before, after):
    refuse(CONFIGS[after], stacks[before][1], "main", "crudstack")


@pytest.mark.parametrize("stage", ["dev", "local", "pr-prod"])
def test_a_stack_that_is_prod_stays_it(stacks, stage):
    with pytest.raises(ConfigError) as refused:
        refuse(StackConfig(stage=stage), stacks["database"][1], "main", "crudstack")
    assert refused.value.detail.startswith(
        f"crudstack:stage is {stage}: the update would remove all resources of the stage prod"
    )
    assert set(re.findall("'(urn:.*?)'", refused.value.detail)) == {each.urn for each in stacks["database"][1]}


def test_resources_of_others_are_none_of_ours():
    """Those of a transform, or of the engine itself, which may be protected too."""
    others = [
        Protected(f"{URN}aws:s3/bucket:Bucket::mine", "aws:s3/bucket:Bucket", "mine"),
        Protected(f"{URN}aws:sqs/queue:Queue::crudstack-prod-q", "aws:sqs/queue:Queue", "crudstack-prod-q"),
        Protected(
            f"{URN}aws:secretsmanager/secretVersion:SecretVersion::crudstack-prod-token-mine",
            "aws:secretsmanager/secretVersion:SecretVersion",
            "crudstack-prod-token-mine",
        ),
        Protected(f"{URN}pulumi:providers:aws::default", "pulumi:providers:aws", "default"),
        Protected(f"{URN}crudstack:aws:HttpApi::http-api", "crudstack:aws:HttpApi", "http-api"),
    ]
    refuse(CONFIGS["function-url"], others, "main", "crudstack")


# The state, as the CLI tells it


def resource(type_, name, **more):
    return {"urn": f"{URN}{type_}::{name}", "type": type_, "custom": True, **more}


API = resource("aws:apigatewayv2/api:Api", "crudstack-prod-api", protect=True)
STATE = {
    "version": 3,
    "deployment": {
        "resources": [
            resource("aws:s3/bucket:Bucket", "crudstack-prod-data", protect=True, retainOnDelete=True),
            resource("aws:apigatewayv2/api:Api", "crudstack-prod-api", protect=True, delete=True),
            API,
            resource("aws:apigatewayv2/stage:Stage", "crudstack-prod-all"),
        ]
    },
}


def test_the_protected_resources_of_a_state():
    assert [each.name for each in protected(STATE)] == ["crudstack-prod-data", "crudstack-prod-api"]
    # A stack that was only just made.
    assert protected({"version": 3, "deployment": {"manifest": {}}}) == []
    assert protected({"version": 3, "deployment": None}) == []


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Puts a `pulumi` on PATH, which notes how it was called and does what `script` says; nothing else is there."""

    def put(script: str) -> Path:
        program = tmp_path / "pulumi"
        program.write_text(f'#!/bin/sh\n{{ pwd; printf "%s\\n" "$@"; }} > "{tmp_path}/called"\n{script}\n')
        program.chmod(0o755)
        return tmp_path / "called"

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pulumi, "get_organization", lambda: "acme")
    monkeypatch.setattr(pulumi, "get_project", lambda: "crudstack")
    monkeypatch.setattr(pulumi, "get_stack", lambda: "main")
    warned = []
    monkeypatch.setattr(pulumi.log, "warn", warned.append)
    put.warned = warned
    return put


def tells(tmp_path, state):
    (tmp_path / "state.json").write_text(json.dumps(state) + "\n")
    return f'while IFS= read -r line; do printf "%s\\n" "$line"; done < "{tmp_path}/state.json"'


def test_the_running_stack_is_asked_for_its_state(cli, tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    called = cli(tells(tmp_path, STATE) + "; exit 0")
    check(StackConfig(stage="prod"), root)
    expected = [str(root), "stack", "export", "--stack", "acme/crudstack/main", "--non-interactive"]
    assert called.read_text().splitlines() == expected
    with pytest.raises(ConfigError, match="crudstack:edge is function-url") as refused:
        check(StackConfig(stage="prod", edge="function-url"), root)
    assert f"`pulumi state unprotect '{API['urn']}' --stack main`" in refused.value.detail
    unprotected = json.loads(json.dumps(STATE))
    unprotected["deployment"]["resources"][2]["protect"] = False
    cli(tells(tmp_path, unprotected) + "; exit 0")
    check(StackConfig(stage="prod", edge="function-url"), root)
    assert cli.warned == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'warning: x' >&2; echo 'error: no stack named main' >&2; exit 255", "error: no stack named main"),
        ("exit 3", "exit code 3"),
        ("echo no JSON", "Expecting value"),
        (None, "No such file or directory: 'pulumi'"),
    ],
)
def test_a_state_that_cannot_be_read_is_a_warning_and_the_engine_decides(cli, tmp_path, script, reason):
    if script is not None:
        cli(script)
    check(StackConfig(stage="prod", edge="function-url"), tmp_path)
    (warning,) = cli.warned
    assert warning.startswith("`pulumi stack export` did not tell what is protected (")
    assert reason in warning


def test_a_state_that_does_not_come_in_time_is_a_warning_too(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("infra.protected.EXPORT_S", 0.2)
    cli("while :; do :; done")
    check(StackConfig(stage="prod"), tmp_path)
    (warning,) = cli.warned
    assert "timed out after 0.2 seconds" in warning
