"""Config keys of another project and secret settings are refused, with a command that corrects exactly that."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from app.autocrud.errors import ConfigError
from app.dev.pulumi_cli import ConfigValue
from infra.artifact import ROOT
from infra.config import StackConfig
from infra.config_keys import Keys, check_keys, project_file_keys
from infra.protected import stage_of
from infra.stack import build
from tests.infra.recorder import record

SECRET = "a-confidential-value"  # noqa: S105


def keys(values, *, project="myproject", stack="dev", secret=(), in_file=()):
    return Keys(
        project=project,
        stack=stack,
        values={key: ConfigValue(text, key in secret) for key, text in values.items()},
        in_project_file=in_file,
    )


def refused(given, deployed=None):
    with pytest.raises(ConfigError) as error:
        check_keys(given, lambda: deployed)
    assert "\n" not in error.value.detail
    assert SECRET not in error.value.detail
    return error.value.detail


def command(said):
    """Return the commands that the sentence contains, each as a list of arguments."""
    (line,) = re.findall("run `(.*?)`, (?:then|which)", said)
    commands, words = [], []
    for word in [*shlex.split(line), "&&"]:
        if word == "&&":
            commands.append(words)
            words = []
        else:
            words.append(word)
    return commands


SET, RM = (["pulumi", "config", verb, "--stack", "dev"] for verb in ("set", "rm"))


def test_a_text_is_moved():
    said = refused(keys({"crudstack:stage": "prod", "myproject:stage": "dev", "aws:region": "eu-central-1"}))
    assert said.startswith("crudstack:stage is set, but the `name` in Pulumi.yaml is myproject, so the program reads")
    assert command(said) == [[*SET, "--plaintext", "myproject:stage", "prod"], [*RM, "crudstack:stage"]]


@pytest.mark.parametrize("text", ["a b", "it's", "$HOME", "`id`", "a\nb", "-1", "é", "", "null", '"', "\\"])
def test_any_text_survives_the_shell(text):
    commands = command(refused(keys({"crudstack:alarm_email": text})))
    assert commands[-1] == [*RM, "crudstack:alarm_email"]
    if not text:  # a null, which sets nothing
        assert commands[:-1] == []
        return
    (((*_, key, value),)) = commands[:-1]
    if key == "--json":
        key, content = next(iter(json.loads(value).items()))
        value = content["value"]
    assert (key.removeprefix("--"), value) in {("myproject:alarm_email", text), ("", text)}


@pytest.mark.parametrize("value", [["https://a b"], {"a": {"b": ["`id`", "it's"]}}, [], {}])
def test_an_object_stays_one(value):
    moved, _ = command(refused(keys({"crudstack:tags": json.dumps(value)})))
    assert moved[:-1] == ["pulumi", "config", "set-all", "--stack", "dev", "--json"]
    (((key, content)),) = json.loads(moved[-1]).items()
    assert key == "myproject:tags"
    assert (content["objectValue"], json.loads(content["value"])) == (value, value)


def test_a_secret_is_moved_without_being_shown():
    given = {"crudstack:alarm_email": SECRET, "crudstack:auth": json.dumps({"issuer": SECRET})}
    said = refused(keys(given, secret=given))
    assert "$(pulumi config get --stack dev crudstack:alarm_email --json | sed" in said
    assert "$(pulumi config get --stack dev crudstack:auth --json | sed" in said
    # As `pulumi config --json` has it for `make deploy`.
    assert refused(keys(dict.fromkeys(given), secret=given)) == said


@pytest.mark.parametrize("name", ["stack of mine", "a;b"])
def test_the_name_of_the_stack_is_quoted(name):
    for words in command(refused(keys({"crudstack:stage": "prod"}, stack=name))):
        assert words[words.index("--stack") + 1] == name


@pytest.mark.parametrize(
    ("project", "key"),
    [
        ("myproject", "crudstack:stage"),
        ("myproject", "crudstack:anything"),
        ("crudstack", "old:stage"),
        ("crudstack", "crudstak:log_days"),
        ("crudstack", "Crudstack:log_days"),
        ("myproject", "my.project:tags"),
        ("crudstack", "auth0:domain"),  # a provider, but its package is not installed
    ],
)
def test_keys_that_the_program_would_ignore(project, key):
    assert refused(keys({key: "1"}, project=project)).startswith(f"{key} is set, but the `name` in Pulumi.yaml is")


@pytest.mark.parametrize(
    "key", ["aws:tags", "aws:region", "pulumi:tags", "random:seed", "crudstack:stage", "auth0:domain", "a-b:domain"]
)
def test_keys_of_providers_and_of_the_engine_are_legal(key, tmp_path, monkeypatch):
    (tmp_path / "pulumi_auth0").mkdir()
    (tmp_path / "pulumi_a_b.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    check_keys(keys({key: "dev"}, project="crudstack"), lambda: None)


def test_a_key_that_is_no_setting_is_removed():
    said = refused(keys({"crudstack:anything": "1"}))
    assert command(said) == [[*RM, "crudstack:anything"]]
    assert "anything is no setting, so the command removes it" in said


def test_the_value_of_the_project_s_own_key_is_kept():
    said = refused(keys({"crudstack:log_days": "90", "myproject:log_days": "7"}))
    assert command(said) == [[*RM, "crudstack:log_days"]]
    assert "myproject:log_days is set to 7 as well, and the command keeps that" in said
    said = refused(
        keys({"crudstack:alarm_email": "a@b.c", "myproject:alarm_email": SECRET}, secret=["myproject:alarm_email"])
    )
    assert "myproject:alarm_email is set to a secret as well" in said


def test_the_stage_of_a_deployed_stack_is_kept():
    """The old key was ignored, so the stack is a dev: as prod it would be replaced, and its data deleted."""
    given = {"crudstack:stage": "prod", "myproject:stage": "dev"}
    said = refused(keys(given), "dev")
    assert command(said) == [[*RM, "crudstack:stage"]]
    assert "this stack was deployed with the stage dev" in said
    assert command(refused(keys(given), "prod"))[0] == [*SET, "--plaintext", "myproject:stage", "prod"]
    assert command(refused(keys(given), "local"))[0] == [*SET, "--plaintext", "myproject:stage", "local"]


def test_the_stage_of_a_stack_is_read_from_its_state():
    for stage in ("dev", "prod", "pr-a-data-7"):
        resources = record(lambda stage=stage: build(StackConfig(stage=stage), zip=Path("app.zip"))).resources
        state = {"deployment": {"resources": [{"urn": each.urn, "type": each.type} for each in resources]}}
        assert stage_of(state) == stage
    assert stage_of({"deployment": None}) is None


def test_a_key_of_pulumi_yaml_is_removed_there():
    said = refused(keys({"crudstack:stage": "prod", "crudstack:log_days": "7"}, in_file=["crudstack:stage"]))
    assert said.endswith("in Pulumi.yaml, set the `default` of stage there instead, and remove crudstack:stage")
    said = refused(keys({"crudstack:anything": "1"}, in_file=["crudstack:anything"]))
    assert said.endswith("in Pulumi.yaml, remove crudstack:anything")
    assert not [key for key in project_file_keys(ROOT / "Pulumi.yaml") if ":" in key]


def test_a_secret_is_refused_with_the_command_that_sets_it_as_plain_text():
    said = refused(keys({"crudstack:log_days": SECRET}, project="crudstack", secret=["crudstack:log_days"]))
    assert said.startswith("crudstack:log_days is set as a secret, expected plain text: no setting holds a secret, and")
    assert (
        '`pulumi config set-all --stack dev --json "{\\"crudstack:log_days\\": $(pulumi config get --stack dev' in said
    )
    # Also one that makes no sense otherwise: the refusal of a value would show it.
    assert "is set as a secret" in refused(keys({"p:stage": SECRET}, project="p", secret=["p:stage"]))


def test_a_provider_s_secrets_are_its_own():
    check_keys(keys({"aws:secretKey": SECRET}, secret=["aws:secretKey"]), lambda: None)


@pytest.mark.parametrize(("project", "key"), [("aws", "aws:region"), ("pulumi", "pulumi:tags")])
def test_a_name_that_others_keys_begin_with_is_refused(project, key):
    said = refused(keys({key: "eu-central-1"}, project=project))
    assert said.startswith(f"the `name` in Pulumi.yaml is {project}, with which keys like {key} begin")


def test_nothing_is_refused_for_the_stage_alone():
    """The state is not read unless a key of the stage has to be moved."""

    def unread():
        raise AssertionError

    check_keys(keys({"myproject:stage": "prod"}), unread)
