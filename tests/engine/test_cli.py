"""Runs `pulumi` commands as a person types them, in a copy of the project, with the oldest and the newest CLI."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from infra.artifact import ROOT
from infra.config import StackConfig
from tests.engine.checkout import Checkout, end_group
from tests.engine.engine import Engine, install_plugin
from tests.engine.provider import VERSION
from tests.engine.test_failures import find

SETUP = "pulumi stack init dev && pulumi config set aws:region eu-central-1"


@pytest.fixture(params=["newest", "oldest"])
def checkout(request, tmp_path) -> Checkout:
    """Return a project without a stack, with each CLI."""
    name = {"newest": "cli", "oldest": "oldest_cli"}[request.param]
    return Checkout(tmp_path, request.getfixturevalue(name))


@pytest.fixture
def newest(tmp_path, cli) -> Checkout:
    made = Checkout(tmp_path, cli)
    made.run(SETUP)
    return made


def test_preview_up_refresh_and_destroy(checkout):
    checkout.run(SETUP)
    assert "+ 34 to create" in checkout.run("pulumi preview")
    assert "+ 34 created" in checkout.run("pulumi up --yes")
    checkout.run("pulumi up --yes --expect-no-changes")
    checkout.run("pulumi refresh --yes --expect-no-changes")
    checkout.run("pulumi up --yes --refresh --expect-no-changes")
    printed = json.loads(checkout.run(".venv/bin/crudstack outputs --stack dev"))
    assert printed["bucket"] in checkout.account.all("aws:s3/bucket:Bucket")
    assert "- 34 deleted" in checkout.run("pulumi destroy --yes")
    assert checkout.account.all() == {}
    checkout.run("pulumi stack rm dev --yes")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("pulumi config set storage memory", 'crudstack:storage is "memory": on AWS it would lose data with the'),
        ("pulumi config set memory_mb much", "configuration key 'memory_mb' must be of type 'integer'"),
        ("pulumi config set storag s3-sqlite", "crudstack:storag is no setting; there are storage, "),
        ("pulumi config set --path 'postgres.clas' x", "Object contains unknown field `clas`"),
    ],
)
def test_a_config_error_is_one_line(newest, command, sentence):
    newest.run(command)
    said = newest.run("pulumi preview --color never", code=1)
    errors = {line.partition("error: ")[2] for line in said.splitlines() if "error: " in line}
    assert len(errors) == 1, said
    assert sentence in errors.pop()
    assert "unhandled" not in said
    assert "Traceback" not in said
    assert newest.account.all() == {}


LEFTOVERS = """
  crudstack:stage: prod
  crudstack:alarm_email: null
  crudstack:storage: {meta: s3-sqlite, resource: s3}
  crudstack:cors: ["https://www.example.org"]
  crudstack:log_days: 90
  crudstack:tags: {team: blue and green}
  crudstack:storag: s3-sqlite
  old:memory_mb: 1024
  pulumi:tags: {owner: me}
"""


def rename(checkout, name="myproject"):
    file = checkout.path / "Pulumi.yaml"
    file.write_text(file.read_text().replace("name: crudstack\n", f"name: {name}\n", 1))


def error_of(said):
    """Return the only error of an operation."""
    errors = {line.partition("error: ")[2] for line in said.splitlines() if "error: " in line}
    assert len(errors) == 1, said
    return errors.pop()


def command_of(said):
    """Return the command that an error says to run."""
    (command,) = re.findall(r"run `(pulumi .*?)`, (?:then|which)", error_of(said))
    return command


def test_a_renamed_project_refuses_the_keys_of_its_old_name_until_the_command_has_moved_them(checkout):
    """The command of the error is run in a shell without any change."""
    rename(checkout)
    checkout.run(SETUP)
    with (checkout.path / "Pulumi.dev.yaml").open("a") as file:
        file.write(LEFTOVERS.lstrip("\n"))
    checkout.run("pulumi config set --secret --path 'crudstack:auth.issuer' https://login.example.org")
    checkout.run("pulumi config set --path 'crudstack:auth.mode' jwt")
    checkout.run("pulumi config set --path 'crudstack:auth.audiences[0]' api")
    for operation in ("preview", "up --yes"):
        said = checkout.run(f"pulumi {operation} --color never", code=1)
        assert error_of(said).startswith("crudstack:alarm_email, crudstack:auth, crudstack:cors, crudstack:log_days, ")
        assert "login.example.org" not in said
    assert checkout.account.all() == {}
    checkout.run(command_of(said))
    content = yaml.safe_load((checkout.path / "Pulumi.dev.yaml").read_text())["config"]
    assert content == {
        "aws:region": "eu-central-1",
        "myproject:stage": "prod",
        "myproject:storage": {"meta": "s3-sqlite", "resource": "s3"},
        "myproject:cors": ["https://www.example.org"],
        "myproject:log_days": "90",
        "myproject:tags": {"team": "blue and green"},
        "myproject:memory_mb": "1024",
        "myproject:auth": {"mode": "jwt", "issuer": "https://login.example.org", "audiences": ["api"]},
        "pulumi:tags": {"owner": "me"},
    }
    assert 'bucket           : "crudstack-prod-data-' in checkout.run("pulumi preview --color never")


def test_the_command_that_moves_a_secret_never_loses_it(checkout):
    """The secret is kept if pulumi cannot decrypt it, and if the command is run twice."""
    rename(checkout)
    checkout.run(SETUP)
    checkout.run(
        "pulumi config set --secret crudstack:alarm_email a@example.org && pulumi config set crudstack:log_days 7"
    )
    command = command_of(checkout.run("pulumi preview --color never", code=1))
    file = checkout.path / "Pulumi.dev.yaml"
    before = file.read_text()
    checkout.run(f"export PULUMI_CONFIG_PASSPHRASE=wrong; {command}", code=1)
    assert file.read_text() == before
    checkout.run(command)
    moved = file.read_text()
    assert yaml.safe_load(moved)["config"] == {
        "aws:region": "eu-central-1",
        "myproject:alarm_email": "a@example.org",
        "myproject:log_days": "7",
    }
    checkout.run(command, code=1)
    assert file.read_text() == moved


def test_every_command_works_in_a_renamed_project(newest, ministack_s3):
    newest.run("pulumi config set log_days 7 && pulumi up --yes --skip-preview")
    newest.run("pulumi stack select dev && pulumi stack rename organization/myproject/dev")
    rename(newest)
    newest.run("pulumi stack select dev")
    newest.run(command_of(newest.run("pulumi preview --color never", code=1)))
    newest.run("pulumi up --yes --skip-preview --expect-no-changes")
    before = json.loads(newest.run(".venv/bin/crudstack outputs"))
    said = newest.run("pulumi config set log_days 8 && pulumi preview --color never", code=1)
    assert error_of(said).startswith("myproject:log_days is 8: expected 1, 3, 5")
    # The new token is in the account of the tests' provider only, so ministack's Secrets Manager does not have it.
    newest.run("pulumi config set log_days 7")
    aws = {"AWS_ENDPOINT_URL": ministack_s3.url, "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}
    said = newest.run(".venv/bin/crudstack token rotate --yes", code=2, **aws)
    assert "myproject:token_generation is 2 now" in said
    assert "the API token cannot be read from Secrets Manager" in said
    after = json.loads(newest.run(".venv/bin/crudstack outputs --stack dev"))
    assert after["auth"]["token_sha256"] != before["auth"]["token_sha256"]
    assert newest.run("pulumi config get token_generation").strip() == "2"
    newest.run("pulumi destroy --yes")
    assert newest.account.all() == {}


def test_a_rotation_fails_if_the_program_makes_no_new_token(newest):
    """This happened in a renamed project, whose program read token_generation under another name."""
    file = newest.path / "infra/stack.py"
    text = file.read_text()
    assert "generation=config.token_generation" in text
    file.write_text(text.replace("generation=config.token_generation", "generation=1"))
    newest.run("pulumi up --yes --skip-preview")
    said = newest.run(".venv/bin/crudstack token rotate --yes", code=2)
    assert said.splitlines()[-1].startswith("crudstack: the API token is the same as before, and still valid")


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("log_days 90", "crudstack:log_days"),
        ("--path postgres.class db.t4g.small", "crudstack:postgres"),
        ("storage s3-sqlite", "crudstack:storage"),
    ],
)
def test_a_secret_is_refused_until_the_command_has_set_it_as_plain_text(checkout, setting, shown):
    checkout.run(f"{SETUP} && pulumi config set --secret {setting}")
    said = checkout.run("pulumi preview --color never", code=1)
    assert error_of(said).startswith(f"{shown} is set as a secret, expected plain text")
    checkout.run(command_of(said))
    assert "secure" not in (checkout.path / "Pulumi.dev.yaml").read_text()
    assert "+ 34 to create" in checkout.run("pulumi preview")


def test_a_region_with_one_zone_is_one_line_in_the_preview(newest):
    newest.faults.set(zones={"euc1-az1": "eu-central-1c"})
    newest.run("pulumi config set storage postgres-s3")
    for operation in ("preview", "up --yes --skip-preview"):
        error = error_of(newest.run(f"pulumi {operation} --color never", code=1))
        assert error.startswith("the region eu-central-1 shows 1 usable availability zone (eu-central-1c), expected 2")
    assert newest.account.all() == {}


def test_null_in_a_stack_file_is_null(newest):
    with (newest.path / "Pulumi.dev.yaml").open("a") as file:
        file.write("  crudstack:concurrency: null\n  crudstack:domain: null\n  crudstack:alarm_email: null\n")
    assert "+ 34 to create" in newest.run("pulumi preview")


def test_another_passphrase_is_refused_and_changes_nothing(newest):
    newest.run("pulumi up --yes --skip-preview")
    before = newest.account.all()
    said = newest.run("pulumi up --yes --skip-preview", code=1, PULUMI_CONFIG_PASSPHRASE="another one")  # noqa: S106
    assert "incorrect passphrase" in said
    assert newest.account.all() == before
    newest.run("pulumi up --yes --skip-preview --expect-no-changes")


def test_cancel_and_up_complete_a_killed_update(newest):
    newest.faults.set(latency_s=0.3)
    running = newest.start("exec pulumi up --yes --skip-preview --non-interactive")
    try:
        deadline = time.monotonic() + 60
        while not newest.account.all() and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = find("engine", running.pid)
        assert pid is not None
        os.kill(pid, 9)
        running.communicate(timeout=60)
    finally:
        end_group(running)
    newest.faults.clear()
    newest.mend_state()
    assert "the stack is currently locked" in newest.run("pulumi up --yes --skip-preview", code=1)
    newest.run("pulumi cancel --yes")
    newest.run("pulumi up --yes --skip-preview")
    newest.run("pulumi up --yes --skip-preview --expect-no-changes")


def test_a_damaged_file_beside_the_state_is_mended_as_documented(newest):
    newest.run("pulumi up --yes --skip-preview")
    (attributes,) = (newest.directory / "state").rglob("dev.json.attrs")
    attributes.write_text("")
    assert "failed to load checkpoint: EOF" in newest.run("pulumi up --yes --skip-preview", code=1)
    newest.mend_state()
    newest.run("pulumi up --yes --skip-preview --expect-no-changes")
    assert "`failed to load checkpoint: EOF`" in (ROOT / "docs/deploy.md").read_text()


def test_the_program_says_what_to_do_without_its_packages(newest, tmp_path):
    """The Python of the language host has Pulumi's SDK and none of the project's other packages."""
    bare = tmp_path / "bare"
    script = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; sys.argv = ['infra']\n"
    bare.write_text(
        f"{script}import types; pulumi = types.ModuleType('pulumi')\n"
        "pulumi.log = types.SimpleNamespace(error=print); sys.modules['pulumi'] = pulumi\n"
        "import runpy; runpy.run_path('infra', run_name='__main__')\n"
    )
    said = newest.run(f".venv/bin/python -S {bare}", code=32)
    assert re.search(r"\w+ cannot be imported by .*: run `make setup-infra`, then this again", said)
    assert len(said.strip().splitlines()) == 1


def test_the_program_refuses_to_delete_protected_resources_before_any_change(newest):
    newest.run("pulumi config set stage prod && pulumi up --yes --skip-preview")
    before = newest.account.all()
    newest.run("pulumi config set edge function-url")
    for flags in ("", "--skip-preview"):
        said = newest.run(f"pulumi up --yes --color never {flags}", code=1)
        assert "crudstack:edge is function-url" in said
        assert "pulumi state unprotect 'urn:pulumi:dev::crudstack::crudstack:aws:HttpApi$" in said
        assert newest.account.all() == before


# The user's own settings and files are not used or changed


def test_nothing_of_the_user_is_in_the_environment(tmp_path, cli, monkeypatch):
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_REGION", "PULUMI_ACCESS_TOKEN", "PULUMI_BACKEND_URL"):
        monkeypatch.setenv(name, "of-the-user")
    with Engine(tmp_path / "engine", cli) as engine, engine.environment():
        found = dict(os.environ)
    made = Checkout(tmp_path / "checkout", cli)
    for environment in (found, made.environment, _seen_by_program(made)):
        assert "of-the-user" not in environment.values()
        assert not [name for name in environment if name.startswith("AWS_")]
        for name in ("HOME", "PULUMI_HOME", "PULUMI_BACKEND_URL"):
            assert str(tmp_path) in environment[name]


def _seen_by_program(checkout: Checkout) -> dict[str, str]:
    """Return the environment of the program."""
    (checkout.path / "infra/__main__.py").write_text("import json, os\nprint('SEEN' + json.dumps(dict(os.environ)))\n")
    checkout.run(SETUP)
    (line,) = [line for line in checkout.run("pulumi preview").splitlines() if "SEEN{" in line][:1]
    environment: dict[str, str] = json.JSONDecoder().raw_decode(line.partition("SEEN")[2])[0]
    return environment


def test_nothing_is_installed_into_the_user_s_pulumi(tmp_path, cli, monkeypatch):
    """With a fake plugin there, real deployments would report success and create nothing."""
    users = tmp_path / "user"
    users.mkdir()
    # In some cases Pulumi takes the user's home from the user database and ignores HOME.
    real = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".pulumi"
    before = sorted(real.rglob("*"))
    monkeypatch.setenv("HOME", str(users))
    monkeypatch.delenv("PULUMI_HOME", raising=False)
    install_plugin(tmp_path / "engine")
    with Engine(tmp_path / "engine", cli) as engine:
        assert engine.stack("test", StackConfig()).up().error == ""
    Checkout(tmp_path / "checkout", cli).run(f"{SETUP} && pulumi up --yes")
    assert [path for path in users.rglob("*") if "pulumi" in str(path).lower()] == []
    assert sorted(real.rglob("*")) == before
    environment = {"PULUMI_HOME": str(users / ".pulumi"), "PATH": os.environ["PATH"]}
    plugins = subprocess.run(
        [cli, "plugin", "ls", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(plugins.stdout) == []


def test_the_provider_has_the_locked_version():
    assert f"pulumi-aws=={VERSION} " in (ROOT / "requirements/infra.txt").read_text()
    assert Path(ROOT / "tests/engine/pulumi-language-python-exec").exists()
