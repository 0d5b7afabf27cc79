"""`crudstack outputs`, `token rotate` and other commands of stacks, with a stand-in for the program pulumi.

The stand-in answers as Pulumi documents it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import httpx
import pytest

from app import cli
from app.autocrud.errors import ConfigError
from app.dev.aws_account import use_profile
from tests.aws_signer_double import SignerDouble

OUTPUTS = {
    "version": 1,
    "storage": "s3-sqlite",
    "storage_overrides": {},
    "stage": "dev",
    "bucket": "data-1",
    "region": "us-east-1",
    "api_url": "https://x.example.com",
    "function_name": "crudstack-dev-api",
}
PULUMI = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
asked = sys.argv[1:]
with (here / "asked").open("a") as file:
    file.write(json.dumps(asked) + "\\n")
if "--stack" in asked and asked[asked.index("--stack") + 1] == "nowhere":
    print("warning: x", file=sys.stderr)
    sys.exit("error: no stack named 'nowhere' found")
config = here / "config.json"
known = json.loads(config.read_text()) if config.exists() else {{}}
if asked[:3] == ["stack", "output", "--json"]:
    print((here / "outputs.json").read_text())
elif asked[:2] == ["config", "--json"]:
    shown = {{name: {{"secret": True}} if value is None else {{"value": value}} for name, value in known.items()}}
    print(json.dumps(shown))
elif asked[:2] == ["config", "set"]:
    config.write_text(json.dumps({{**known, asked[2]: asked[3]}}))
elif asked[:1] == ["up"] and (here / "slow").exists():
    import signal, time
    signal.signal(signal.SIGINT, lambda *_: (here / "interrupted").touch())
    (here / "running").touch()
    while not (here / "interrupted").exists():
        time.sleep(0.01)
    time.sleep(1)  # as an update goes on until it can stop
    (here / "stopped").touch()
    sys.exit("error: update cancelled")
elif asked[:1] == ["up"]:
    if (here / "declined").exists():
        sys.exit("error: confirmation declined, not proceeding with the update")
    (here / "outputs.json").write_text((here / "after.json").read_text())
else:
    sys.exit(f"error: unknown command {{asked}}")
"""


@pytest.fixture
def pulumi(tmp_path) -> Path:
    """Create the stand-in, and return its directory."""
    program = tmp_path / "pulumi"
    program.write_text(PULUMI.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "outputs.json").write_text(json.dumps(OUTPUTS))
    (tmp_path / "Pulumi.yaml").write_text("name: crudstack\n")
    return tmp_path


def crudstack(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
    given = {"PATH": str(path), **environment}
    return subprocess.run(command, cwd=path, env=given, capture_output=True, text=True, check=False, timeout=60)


def asked(pulumi: Path) -> list[list[str]]:
    return [json.loads(line) for line in (pulumi / "asked").read_text().splitlines()]


def with_token(token: str) -> dict[str, object]:
    return {**OUTPUTS, "auth": {"mode": "token", "token_sha256": hashlib.sha256(token.encode()).hexdigest()}}


def test_outputs_are_printed_as_the_app_decodes_them(pulumi):
    done = crudstack(pulumi, "outputs", "--stack", "dev")
    printed = json.loads(done.stdout)
    assert {name: printed[name] for name in OUTPUTS} == OUTPUTS
    commands = (["stack", "output"], ["config"])
    assert asked(pulumi) == [[*words, "--json", "--non-interactive", "--stack", "dev"] for words in commands]
    assert crudstack(pulumi, "outputs").returncode == 0


@pytest.mark.parametrize(
    ("outputs", "stack", "says"),
    [
        ({}, "dev", "the stack has no outputs: run `pulumi up` first"),
        ({**OUTPUTS, "x": 1}, "dev", "`pulumi stack output` has 'x', which is unknown"),
        (OUTPUTS, "nowhere", "error: no stack named 'nowhere' found"),
    ],
)
def test_an_error_is_one_sentence(pulumi, outputs, stack, says):
    (pulumi / "outputs.json").write_text(json.dumps(outputs))
    done = crudstack(pulumi, "outputs", "--stack", stack)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_reason_is_the_error_of_pulumi_and_not_its_warnings(pulumi):
    program = "import sys; sys.stderr.write('error: no such backend\\nwarning: a new version\\n'); sys.exit(1)"
    (pulumi / "pulumi").write_text(f"#!/bin/sh\nexec {shlex.join([sys.executable, '-c', program])}\n")
    done = crudstack(pulumi, "outputs")
    assert done.stderr == "crudstack: `pulumi stack output --json` failed: error: no such backend\n"


@pytest.mark.parametrize(
    "arguments",
    ["outputs --stack dev", "token new", "token --help", "nothing 2>&1", "serve --storage memory --port 0"],
)
def test_a_command_ends_quietly_if_the_reader_of_its_output_ends(pulumi, arguments):
    program = shlex.join([sys.executable, "-c", "from app.cli import main; main()"])
    environment = {"PATH": f"{pulumi}{os.pathsep}{os.environ['PATH']}"}
    # Its stdout is a pipe. The reader has closed it before the start.
    script = f"{{ sleep 0.2; {program} {arguments}; echo $? >&3; }} | true"
    with (pulumi / "code").open("w") as code:
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&{code.fileno()}; {script}"],
            env=environment,
            pass_fds=[code.fileno()],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    # 141 is 128 + SIGPIPE; the printer of --help ends with 1.
    assert (pulumi / "code").read_text().strip() in {"141", "1" if "--help" in arguments else "141"}
    assert [line for line in done.stderr.splitlines() if not line.startswith("not durable")] == []


def test_another_broken_pipe_is_not_taken_for_a_closed_stdout(monkeypatch):
    def run():
        raise BrokenPipeError("of a connection to a server")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(BrokenPipeError, match="of a connection"):
        cli.main()


def test_ctrl_c_lets_pulumi_end_its_update(pulumi):
    (pulumi / "slow").touch()
    command = [sys.executable, "-c", "from app.cli import main; main()", "token", "rotate", "--yes"]
    running = subprocess.Popen(
        command, env={"PATH": str(pulumi)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (pulumi / "running").exists():
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert (pulumi / "stopped").exists()
    assert running.returncode == 130
    assert "Traceback" not in said


def test_a_missing_pulumi_is_reported_with_the_remedy(tmp_path):
    done = crudstack(tmp_path, "outputs")
    assert done.returncode == 2
    assert "pulumi is not on PATH" in done.stderr
    assert "CRUDSTACK_OUTPUTS=outputs.json" in done.stderr


@pytest.fixture
def secrets(ministack_s3) -> dict[str, str]:
    """Return the environment for a Secrets Manager that can have the stack's token."""
    return {"AWS_ENDPOINT_URL": ministack_s3.url, "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}


def keep(environment: dict[str, str], name: str, token: str) -> None:
    client = boto3.client(
        "secretsmanager",
        region_name="us-east-1",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="local",
        aws_secret_access_key="local",  # noqa: S106 - any will do
    )
    try:
        client.create_secret(Name=name, SecretString=token)
    except client.exceptions.ResourceExistsException:
        client.put_secret_value(SecretId=name, SecretString=token)


def test_a_token_is_rotated_by_the_next_generation(pulumi, secrets):
    for generation in (2, 3):
        token = f"token-{generation}"
        (pulumi / "after.json").write_text(json.dumps(with_token(token)))
        keep(secrets, "data-1/api-token", token)  # the update does this
        done = crudstack(pulumi, "token", "rotate", "--stack", "dev", "--yes", **secrets)
        assert (done.returncode, done.stdout) == (0, f"{token}\n"), done.stderr
        assert json.loads((pulumi / "config.json").read_text()) == {"crudstack:token_generation": str(generation)}
    assert ["up", "--yes", "--stack", "dev"] in asked(pulumi)


def test_a_rotation_in_a_project_of_another_name(pulumi, secrets):
    (pulumi / "Pulumi.yaml").write_text("name: myproject\n")
    (pulumi / "after.json").write_text(json.dumps(with_token("new-token")))
    keep(secrets, "data-1/api-token", "new-token")
    done = crudstack(pulumi, "token", "rotate", **secrets)
    assert (done.returncode, done.stdout) == (0, "new-token\n"), done.stderr
    assert json.loads((pulumi / "config.json").read_text()) == {"myproject:token_generation": "2"}
    assert "myproject:token_generation is 2 now" in done.stderr


def test_a_rotation_without_a_new_token_fails(pulumi, secrets):
    for name in ("outputs.json", "after.json"):
        (pulumi / name).write_text(json.dumps(with_token("the-token")))
    keep(secrets, "data-1/api-token", "the-token")
    done = crudstack(pulumi, "token", "rotate", **secrets)
    assert (done.returncode, done.stdout) == (2, "")
    said = done.stderr.splitlines()[-1]
    assert said.startswith(
        "crudstack: the API token is the same as before, and still valid: `pulumi up` created no new one"
    )
    assert "the-token" not in done.stderr


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"old:token_generation": "3"}, "old:token_generation is set, expected crudstack:token_generation, because"),
        ({"crudstack:token_generation": "three"}, "crudstack:token_generation is not a number"),
        ({"crudstack:token_generation": None}, "crudstack:token_generation is a secret, expected a plain number"),
    ],
)
def test_an_invalid_generation_changes_nothing(pulumi, config, says):
    (pulumi / "config.json").write_text(json.dumps(config))
    done = crudstack(pulumi, "token", "rotate")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"crudstack: {says}")
    assert not [words for words in asked(pulumi) if words[0] == "up" or words[:2] == ["config", "set"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no Pulumi.yaml in "),
        ("name: [", "cannot be read: "),
        ("runtime: python", "has no name: expected a line like `name: crudstack`"),
    ],
)
def test_a_project_without_a_name_is_refused_in_one_sentence(pulumi, text, says):
    (pulumi / "Pulumi.yaml").unlink()
    if text is not None:
        (pulumi / "Pulumi.yaml").write_text(text)
    done = crudstack(pulumi, "token", "rotate")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_declined_rotation_can_be_resumed(pulumi, secrets):
    (pulumi / "declined").touch()
    done = crudstack(pulumi, "token", "rotate", **secrets)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run it again to continue with the new token" in done.stderr


def test_a_token_is_shown_only_if_it_belongs_to_the_stack(pulumi, secrets):
    (pulumi / "outputs.json").write_text(json.dumps(with_token("the-token")))
    keep(secrets, "data-1/api-token", "the-token")
    assert crudstack(pulumi, "token", "show", **secrets).stdout == "the-token\n"
    keep(secrets, "data-1/api-token", "another-token")
    done = crudstack(pulumi, "token", "show", **secrets)
    assert (done.returncode, "is not the one that the stack's outputs name" in done.stderr) == (2, True)
    assert "another-token" not in done.stderr
    (pulumi / "outputs.json").write_text(json.dumps(OUTPUTS))
    assert "this stack has no API token" in crudstack(pulumi, "token", "show", **secrets).stderr


# The account of a stack

PROFILES = """
[default]
aws_access_key_id = default-key
aws_secret_access_key = secret
[profile work]
aws_access_key_id = work-key
aws_secret_access_key = secret
[profile role]
role_arn = arn:aws:iam::111111111111:role/x
source_profile = from-environment
[profile from-environment]
role_arn = arn:aws:iam::111111111111:role/y
credential_source = Environment
"""
KEYS = {"AWS_ACCESS_KEY_ID": "env-key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}


@pytest.fixture
def account(pulumi):
    """Run a stand-in for AWS. Yields it and the environment of a user with several profiles."""
    (pulumi / "aws.ini").write_text(PROFILES)
    (pulumi / "outputs.json").write_text(json.dumps(with_token("the-token")))
    with SignerDouble("the-token") as double:
        yield (
            double,
            {
                "HOME": str(pulumi),
                "AWS_CONFIG_FILE": str(pulumi / "aws.ini"),
                "AWS_ENDPOINT_URL": double.url,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )


def names_profile(pulumi, name):
    (pulumi / "config.json").write_text(json.dumps({"aws:profile": name}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        KEYS,
        {"AWS_PROFILE": "work"},
        {"AWS_DEFAULT_PROFILE": "work", **KEYS},
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere", "AWS_ROLE_ARN": "arn:aws:iam::111111111111:role/x"},
    ],
    ids=lambda given: "-".join(given) or "nothing",
)
def test_the_token_is_read_with_the_profile_of_the_stack(pulumi, account, given):
    """Pulumi's provider does the same: it prefers aws:profile to these variables."""
    double, environment = account
    names_profile(pulumi, "work")
    done = crudstack(pulumi, "token", "show", **environment, **given)
    assert (done.returncode, done.stdout) == (0, "the-token\n"), done.stderr
    assert double.signers == [("secretsmanager", "work-key")]


def test_without_a_profile_the_environment_is_unchanged(pulumi, account):
    double, environment = account
    for given, key in (({}, "default-key"), (KEYS, "env-key"), ({"AWS_PROFILE": "work"}, "work-key")):
        done = crudstack(pulumi, "token", "show", **environment, **given)
        assert done.returncode == 0, done.stderr
        assert double.signers.pop() == ("secretsmanager", key)


def test_the_data_are_read_with_the_profile_of_the_stack(pulumi, account):
    double, environment = account
    names_profile(pulumi, "work")
    environment |= {"CRUDSTACK_S3_ENDPOINT_URL": double.url, "CRUDSTACK_DATA_DIR": str(pulumi / "data"), **KEYS}
    done = crudstack(pulumi, "serve", "--stack", "dev", "--port", "0", **environment)
    assert done.returncode == 2
    assert "AccessDenied" in done.stderr
    assert set(double.signers) == {("s3", "work-key")}


COMMANDS = [["outputs"], ["token", "show"], ["token", "rotate"], ["serve", "--stack", "dev", "--port", "0"]]


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_another_profile_of_the_environment_is_refused(pulumi, account, command, variable):
    double, environment = account
    names_profile(pulumi, "work")
    done = crudstack(pulumi, *command, **environment, **{variable: "default"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"crudstack: {variable} is default, and aws:profile in the stack's config is work: expected"
    )
    assert f"`unset {variable}`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert double.signers == []
    assert not [words for words in asked(pulumi) if words[0] == "up" or words[:2] == ["config", "set"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_missing_profile_is_refused_in_one_sentence(pulumi, account, command):
    double, environment = account
    names_profile(pulumi, "missing")
    done = crudstack(pulumi, *command, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "aws:profile in the stack's config is missing, expected a profile in ~/.aws/config" in done.stderr
    assert "there are default, from-environment, role, work: run `aws configure --profile missing`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert double.signers == []
    # If only the environment names a profile, botocore looks for it.
    (pulumi / "config.json").unlink()
    said = crudstack(pulumi, "token", "show", **environment, AWS_PROFILE="missing").stderr
    assert said.endswith("Secrets Manager: The config profile (missing) could not be found\n")


def test_unreadable_files_are_refused_in_one_sentence(pulumi, account):
    _, environment = account
    names_profile(pulumi, "work")
    (pulumi / "aws.ini").write_text("[profile work\n")
    done = crudstack(pulumi, "token", "show", **environment)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "the profiles in ~/.aws cannot be read: " in done.stderr


@pytest.mark.parametrize("name", ["role", "from-environment"])
def test_a_profile_that_takes_its_keys_from_the_environment_is_refused(pulumi, account, name):
    _, environment = account
    names_profile(pulumi, name)
    done = crudstack(pulumi, "token", "show", **environment, **KEYS)
    assert done.stderr.startswith("crudstack: the profile from-environment has credential_source = Environment")


def test_a_secret_profile_is_refused(pulumi, account):
    names_profile(pulumi, None)
    assert "aws:profile is a secret, expected the plain name" in crudstack(pulumi, "outputs", **account[1]).stderr


def test_the_environment_of_pulumi_is_unchanged(pulumi, account):
    """The state of Pulumi may be in a bucket of another account. The environment then has the keys of that account."""
    _, environment = account
    names_profile(pulumi, "work")
    (pulumi / "after.json").write_text(json.dumps(with_token("the-token")))
    (pulumi / "outputs.json").write_text(json.dumps(with_token("before")))
    program = pulumi / "pulumi"
    seen = (
        'import os\n(pathlib.Path(__file__).parent / "keys").open("a").write(os.environ["AWS_ACCESS_KEY_ID"] + "\\n")\n'
    )
    program.write_text(program.read_text().replace("asked = ", f"{seen}asked = ", 1))
    done = crudstack(pulumi, "token", "rotate", **environment, **KEYS)
    assert done.returncode == 0, done.stderr
    assert set((pulumi / "keys").read_text().split()) == {"env-key"}


def test_a_refused_profile_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    given = dict(KEYS)
    with pytest.raises(ConfigError, match="where there is none"):
        use_profile("work", given)
    use_profile(None, given)
    assert given == KEYS


def test_the_data_of_a_stack_can_be_served_on_this_machine(pulumi, serve, ministack_s3):
    outputs = {**OUTPUTS, "bucket": "tests", "prefix": f"{pulumi.name}/"}
    (pulumi / "outputs.json").write_text(json.dumps(outputs))
    path = f"{pulumi}{os.pathsep}{os.environ['PATH']}"
    server = serve("memory", pulumi, "--stack", "dev", s3=ministack_s3, environment={"PATH": path})
    assert httpx.get(f"{server.url}/readyz").json()["not_durable"] == []
