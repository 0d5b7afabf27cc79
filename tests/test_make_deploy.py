"""`make deploy`: what it says is missing, what it asks, and that nothing is changed before the answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import boto3
import pytest
import yaml
from botocore.stub import Stubber

from app.autocrud.errors import ConfigError
from app.settings import parse_outputs
from infra import deploy
from infra.artifact import ROOT
from infra.config import read
from tests.aws_signer_double import SignerDouble
from tests.fake_pulumi import FakePulumi

PASSPHRASE, TOKEN = "a passphrase of the tests", "the-token"
OUTPUTS: dict[str, Any] = {
    "version": 1,
    "storage": "s3-sqlite",
    "storage_overrides": {},
    "stage": "dev",
    "bucket": "data-1",
    "region": "eu-central-1",
    "api_url": "https://x.example.com",
    "function_name": "crudstack-dev-api",
    "auth": {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()},
}
WITH_DATABASE = read({"storage": "postgres-s3"})


class Place:
    """A directory with Pulumi.yaml, and the environment of somebody who has done everything but to log in."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        self.directory = directory / "clone"
        self.directory.mkdir()
        shutil.copy(ROOT / "Pulumi.yaml", self.directory)
        self.pulumi = FakePulumi(directory / "bin")
        self.pulumi.will_output(OUTPUTS)
        home = directory / "home"
        home.mkdir()
        self.environment = {
            "HOME": str(home),
            # Lambda's Python, which the zip is compiled by, is found where it is found without this test.
            "PATH": os.pathsep.join([str(self.pulumi.directory), os.environ["PATH"]]),
            "PYENV_ROOT": os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv"),
            "PYTHONPATH": str(ROOT),
            "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
            "AWS_REGION": "eu-central-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "infra.deploy", *(arguments or ("--stage", "dev"))]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Without a terminal."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def refused(self, *arguments: str) -> str:
        """The one sentence that it ends with."""
        done = self.run(*(arguments or ("--stage", "dev", "--yes")))
        assert done.returncode == 2, done.stdout + done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("deploy: ")
        assert "Traceback" not in done.stderr
        assert PASSPHRASE not in done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return last.removeprefix("deploy: ")

    def typed(self, *arguments: str, answers: tuple[str, ...] = (), interrupt: bool = False) -> Typed:
        """On a terminal, with an answer to each question."""
        main, side = pty.openpty()
        running = subprocess.Popen(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        shown, left = "", list(answers)
        end, interrupted = time.monotonic() + 120, 0.0
        try:
            while time.monotonic() < end:
                if not select.select([main], [], [], 0.1)[0]:
                    # Between showing a question and reading the answer, Python loses a signal. A person presses again.
                    if interrupted and time.monotonic() > interrupted + 5:
                        os.killpg(running.pid, signal.SIGINT)
                        interrupted = time.monotonic()
                    continue
                try:
                    read = os.read(main, 4096)
                except OSError:  # Linux's way of saying that the other side is closed
                    break
                if not read:
                    break
                shown += read.decode()
                if re.search(r"(\] |eu-central-1: )$", shown):
                    if left:
                        os.write(main, f"{left.pop(0)}\n".encode())
                    elif interrupt:
                        os.killpg(running.pid, signal.SIGINT)
                        interrupted, interrupt = time.monotonic(), False
            return Typed(running.wait(10), shown.replace("\r\n", "\n"))
        finally:
            running.kill()
            running.wait()
            os.close(main)

    def stack_file(self, name: str = "dev") -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.directory / f"Pulumi.{name}.yaml").read_text())
        return content

    def write(self, name: str = "dev", **content: Any) -> None:
        (self.directory / f"Pulumi.{name}.yaml").write_text(yaml.safe_dump(content))

    def rename(self, name: str) -> None:
        """Give the project another name."""
        file = self.directory / "Pulumi.yaml"
        text = file.read_text()
        assert text.startswith("name: crudstack\n")
        file.write_text(text.replace("name: crudstack\n", f"name: {name}\n", 1))

    def changed(self) -> list[str]:
        """The commands that may have changed something on AWS."""
        return [command for command in self.pulumi.asked() if command.startswith(("up", "destroy", "refresh"))]


class Typed(NamedTuple):
    code: int
    shown: str


@pytest.fixture
def place(tmp_path, ministack_s3) -> Place:
    return Place(tmp_path, ministack_s3.url)


# All of it


def test_without_questions_it_goes_from_nothing_to_a_url(place):
    done = place.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert place.pulumi.state["stacks"]["dev"]["outputs"] == OUTPUTS
    assert place.stack_file()["config"] == {"aws:region": "eu-central-1", "crudstack:stage": "dev"}
    shown = done.stdout
    assert "AWS account 000000000000, region eu-central-1" in shown
    assert "Logged in. The state of stacks is on this machine" in shown
    assert shown.index("Previewing") < shown.index("Estimated cost") < shown.index("Updating")
    assert shown.index("Updating") < shown.index("The API is at https://x.example.com")
    header = '-H "Authorization: Bearer $(.venv/bin/crudstack token show --stack dev)"'
    assert shown.splitlines()[-1] == f'curl -s "https://x.example.com/readyz" {header}'
    assert TOKEN not in shown + done.stderr
    assert PASSPHRASE not in shown + done.stderr


def test_it_can_be_run_again(place):
    for _ in range(2):
        done = place.run("--stage", "dev", "--yes")
        assert done.returncode == 0, done.stderr
    asked = place.pulumi.asked()
    assert [asked.count(command) for command in ("login --local", "stack init dev")] == [1, 1]
    assert asked.count("up --yes --skip-preview --stack dev") == 2
    assert len([command for command in asked if command.startswith("config set")]) == 2


def test_on_a_terminal_it_asks_before_anything_is_billed(place):
    done = place.typed(answers=("", "y"))
    assert done.code == 0, done.shown
    assert "Pulumi is not logged in. Keep the state of stacks on this machine, below ~/.pulumi? [Y/n]" in done.shown
    assert "Make these changes in the account 000000000000, eu-central-1? AWS bills" in done.shown
    assert place.changed() == ["up --yes --skip-preview --stack dev"]


@pytest.mark.parametrize("answer", ["", "n", "no", "what?", "\x04"])
def test_all_but_a_yes_changes_nothing(place, answer):
    done = place.typed(answers=("y", answer))
    assert done.code == 2, done.shown
    assert done.shown.splitlines()[-1] == "deploy: declined: nothing was changed on AWS"
    assert place.changed() == []


def test_ctrl_c_at_the_question_ends_it_in_one_line(place):
    done = place.typed(answers=("y",), interrupt=True)
    assert done.code == 130, done.shown
    assert done.shown.splitlines()[-1] == "deploy: stopped"
    assert "Traceback" not in done.shown
    assert place.changed() == []


def test_without_a_terminal_it_does_not_go_on(place):
    said = place.refused("--stage", "dev")
    assert said.startswith("there is no terminal to ask for confirmation: run it in one, or say YES=1")
    assert place.pulumi.asked() == []


def test_the_cost_is_that_of_the_stack_s_config(place):
    shown = place.run("--stage", "dev", "--yes").stdout
    place.write("full", config={"crudstack:storage": "postgres-s3", "crudstack:postgres": {"proxy": True}})
    more = place.run("--stage", "dev", "--stack", "full", "--yes").stdout
    found = [re.search(r"whole stack: ([\d.]+) USD a month idle, ([\d.]+) USD", each) for each in (shown, more)]
    assert float(found[0][1]) < 2
    assert float(found[1][1]) > 20
    assert float(found[0][1]) < float(found[0][2])


def test_a_cost_that_nobody_knows_is_said_to_be_unknown(place):
    place.write(
        config={"crudstack:storage": "postgres-s3", "crudstack:postgres": {"class": "db.m7g.large", "proxy": True}}
    )
    done = place.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Estimated cost: unknown, because docs/costs.md has no price of db.m7g.large" in done.stdout


def test_prod_says_what_it_means(place):
    done = place.run("--stage", "prod", "--yes")
    assert done.returncode == 0, done.stderr
    assert place.stack_file("prod")["config"]["crudstack:stage"] == "prod"
    assert "The stage prod protects its data" in done.stdout
    assert "The stage prod" not in place.run("--stage", "dev", "--yes").stdout


@pytest.mark.parametrize(
    ("auth", "header"),
    [
        ({"mode": "none"}, ""),
        ({"mode": "jwt", "issuer": "https://i.example", "audiences": ["a"]}, ' -H "Authorization: Bearer $JWT"'),
    ],
)
def test_the_command_signs_in_as_the_stack_wants(place, auth, header):
    place.pulumi.will_output({**OUTPUTS, "auth": auth})
    shown = place.run("--stage", "dev", "--yes").stdout
    assert shown.splitlines()[-1] == f'curl -s "https://x.example.com/readyz"{header}'
    assert ("JSON Web Token of https://i.example" in shown) == (auth["mode"] == "jwt")


# What is missing


def test_the_stage_is_checked_first(place):
    assert place.refused("--stage", "production", "--yes").startswith("STAGE is 'production': expected dev")
    assert place.pulumi.asked() == []


def test_it_is_run_in_the_clone(place):
    (place.directory / "Pulumi.yaml").unlink()
    assert "there is no Pulumi.yaml in" in place.refused()


def test_pulumi_is_not_installed(place):
    place.environment["PATH"] = "/usr/bin:/bin"
    said = place.refused()
    assert said.startswith("pulumi is not on PATH: install it by `curl -fsSL https://get.pulumi.com | sh`")
    assert "brew install pulumi/tap/pulumi" in said
    assert "winget install pulumi" in said


def test_pulumi_is_installed_and_the_shell_is_older(place):
    place.environment["PATH"] = "/usr/bin:/bin"
    installed = Path(place.environment["HOME"], ".pulumi/bin")
    installed.mkdir(parents=True)
    (installed / "pulumi").touch()
    assert f'open a new shell, or `export PATH="{installed}:$PATH"`' in place.refused()


@pytest.mark.parametrize("version", ["v3.273.9", "v2.300.0"])
def test_pulumi_is_too_old(place, version):
    place.pulumi.state = {**place.pulumi.state, "version": version}
    assert f"version {version[1:]}, expected 3.274.0 or later" in place.refused()


@pytest.mark.parametrize("version", ["v3.274.0", "v3.1000.0", "v3.277.0-alpha.x1"])
def test_newer_ones_are_taken(place, version):
    place.pulumi.state = {**place.pulumi.state, "version": version}
    assert place.run("--stage", "dev", "--yes").returncode == 0


def test_a_login_that_failed_is_not_replaced_by_another(place):
    program = (place.pulumi.directory / "pulumi").read_text()
    broken = program.replace('case ["whoami"]:', 'case ["whoami"]:\n        fail("unable to open state directory")')
    (place.pulumi.directory / "pulumi").write_text(broken)
    assert "cannot reach the backend: error: unable to open state directory" in place.refused()
    assert "login --local" not in place.pulumi.asked()


def test_a_person_may_want_another_login(place):
    done = place.typed(answers=("n",))
    assert done.code == 2
    assert "run `pulumi login s3://BUCKET`, or `pulumi login` for Pulumi Cloud" in done.shown
    assert "login --local" not in place.pulumi.asked()


def test_there_is_no_passphrase(place):
    del place.environment["PULUMI_CONFIG_PASSPHRASE"]
    said = place.refused()
    assert "`export PULUMI_CONFIG_PASSPHRASE='...'` with one of your own, which you keep" in said
    place.write(encryptionsalt="v1:x")
    assert "with the one of Pulumi.dev.yaml" in place.refused()
    assert "stack init dev" not in place.pulumi.asked()


def test_the_passphrase_may_be_in_a_file(place):
    del place.environment["PULUMI_CONFIG_PASSPHRASE"]
    file = place.directory / "passphrase"
    place.environment["PULUMI_CONFIG_PASSPHRASE_FILE"] = str(file)
    assert f"names {file}, which cannot be read: No such file" in place.refused()
    file.write_text(PASSPHRASE)
    assert place.run("--stage", "dev", "--yes").returncode == 0


@pytest.mark.parametrize(
    ("backend", "content"),
    [
        ("https://api.pulumi.com", {}),
        ("s3://state", {"secretsprovider": "awskms://alias/x"}),
    ],
)
def test_no_passphrase_is_needed_where_pulumi_needs_none(place, backend, content):
    del place.environment["PULUMI_CONFIG_PASSPHRASE"]
    place.environment["PULUMI_BACKEND_URL"] = backend
    place.write(**content)
    # The program here knows passphrases only, so it is the one to complain.
    assert "`pulumi stack select dev` failed: error: could not create secrets manager" in place.refused()


def test_the_passphrase_is_another_one(place):
    assert place.run("--stage", "dev", "--yes").returncode == 0
    state = place.pulumi.state
    place.pulumi.state = {**state, "stacks": {}, "selected": None}  # removed with --preserve-config
    place.environment["PULUMI_CONFIG_PASSPHRASE"] = "another passphrase"  # noqa: S105
    said = place.refused()
    assert said.startswith("the passphrase is not the one that Pulumi.dev.yaml was made with")
    assert "delete the line encryptionsalt of Pulumi.dev.yaml" in said
    assert "another passphrase" not in said


def test_there_are_no_credentials(place):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del place.environment[name]
    said = place.refused()
    assert said.startswith("there are no AWS credentials (Unable to locate credentials): run `aws configure`")
    assert "stack init dev" not in place.pulumi.asked()


def test_the_profile_does_not_exist(place):
    place.environment["AWS_PROFILE"] = "nobody"
    assert "there are no AWS credentials (The config profile (nobody) could not be found)" in place.refused()
    place.environment.pop("AWS_REGION")
    assert "there are no AWS credentials (The config profile (nobody) could not be found)" in place.refused()


def test_aws_cannot_be_reached(place):
    place.environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    assert place.refused().startswith("AWS cannot be reached in the region eu-central-1: check the network")


def test_the_region_is_that_of_the_stack_or_else_of_the_environment(place):
    place.write(config={"aws:region": "eu-west-1"})
    assert "region eu-west-1" in place.run("--stage", "dev", "--yes").stdout
    assert place.stack_file()["config"]["aws:region"] == "eu-west-1"
    del place.environment["AWS_REGION"]
    place.environment["AWS_DEFAULT_REGION"] = "eu-west-2"
    assert "region eu-west-2" in place.run("--stage", "pr-2", "--yes").stdout
    del place.environment["AWS_DEFAULT_REGION"]
    folder = Path(place.environment["HOME"], ".aws")
    folder.mkdir()
    (folder / "config").write_text(
        "[profile mine]\nregion = eu-west-3\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    place.environment["AWS_PROFILE"] = "mine"
    assert "region eu-west-3" in place.run("--stage", "pr-3", "--yes").stdout
    assert place.stack_file("pr-3")["config"]["aws:region"] == "eu-west-3"


def test_the_region_is_asked_for_if_nothing_says_it(place):
    del place.environment["AWS_REGION"]
    assert place.refused().startswith("no AWS region is set: `export AWS_REGION=eu-central-1`")
    assert "expected a name like eu-central-1" in place.typed(answers=("Frankfurt",)).shown
    done = place.typed(answers=("eu-south-1", "y"))
    assert done.code == 0, done.shown
    assert place.stack_file()["config"]["aws:region"] == "eu-south-1"


PROFILES = """
[profile work]
aws_access_key_id = work-key
aws_secret_access_key = secret
"""


@pytest.fixture
def signers(place):
    """What noted who signed; the environment has keys of another account."""
    (place.directory / "aws.ini").write_text(PROFILES)
    with SignerDouble() as double:
        place.environment |= {"AWS_ENDPOINT_URL": double.url, "AWS_CONFIG_FILE": str(place.directory / "aws.ini")}
        yield double.signers


def test_the_profile_of_the_stack_is_who_deploys(place, signers):
    place.write(config={"aws:profile": "work"})
    done = place.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert "AWS account 111111111111" in done.stdout
    assert set(signers) == {("sts", "work-key")}


def test_the_profile_may_be_in_pulumi_yaml(place, signers):
    with (place.directory / "Pulumi.yaml").open("a") as file:
        file.write("  aws:profile:\n    value: work\n")
    done = place.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert set(signers) == {("sts", "work-key")}


def test_another_profile_is_refused_before_aws_is_asked(place, signers):
    place.write(config={"aws:profile": "work"})
    place.environment["AWS_PROFILE"] = "other"
    assert place.refused().startswith(
        "AWS_PROFILE is other, and aws:profile in the stack's config is work: expected one"
    )
    place.write(config={"aws:profile": "other"})
    assert (
        "is other, expected a profile in ~/.aws/config or ~/.aws/credentials, where there are work" in place.refused()
    )
    assert (signers, place.changed()) == ([], [])


def test_a_stage_never_changes(place):
    assert place.run("--stage", "dev", "--yes").returncode == 0
    said = place.refused("--stage", "prod", "--stack", "dev", "--yes")
    assert said.startswith("the stack dev has the stage dev, expected prod: a stage never changes")
    assert len(place.changed()) == 1
    # Also if its file has been lost, or never said it.
    (place.directory / "Pulumi.dev.yaml").unlink()
    assert "has the stage dev, expected prod" in place.refused("--stage", "prod", "--stack", "dev", "--yes")


def test_the_config_is_checked_before_the_preview(place):
    place.write(config={"crudstack:storage": "postgress"})
    assert place.refused().startswith('crudstack:storage is "postgress": expected s3-sqlite')
    assert "preview --stack dev" not in place.pulumi.asked()


def test_a_project_of_another_name_has_keys_of_that_name(place):
    place.rename("myproject")
    place.write(config={"storage": "s3-sqlite", "myproject:log_days": 7})
    for _ in range(2):
        done = place.run("--stage", "prod", "--stack", "dev", "--yes")
        assert done.returncode == 0, done.stderr
        assert place.stack_file()["config"]["myproject:stage"] == "prod"
    assert not [key for key in place.stack_file()["config"] if key.startswith("crudstack:")]


def test_a_stage_without_a_namespace_is_the_project_s(place):
    place.write("prod", config={"stage": "prod", "log_days": 90})
    assert place.refused("--stage", "dev", "--stack", "prod", "--yes").startswith("the stack prod has the stage prod")
    done = place.run("--stage", "prod", "--yes")
    assert done.returncode == 0, done.stderr
    assert [command for command in place.pulumi.asked() if command.startswith("config set")] == [
        "config set aws:region eu-central-1 --stack prod"
    ]


def test_a_key_of_another_project_is_refused_before_anything_is_set(place):
    place.rename("myproject")
    place.write("prod", config={"crudstack:stage": "prod"})
    said = place.refused("--stage", "prod", "--yes")
    assert said.startswith("crudstack:stage is set, but the `name` in Pulumi.yaml is myproject")
    assert "`pulumi config set --stack prod --plaintext myproject:stage prod && pulumi config rm --stack prod" in said
    assert place.stack_file("prod")["config"] == {"crudstack:stage": "prod"}
    assert place.changed() == []


def test_a_deployed_stack_keeps_its_stage_if_a_key_of_another_project_is_moved(place):
    place.pulumi.will_output(OUTPUTS)
    assert place.run("--stage", "dev", "--yes").returncode == 0
    place.rename("myproject")
    place.write(config={"aws:region": "eu-central-1", "crudstack:stage": "prod"})
    said = place.refused("--stage", "prod", "--stack", "dev", "--yes")
    assert "this stack was deployed with the stage dev" in said
    assert "`pulumi config rm --stack dev crudstack:stage`" in said


def test_a_secret_is_refused_before_anything_is_set(place):
    place.write(config={"crudstack:stage": {"secure": "v1:abc"}})
    said = place.refused()
    assert said.startswith("crudstack:stage is set as a secret, expected plain text")
    assert "pulumi config set-all --stack dev --json " in said
    assert "$(pulumi config get --stack dev crudstack:stage --json" in said
    assert place.changed() == []


@pytest.mark.parametrize("text", ["config: [", "- a list", "config: text"])
def test_the_stack_s_file_cannot_be_read(place, text):
    (place.directory / "Pulumi.dev.yaml").write_text(text)
    assert re.match(r"Pulumi\.dev\.yaml (cannot be read|is not a stack's config): ", place.refused())


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ("preview", "`pulumi preview` failed, as it says above; nothing was changed"),
        ("up", "solve that and run `make deploy STAGE=dev STACK=mine` again, it goes on from there"),
    ],
)
def test_pulumi_failed(place, operation, says):
    place.pulumi.fails(operation)
    assert says in place.refused("--stage", "dev", "--stack", "mine", "--yes")


# The reservation of a database's function


def deploy_to(*, free: int | None, reserved: int | None = None) -> None:
    """Check the quota before, and the reservation after the update of a stack with a database. Lambda answers so."""
    client = boto3.client(
        "lambda",
        region_name="eu-central-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",  # noqa: S106
    )
    stub = Stubber(client)
    if free is None:
        stub.add_client_error("get_account_settings", "AccessDeniedException", "no")
    else:
        stub.add_response("get_account_settings", {"AccountLimit": {"UnreservedConcurrentExecutions": free}})
    answer = {} if reserved is None else {"ReservedConcurrentExecutions": reserved}
    stub.add_response("get_function_concurrency", answer, {"FunctionName": OUTPUTS["function_name"]})
    aws = deploy.Aws(SimpleNamespace(client=lambda _: client), "1", "eu-central-1")
    with stub:
        deploy.check_quota(aws, WITH_DATABASE, None)
        deploy.check_reservation(aws, WITH_DATABASE, parse_outputs(json.dumps(OUTPUTS), "OUTPUTS"))
        stub.assert_no_pending_responses()


def test_a_quota_that_is_large_enough_is_taken():
    deploy_to(free=135, reserved=35)


def test_a_quota_that_is_too_small_ends_it_before_anything_is_made():
    with pytest.raises(ConfigError, match=r"has 134 unreserved concurrent executions of Lambda, expected 135: request"):
        deploy_to(free=134)


def test_a_quota_that_may_not_be_read_is_said_to_be_unchecked(capsys):
    deploy_to(free=None, reserved=35)
    assert "Not checked: the account's quota of concurrent executions (AccessDenied" in capsys.readouterr().out


@pytest.mark.parametrize(("reserved", "said"), [(None, "no"), (10, "10")])
def test_a_reservation_that_was_lost_is_told(reserved, said):
    with pytest.raises(ConfigError, match=f"crudstack-dev-api reserves {said} concurrent executions, expected 35"):
        deploy_to(free=1000, reserved=reserved)


def test_lambda_is_not_asked_about_a_stack_that_reserves_nothing():
    asks_nothing = deploy.Aws(None, "1", "eu-central-1")
    deploy.check_quota(asks_nothing, read({}), "crudstack-dev-api")
    deploy.check_reservation(asks_nothing, read({}), parse_outputs(json.dumps(OUTPUTS), "OUTPUTS"))


@pytest.mark.parametrize(("free", "held", "fits"), [(100, 35, True), (110, 20, False), (134, None, False)])
def test_the_reservation_that_a_function_has_counts_as_free(free, held, fits):
    """An update that adds a database, or a larger one, is checked too."""
    client = boto3.client("lambda", region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="x")  # noqa: S106
    stub = Stubber(client)
    limit = {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": free}
    stub.add_response("get_account_settings", {"AccountLimit": limit}, {})
    held_now = {} if held is None else {"ReservedConcurrentExecutions": held}
    stub.add_response("get_function_concurrency", held_now, {"FunctionName": "crudstack-dev-api"})
    aws = deploy.Aws(SimpleNamespace(client=lambda _: client), "1", "eu-central-1")
    with stub, contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="unreserved"):
        deploy.check_quota(aws, WITH_DATABASE, "crudstack-dev-api")
