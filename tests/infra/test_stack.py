"""The Pulumi program, run without AWS: the resources that each kind registers in each stage."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pulumi
import pytest
from pulumi import ResourceTransformationResult
from pulumi.runtime import rpc

from infra import artifact
from infra.artifact import ROOT
from infra.choices import Postgres
from infra.components import StackContext
from infra.components.bucket import READ, WRITE, DataBucket
from infra.components.token import _labelled
from infra.config import KINDS, StackConfig
from infra.grants import policy
from infra.stack import build, package
from tests.infra import recorder
from tests.infra.recorder import record
from tests.infra.stacks import CONFIGS, STAGES, environment, policies, recording

SNAPSHOTS = Path(__file__).with_name("snapshots")
UPDATE = "CRUDSTACK_UPDATE_SNAPSHOTS"

COUNTS = {"s3-sqlite": 34, "cached-s3": 34, "postgres-s3": 81, "redis-postgres": 91, "mq-cached-s3": 71, "full": 108}
"""Resources of a kind, the stack itself and the components included."""


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_deprecated(name):
    assert recording(name).warnings == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tree_of_resources(name):
    """The tree is that of the snapshot.

    After an intended change, run
    `CRUDSTACK_UPDATE_SNAPSHOTS=1 .venv/bin/python -m pytest tests/infra/test_stack.py` and review the difference.
    """
    tree, file = recording(name).tree(), SNAPSHOTS / f"{name}.txt"
    if os.environ.get(UPDATE):
        file.write_text(tree)
    assert file.read_text() == tree, f"{file} differs; {UPDATE}=1 writes it"


def test_there_are_no_other_snapshots():
    assert {path.stem for path in SNAPSHOTS.iterdir()} == CONFIGS.keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_how_many_resources_a_kind_is(kind, stage):
    assert len(recording(f"{kind}-{stage}").resources) == COUNTS[kind]


BUCKET, FUNCTION = "aws:s3/bucket:Bucket", "aws:lambda/function:Function"
INSTANCE, BROKER = "aws:rds/instance:Instance", "aws:mq/broker:Broker"
VERSION = "aws:secretsmanager/secretVersion:SecretVersion"
FULL = "full-dev"


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("prefix", ["", "data/", "tenants/a/"])
def test_the_permissions_of_a_grant_for_the_bucket(access, prefix):
    def program():
        grant = DataBucket(StackContext("crudstack-dev", False, {})).grant(access, prefix)
        return {"policy": policy(grant.statements), "prefix": grant.outputs["prefix"]}

    outputs = record(program).outputs
    listed, used = json.loads(outputs["policy"])["Statement"]
    bucket = "${aws_s3_bucket.crudstack-dev-data.arn}"
    assert used["Action"] == list({"read": READ, "write": WRITE}[access])
    assert used["Resource"] == [f"{bucket}/{prefix}*"]
    assert (listed["Action"], listed["Resource"]) == (["s3:ListBucket"], [bucket])
    assert listed.get("Condition") == ({"StringLike": {"s3:prefix": f"{prefix}*"}} if prefix else None)
    assert outputs["prefix"] == prefix
    if access == "read":
        assert not any(word in action for action in used["Action"] for word in ("Put", "Delete", "Abort"))


@pytest.mark.parametrize(
    ("access", "prefix"), [("admin", ""), ("read", "*"), ("write", "a?/"), ("write", "${aws:username}/")]
)
def test_a_link_that_would_allow_more_is_refused(access, prefix):
    def program():
        DataBucket(StackContext("crudstack-dev", False, {})).grant(access, prefix)
        return {}

    with pytest.raises(ValueError, match="expected"):
        record(program)


@pytest.mark.parametrize("kind", KINDS)
def test_the_role_of_the_function_is_the_sum_of_its_links(kind):
    expected = {"Log", "Trace", "ListData", "UseData"}
    needs = StackConfig(storage=kind).servers
    expected |= {"BeInTheNetwork"} if needs else set()
    expected |= {
        {"postgres": "SignInToDatabase", "cache": "SignInToCache", "broker": "ReadBrokerSecret"}[need] for need in needs
    }
    found = policies(recording(f"{kind}-dev"))
    for function in ("api", "backup") if needs else ("api",):
        of_the_network = found.get(f"crudstack-dev-{function}-network", [])  # a policy of its own, of the same role
        statements = (*found[f"crudstack-dev-{function}"], *of_the_network)
        exports = {"ListExports", "RemoveExports"} if needs and function == "api" else set()
        assert {statement["Sid"] for statement in statements} == expected | exports


def test_the_functions_that_make_the_database_user_may_do_that_alone():
    roles = policies(recording("postgres-s3-dev"))
    inside = (*roles["crudstack-dev-bootstrap-inside"], *roles["crudstack-dev-bootstrap-inside-network"])
    assert {statement["Sid"] for statement in inside} == {"Log", "Trace", "BeInTheNetwork"}
    outside = {statement["Sid"]: statement for statement in roles["crudstack-dev-bootstrap-outside"]}
    assert outside.keys() == {"Log", "Trace", "ReadMasterSecret", "Invoke"}
    assert outside["ReadMasterSecret"]["Resource"] == [
        "${aws_db_instance.crudstack-dev-database.master_user_secret[0].secret_arn}"
    ]
    assert outside["Invoke"]["Resource"] == ["${aws_lambda_function.crudstack-dev-bootstrap-inside.arn}"]


def test_the_app_is_told_the_database_user_when_it_is_there():
    stack = recording("postgres-s3-dev")
    bootstrap = stack.one("aws:lambda/invocation:Invocation")
    assert bootstrap.urn in stack.one(FUNCTION, "-api").depends["environment"]
    assert stack.one(INSTANCE).urn in bootstrap.depends["input"]


def test_iam_is_told_the_arn_of_a_database_user(monkeypatch):
    """The other recordings have no real ARNs in them."""
    arn = "arn:aws:rds:eu-central-1:123456789012:db:crudstack-dev-database-1a2b3c4"
    proxy = "arn:aws:rds:eu-central-1:123456789012:db-proxy:prx-0a1b2c3d4e5f"
    filled = recorder.made

    def made(resource):
        known = {INSTANCE: {"arn": arn, "resourceId": "db-ABC"}, "aws:rds/proxy:Proxy": {"arn": proxy}}
        return filled(resource) | known.get(resource.type, {})

    monkeypatch.setattr(recorder, "made", made)
    for settings, id in ((Postgres(), "db-ABC"), (Postgres(proxy=True), "prx-0a1b2c3d4e5f")):
        config = StackConfig(storage="postgres-s3", postgres=settings)
        roles = policies(record(lambda config=config: build(config, zip=Path("app.zip"))))
        (statement,) = [each for each in roles["crudstack-dev-api"] if each["Sid"] == "SignInToDatabase"]
        assert statement["Resource"] == [f"arn:aws:rds-db:eu-central-1:123456789012:dbuser:{id}/crudstack_app"]
    assert roles["crudstack-dev-proxy"][0]["Resource"] == [
        "arn:aws:rds-db:eu-central-1:123456789012:dbuser:db-ABC/crudstack_app"
    ]


def test_backups_connect_to_the_database_and_not_to_its_proxy():
    """A proxy would pin the session that sets limits of its own, and ends transactions that are idle for long."""
    stack = recording("everything-prod")
    hosts = {
        name: json.loads(environment(stack.one(FUNCTION, name))["CRUDSTACK_OUTPUTS"])["db"]["host"]
        for name in ("-api", "-backup")
    }
    assert hosts == {
        "-api": "${aws_db_proxy.crudstack-prod-proxy.endpoint}",
        "-backup": "${aws_rds_cluster.crudstack-prod-database.endpoint}",
    }
    rule = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
    groups = {name: stack.one(rule, f"postgres-from-{name}").depends["securityGroupId"] for name in ("api", "backup")}
    assert [group[0].rpartition("::")[2] for group in groups.values()] == [
        "crudstack-prod-proxy",
        "crudstack-prod-database",
    ]
    roles = policies(stack)
    signs_in = {
        name: next(each for each in roles[f"crudstack-prod-{name}"] if each["Sid"] == "SignInToDatabase")
        for name in ("api", "backup")
    }
    assert signs_in["api"]["Resource"] != signs_in["backup"]["Resource"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_knows_the_function_for_backups_if_the_servers_are_closed(name):
    stack = recording(name)
    assert ("backup_function_name" in stack.outputs) == CONFIGS[name].needs_network
    for function in stack.all(FUNCTION):
        assert "backup_function_name" not in environment(function).get("CRUDSTACK_OUTPUTS", "")


# Secrets


def test_the_token_is_drawn_by_each_run_and_used_by_the_one_that_makes_it():
    first, second = (record(lambda: build(StackConfig(), zip=Path("app.zip"))).one(VERSION) for _ in range(2))
    assert first.inputs["secretString"] != second.inputs["secretString"]
    for version in (first, second):
        digest = hashlib.sha256(version.inputs["secretString"].encode()).hexdigest()
        assert version.inputs["versionStages"] == ["AWSCURRENT", f"sha256-{digest}"]
        assert set(version.ignored) == {"secretString", "versionStages"}


def test_a_preview_does_not_show_the_sha256_of_a_token_that_no_update_will_use(monkeypatch):
    """The engine answers for a planned resource with what is known already; the version's id is not."""
    registered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = registered(self, request)
        if request.type == VERSION:
            answer.object.update({"versionId": rpc.UNKNOWN})
        return answer

    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    stack = record(lambda: build(StackConfig(), zip=Path("app.zip")), preview=True)
    assert stack.outputs["auth"]["token_sha256"] == rpc.UNKNOWN
    digest = stack.one(VERSION).inputs["versionStages"][1].removeprefix("sha256-")
    assert digest not in json.dumps([stack.outputs, stack.one(FUNCTION).inputs])


def test_a_version_without_its_label_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("infra.components.token.LABEL", "sha1-")
    with pytest.raises(pulumi.RunError, match="raise crudstack:token_generation by one"):
        _labelled(["AWSCURRENT", "sha256-x"])


def test_the_function_knows_the_token_by_the_label_that_is_in_the_state(monkeypatch):
    """The state is what Pulumi answers with when it ignores changes: the labels of the run that made the version."""
    kept = "5" * 64
    answered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = answered(self, request)
        if request.type == VERSION:
            answer.object.update({"versionStages": ["AWSCURRENT", f"sha256-{kept}"]})
        return answer

    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    stack = record(lambda: build(StackConfig(), zip=Path("app.zip")))
    assert stack.outputs["auth"] == {"mode": "token", "token_sha256": kept}
    assert json.loads(environment(stack.one(FUNCTION))["CRUDSTACK_OUTPUTS"])["auth"]["token_sha256"] == kept


def test_another_generation_of_the_token_is_another_version_of_the_secret():
    names = {
        record(lambda n=n: build(StackConfig(token_generation=n), zip=Path("app.zip"))).one(VERSION).name
        for n in (1, 2)
    }
    assert names == {"crudstack-dev-token-1", "crudstack-dev-token-2"}


def test_without_a_token_there_is_no_secret():
    stack = recording("function-url-dev")
    assert stack.outputs["auth"] == {"mode": "none"}
    assert not stack.all(VERSION)


def test_the_broker_has_the_password_that_its_secret_holds(monkeypatch):
    """Of whichever run: here the state answers with that of an earlier one, as it does when changes are ignored."""
    kept = {"username": "crudstack", "password": "k" * 43}
    registered = recorder.Monitor.RegisterResource

    def register(self, request):
        answer = registered(self, request)
        if request.type == VERSION and request.name.endswith("-broker"):
            sealed = {rpc._special_sig_key: rpc._special_secret_sig, "value": json.dumps(kept)}
            answer.object.update({"secretString": sealed})
        return answer

    own = recording(FULL)
    monkeypatch.setattr(recorder.Monitor, "RegisterResource", register)
    later = record(lambda: build(CONFIGS[FULL], zip=Path("app.zip")))
    assert later.one(BROKER).inputs["users"] == [kept]
    assert later.one(BROKER).secrets == {"users"}
    (user,) = own.one(BROKER).inputs["users"]
    assert json.loads(own.one(VERSION, "broker").inputs["secretString"]) == user
    assert 12 <= len(user["password"]) <= 250
    assert "," not in user["password"]


def test_a_broker_follows_its_secret_and_its_version():
    first, second = (record(lambda: build(CONFIGS[FULL], zip=Path("app.zip"))) for _ in range(2))
    for stack in (first, second):
        broker, version = stack.one(BROKER), stack.one(VERSION, "broker")
        assert version.urn in broker.depends["users"]
        (user,) = broker.inputs["users"]
        # Another password replaces the broker, and nothing else about the secret does.
        assert broker.trigger == hashlib.sha256(user["password"].encode()).hexdigest()
        assert broker.replaced_by == ["engineVersion"]
        # A refresh may leave a broker without users in the state; what is ignored would come from there.
        assert (broker.ignored, version.ignored) == ([], ["secretString"])
    assert first.one(BROKER).trigger != second.one(BROKER).trigger


def test_permissions_for_the_network_outlive_the_security_group():
    """Lambda deletes its network interfaces after the function, and uses the function's permissions for that."""
    stack = recording("full-dev")
    named = {(one.type, one.name): one for one in stack.resources}
    for function in ("api", "backup", "bootstrap-inside"):
        allowed = named["aws:iam/rolePolicy:RolePolicy", f"crudstack-dev-{function}-network"]
        group = named["aws:ec2/securityGroup:SecurityGroup", f"crudstack-dev-{function}"]
        assert allowed.urn in group.depends[""]


# The program itself


def test_the_program_makes_no_connection_and_writes_no_file(monkeypatch):
    """This holds for a preview and for an update. The program only registers resources with the engine."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the program connects"))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("the program writes a file"))
    monkeypatch.setattr(artifact, "build", lambda *_, **__: pytest.fail("the program builds a zip"))
    for preview in (True, False):
        stack = record(lambda: build(StackConfig(storage="full"), zip=Path("/nowhere/app.zip")), preview=preview)
        assert stack.types[FUNCTION] == 4


def test_a_program_that_waits_for_ever_ends_with_a_timeout_and_others_can_run_after_it(monkeypatch):
    monkeypatch.setattr(recorder, "LIMIT_S", 0.2)

    def program():
        return {
            "never": pulumi.Output.from_input(pulumi.Output.all().apply(lambda _: __import__("asyncio").Event().wait()))
        }

    with pytest.raises(TimeoutError):
        record(program)
    assert record(lambda: {"answer": 42}).outputs == {"answer": 42}


def test_a_failure_of_the_program_fails_the_run():
    def program():
        raise LookupError("planted")

    with pytest.raises(LookupError, match="planted"):
        record(program)


def test_a_transform_changes_the_resources_of_its_component():
    def larger(resource):
        if resource.type_ == "aws:s3/bucket:Bucket":
            return ResourceTransformationResult({**resource.props, "bucket_prefix": "mine-"}, resource.opts)
        return None

    stack = record(lambda: build(StackConfig(), zip=Path("app.zip"), transforms={"DataBucket": larger}))
    assert stack.one(BUCKET).inputs["bucketPrefix"] == "mine-"
    assert stack.one(BUCKET).inputs["tags"] == {"crudstack:stage": "dev"}


def test_the_zip_has_the_drivers_that_the_kinds_need(monkeypatch):
    asked = []

    def pretended(out, *, requirements):
        asked.append((out.name, [path.name for path in requirements]))
        assert all(path.exists() for path in requirements)
        return artifact.Artifact(out, "00ff", 1, 1, {})

    monkeypatch.setattr(artifact, "build", pretended)
    for kind in ("s3-sqlite", "postgres-s3", "full"):
        package(StackConfig(storage=kind))
    assert asked == [
        ("lambda.zip", ["app.txt"]),
        ("lambda-postgres.zip", ["app.txt", "app-postgres.txt"]),
        (
            "lambda-amqp-postgres-redis.zip",
            ["app.txt", *(f"app-{extra}.txt" for extra in ("amqp", "postgres", "redis"))],
        ),
    ]


MAIN = ROOT / "infra/__main__.py"


def run_main(monkeypatch, directory, config, state="{}"):
    """Run the program as Pulumi does. `state`: what `pulumi stack export` prints. The developer's CLI is not called."""
    cli = directory / "pulumi"
    cli.write_text(f"#!/bin/sh\ncat <<'STATE'\n{state}\nSTATE\n")
    cli.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(artifact, "build", lambda out, **_: artifact.Artifact(out, "00ff", 1, 1, {}))
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    monkeypatch.setattr(sys, "path", list(sys.path))
    program = compile(MAIN.read_text(), str(MAIN), "exec")

    def run():
        exec(program, {"__name__": "__main__", "__file__": str(MAIN)})  # noqa: S102 - as Pulumi does
        return {}

    return record(run)


@pytest.fixture
def ended(monkeypatch):
    """The errors that the engine was told, and what was registered before."""
    said, registered, register = [], [], recorder.Monitor.RegisterResource
    monkeypatch.setattr(pulumi.log, "error", said.append)
    monkeypatch.setattr(
        recorder.Monitor,
        "RegisterResource",
        lambda self, request: (registered.append(request.type), register(self, request))[1],
    )
    return said, registered


def test_the_program_reads_its_config_and_exports_what_the_app_reads(monkeypatch, tmp_path):
    stack = run_main(
        monkeypatch,
        tmp_path,
        {"aws:region": "eu-central-1", "crudstack:storage": "cached-s3", "crudstack:memory_mb": "1024"},
    )
    assert stack.one(FUNCTION).inputs["memorySize"] == 1024
    assert stack.outputs.keys() == {
        *(
            "version",
            "storage",
            "storage_overrides",
            "stage",
            "cors",
            "region",
            "api_url",
            "function_name",
            "bucket",
            "prefix",
            "auth",
        ),
    }


def test_a_wrong_key_ends_the_program_with_one_sentence_before_anything_is_registered(monkeypatch, tmp_path, ended):
    said, registered = ended
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, tmp_path, {"crudstack:memory": "1024"})
    # Pulumi's language hosts take 32 for: the error was shown. After any other code they add a line of their own.
    assert end.value.code == 32
    (error,) = said
    assert error.startswith("crudstack:memory is no setting; there are storage, ")
    assert "\n" not in error
    assert registered == ["pulumi:pulumi:Stack"]


def test_an_update_that_would_delete_what_is_protected_ends_before_anything_is_registered(monkeypatch, tmp_path, ended):
    said, registered = ended
    api = {"urn": "urn:pulumi:test::crudstack::aws:apigatewayv2/api:Api::crudstack-prod-api", "protect": True}
    state = {"deployment": {"resources": [{**api, "type": "aws:apigatewayv2/api:Api"}]}}
    with pytest.raises(SystemExit) as end:
        run_main(
            monkeypatch, tmp_path, {"crudstack:stage": "prod", "crudstack:edge": "function-url"}, json.dumps(state)
        )
    assert end.value.code == 32
    (error,) = said
    assert error.startswith("crudstack:edge is function-url: ")
    assert f"pulumi state unprotect '{api['urn']}' --stack test`" in error
    assert registered == ["pulumi:pulumi:Stack"]


def test_a_missing_package_ends_the_program_with_the_command_that_installs_it():
    without = "import runpy, sys; sys.modules['pulumi_aws'] = None; runpy.run_path('.', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without], cwd=MAIN.parent, capture_output=True, text=True, check=False)
    said = f"error: pulumi_aws cannot be imported by {sys.executable}: run `make setup-infra`, then this again\n"
    assert (done.returncode, done.stdout, done.stderr) == (32, "", said)


def test_the_program_finds_this_checkout_even_where_it_is_not_installed(tmp_path):
    """Pulumi runs the directory as a script, in that directory."""
    shown = "import runpy, sys; runpy.run_path('.', run_name='other')"
    copy_ = tmp_path / "checkout"
    for name in ("app", "infra"):
        (copy_ / name).mkdir(parents=True)
    (copy_ / "infra/__main__.py").write_text(MAIN.read_text())
    (copy_ / "app/__init__.py").write_text("import sys; print('found', __file__); sys.exit(7)")
    done = subprocess.run(
        [sys.executable, "-c", shown], cwd=copy_ / "infra", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, f"found {copy_ / 'app/__init__.py'}\n")
