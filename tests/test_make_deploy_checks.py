"""`make deploy`: each missing or wrong precondition is reported in one sentence, and nothing is changed on AWS."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.aws_signer_double import SignerDouble
from tests.deploy_checkout import OUTPUTS, PASSPHRASE, Checkout


@pytest.fixture
def checkout(tmp_path, ministack_s3) -> Checkout:
    return Checkout(tmp_path, ministack_s3.url)


def test_the_stage_is_checked_first(checkout):
    assert checkout.refused("--stage", "production", "--yes").startswith("STAGE is 'production': expected dev")
    assert checkout.pulumi.asked() == []


def test_a_directory_without_pulumi_yaml_is_refused(checkout):
    (checkout.directory / "Pulumi.yaml").unlink()
    assert "there is no Pulumi.yaml in" in checkout.refused()


def test_pulumi_is_not_installed(checkout):
    checkout.environment["PATH"] = "/usr/bin:/bin"
    said = checkout.refused()
    assert said.startswith("pulumi is not on PATH: install it by `curl -fsSL https://get.pulumi.com | sh`")
    assert "brew install pulumi/tap/pulumi" in said
    assert "winget install pulumi" in said


def test_pulumi_is_installed_but_not_on_the_path_of_this_shell(checkout):
    checkout.environment["PATH"] = "/usr/bin:/bin"
    installed = Path(checkout.environment["HOME"], ".pulumi/bin")
    installed.mkdir(parents=True)
    (installed / "pulumi").touch()
    assert f'open a new shell, or `export PATH="{installed}:$PATH"`' in checkout.refused()


@pytest.mark.parametrize("version", ["v3.273.9", "v2.300.0"])
def test_pulumi_is_too_old(checkout, version):
    checkout.pulumi.state = {**checkout.pulumi.state, "version": version}
    assert f"version {version[1:]}, expected 3.274.0 or later" in checkout.refused()


@pytest.mark.parametrize("version", ["v3.274.0", "v3.1000.0", "v3.277.0-alpha.x1"])
def test_a_newer_pulumi_is_accepted(checkout, version):
    checkout.pulumi.state = {**checkout.pulumi.state, "version": version}
    assert checkout.run("--stage", "dev", "--yes").returncode == 0


def test_a_login_that_failed_is_not_replaced_by_another(checkout):
    program = (checkout.pulumi.directory / "pulumi").read_text()
    broken = program.replace('case ["whoami"]:', 'case ["whoami"]:\n        fail("unable to open state directory")')
    (checkout.pulumi.directory / "pulumi").write_text(broken)
    assert "cannot reach the backend: error: unable to open state directory" in checkout.refused()
    assert "login --local" not in checkout.pulumi.asked()


def test_a_user_may_choose_another_login(checkout):
    done = checkout.typed(answers=("n",))
    assert done.code == 2
    assert "run `pulumi login s3://BUCKET`, or `pulumi login` for Pulumi Cloud" in done.shown
    assert "login --local" not in checkout.pulumi.asked()


def test_there_is_no_passphrase(checkout):
    del checkout.environment["PULUMI_CONFIG_PASSPHRASE"]
    said = checkout.refused()
    assert "`export PULUMI_CONFIG_PASSPHRASE='...'` with one of your own, which you keep" in said
    checkout.write(encryptionsalt="v1:x")
    assert "with the one of Pulumi.dev.yaml" in checkout.refused()
    assert "stack init dev" not in checkout.pulumi.asked()


def test_the_passphrase_may_be_in_a_file(checkout):
    del checkout.environment["PULUMI_CONFIG_PASSPHRASE"]
    file = checkout.directory / "passphrase"
    checkout.environment["PULUMI_CONFIG_PASSPHRASE_FILE"] = str(file)
    assert f"names {file}, which cannot be read: No such file" in checkout.refused()
    file.write_text(PASSPHRASE)
    assert checkout.run("--stage", "dev", "--yes").returncode == 0


@pytest.mark.parametrize(
    ("backend", "content"),
    [
        ("https://api.pulumi.com", {}),
        ("s3://state", {"secretsprovider": "awskms://alias/x"}),
    ],
)
def test_no_passphrase_is_needed_if_pulumi_needs_none(checkout, backend, content):
    del checkout.environment["PULUMI_CONFIG_PASSPHRASE"]
    checkout.environment["PULUMI_BACKEND_URL"] = backend
    checkout.write(**content)
    # The stand-in for Pulumi supports only passphrases, so this error is its own.
    assert "`pulumi stack select dev` failed: error: could not create secrets manager" in checkout.refused()


def test_the_passphrase_is_wrong(checkout):
    assert checkout.run("--stage", "dev", "--yes").returncode == 0
    state = checkout.pulumi.state
    checkout.pulumi.state = {**state, "stacks": {}, "selected": None}  # removed with --preserve-config
    checkout.environment["PULUMI_CONFIG_PASSPHRASE"] = "another passphrase"  # noqa: S105
    said = checkout.refused()
    assert said.startswith("the passphrase is not the one that Pulumi.dev.yaml was made with")
    assert "delete the line encryptionsalt of Pulumi.dev.yaml" in said
    assert "another passphrase" not in said


def test_there_are_no_credentials(checkout):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del checkout.environment[name]
    said = checkout.refused()
    assert said.startswith("there are no AWS credentials (Unable to locate credentials): run `aws configure`")
    assert "stack init dev" not in checkout.pulumi.asked()


def test_the_profile_does_not_exist(checkout):
    checkout.environment["AWS_PROFILE"] = "missing"
    assert "there are no AWS credentials (The config profile (missing) could not be found)" in checkout.refused()
    checkout.environment.pop("AWS_REGION")
    assert "there are no AWS credentials (The config profile (missing) could not be found)" in checkout.refused()


def test_aws_cannot_be_reached(checkout):
    checkout.environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    assert checkout.refused().startswith("AWS cannot be reached in the region eu-central-1: check the network")


def test_the_region_comes_from_the_stack_or_else_from_the_environment(checkout):
    checkout.write(config={"aws:region": "eu-west-1"})
    assert "region eu-west-1" in checkout.run("--stage", "dev", "--yes").stdout
    assert checkout.stack_file()["config"]["aws:region"] == "eu-west-1"
    del checkout.environment["AWS_REGION"]
    checkout.environment["AWS_DEFAULT_REGION"] = "eu-west-2"
    assert "region eu-west-2" in checkout.run("--stage", "pr-2", "--yes").stdout
    del checkout.environment["AWS_DEFAULT_REGION"]
    folder = Path(checkout.environment["HOME"], ".aws")
    folder.mkdir()
    (folder / "config").write_text(
        "[profile mine]\nregion = eu-west-3\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    checkout.environment["AWS_PROFILE"] = "mine"
    assert "region eu-west-3" in checkout.run("--stage", "pr-3", "--yes").stdout
    assert checkout.stack_file("pr-3")["config"]["aws:region"] == "eu-west-3"


def test_the_region_is_asked_for_if_it_is_not_set(checkout):
    del checkout.environment["AWS_REGION"]
    assert checkout.refused().startswith("no AWS region is set: `export AWS_REGION=eu-central-1`")
    assert "expected a name like eu-central-1" in checkout.typed(answers=("Frankfurt",)).shown
    done = checkout.typed(answers=("eu-south-1", "y"))
    assert done.code == 0, done.shown
    assert checkout.stack_file()["config"]["aws:region"] == "eu-south-1"


PROFILES = """
[profile work]
aws_access_key_id = work-key
aws_secret_access_key = secret
"""


@pytest.fixture
def signers(checkout):
    """Record who signed each request to AWS. The environment has keys of another account."""
    (checkout.directory / "aws.ini").write_text(PROFILES)
    with SignerDouble() as double:
        checkout.environment |= {"AWS_ENDPOINT_URL": double.url, "AWS_CONFIG_FILE": str(checkout.directory / "aws.ini")}
        yield double.signers


def test_the_profile_of_the_stack_deploys(checkout, signers):
    checkout.write(config={"aws:profile": "work"})
    done = checkout.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert "AWS account 111111111111" in done.stdout
    assert set(signers) == {("sts", "work-key")}


def test_the_profile_may_be_in_pulumi_yaml(checkout, signers):
    with (checkout.directory / "Pulumi.yaml").open("a") as file:
        file.write("  aws:profile:\n    value: work\n")
    done = checkout.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert set(signers) == {("sts", "work-key")}


def test_another_profile_is_refused_before_aws_is_asked(checkout, signers):
    checkout.write(config={"aws:profile": "work"})
    checkout.environment["AWS_PROFILE"] = "other"
    assert checkout.refused().startswith(
        "AWS_PROFILE is other, and aws:profile in the stack's config is work: expected one"
    )
    checkout.write(config={"aws:profile": "other"})
    assert (
        "is other, expected a profile in ~/.aws/config or ~/.aws/credentials, where there are work"
        in checkout.refused()
    )
    assert (signers, checkout.changed()) == ([], [])


def test_a_stage_never_changes(checkout):
    assert checkout.run("--stage", "dev", "--yes").returncode == 0
    said = checkout.refused("--stage", "prod", "--stack", "dev", "--yes")
    assert said.startswith("the stack dev has the stage dev, expected prod: a stage never changes")
    assert len(checkout.changed()) == 1
    # The stage is also known if the file of the stack is missing or does not contain it.
    (checkout.directory / "Pulumi.dev.yaml").unlink()
    assert "has the stage dev, expected prod" in checkout.refused("--stage", "prod", "--stack", "dev", "--yes")


def test_the_config_is_checked_before_the_preview(checkout):
    checkout.write(config={"crudstack:storage": "postgress"})
    assert checkout.refused().startswith('crudstack:storage is "postgress": expected s3-sqlite')
    assert "preview --stack dev" not in checkout.pulumi.asked()


def test_a_project_of_another_name_has_keys_of_that_name(checkout):
    checkout.rename("myproject")
    checkout.write(config={"storage": "s3-sqlite", "myproject:log_days": 7})
    for _ in range(2):
        done = checkout.run("--stage", "prod", "--stack", "dev", "--yes")
        assert done.returncode == 0, done.stderr
        assert checkout.stack_file()["config"]["myproject:stage"] == "prod"
    assert not [key for key in checkout.stack_file()["config"] if key.startswith("crudstack:")]


def test_a_stage_without_a_namespace_belongs_to_the_project(checkout):
    checkout.write("prod", config={"stage": "prod", "log_days": 90})
    assert checkout.refused("--stage", "dev", "--stack", "prod", "--yes").startswith(
        "the stack prod has the stage prod"
    )
    done = checkout.run("--stage", "prod", "--yes")
    assert done.returncode == 0, done.stderr
    assert [command for command in checkout.pulumi.asked() if command.startswith("config set")] == [
        "config set aws:region eu-central-1 --stack prod"
    ]


def test_a_key_of_another_project_is_refused_before_anything_is_set(checkout):
    checkout.rename("myproject")
    checkout.write("prod", config={"crudstack:stage": "prod"})
    said = checkout.refused("--stage", "prod", "--yes")
    assert said.startswith("crudstack:stage is set, but the `name` in Pulumi.yaml is myproject")
    assert "`pulumi config set --stack prod --plaintext myproject:stage prod && pulumi config rm --stack prod" in said
    assert checkout.stack_file("prod")["config"] == {"crudstack:stage": "prod"}
    assert checkout.changed() == []


def test_a_deployed_stack_keeps_its_stage_if_a_key_of_another_project_is_moved(checkout):
    checkout.pulumi.will_output(OUTPUTS)
    assert checkout.run("--stage", "dev", "--yes").returncode == 0
    checkout.rename("myproject")
    checkout.write(config={"aws:region": "eu-central-1", "crudstack:stage": "prod"})
    said = checkout.refused("--stage", "prod", "--stack", "dev", "--yes")
    assert "this stack was deployed with the stage dev" in said
    assert "`pulumi config rm --stack dev crudstack:stage`" in said


def test_a_secret_is_refused_before_anything_is_set(checkout):
    checkout.write(config={"crudstack:stage": {"secure": "v1:abc"}})
    said = checkout.refused()
    assert said.startswith("crudstack:stage is set as a secret, expected plain text")
    assert "pulumi config set-all --stack dev --json " in said
    assert "$(pulumi config get --stack dev crudstack:stage --json" in said
    assert checkout.changed() == []


@pytest.mark.parametrize("text", ["config: [", "- a list", "config: text"])
def test_the_stack_s_file_cannot_be_read(checkout, text):
    (checkout.directory / "Pulumi.dev.yaml").write_text(text)
    assert re.match(r"Pulumi\.dev\.yaml (cannot be read|is not a stack's config): ", checkout.refused())


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ("preview", "`pulumi preview` failed, as it says above; nothing was changed"),
        ("up", "solve that and run `make deploy STAGE=dev STACK=mine` again, it goes on from there"),
    ],
)
def test_pulumi_failed(checkout, operation, says):
    checkout.pulumi.fails(operation)
    assert says in checkout.refused("--stage", "dev", "--stack", "mine", "--yes")
