"""`make deploy`: what it prints and asks on its way to a URL. Nothing is changed on AWS without a confirmation."""

from __future__ import annotations

import re

import pytest

from tests.deploy_checkout import OUTPUTS, PASSPHRASE, TOKEN, Checkout


@pytest.fixture
def checkout(tmp_path, ministack_s3) -> Checkout:
    return Checkout(tmp_path, ministack_s3.url)


def test_with_yes_it_deploys_a_new_stack_and_shows_its_url(checkout):
    done = checkout.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert checkout.pulumi.state["stacks"]["dev"]["outputs"] == OUTPUTS
    assert checkout.stack_file()["config"] == {"aws:region": "eu-central-1", "crudstack:stage": "dev"}
    shown = done.stdout
    assert "AWS account 000000000000, region eu-central-1" in shown
    assert "Logged in. The state of stacks is on this machine" in shown
    assert shown.index("Previewing") < shown.index("Estimated cost") < shown.index("Updating")
    assert shown.index("Updating") < shown.index("The API is at https://x.example.com")
    header = '-H "Authorization: Bearer $(.venv/bin/crudstack token show --stack dev)"'
    assert shown.splitlines()[-1] == f'curl -s "https://x.example.com/readyz" {header}'
    assert TOKEN not in shown + done.stderr
    assert PASSPHRASE not in shown + done.stderr


def test_it_can_be_run_again(checkout):
    for _ in range(2):
        done = checkout.run("--stage", "dev", "--yes")
        assert done.returncode == 0, done.stderr
    asked = checkout.pulumi.asked()
    assert [asked.count(command) for command in ("login --local", "stack init dev")] == [1, 1]
    assert asked.count("up --yes --skip-preview --stack dev") == 2
    assert len([command for command in asked if command.startswith("config set")]) == 2


def test_on_a_terminal_it_asks_for_confirmation_before_the_update(checkout):
    done = checkout.typed(answers=("", "y"))
    assert done.code == 0, done.shown
    assert "Pulumi is not logged in. Keep the state of stacks on this machine, below ~/.pulumi? [Y/n]" in done.shown
    assert "Make these changes in the account 000000000000, eu-central-1? AWS bills" in done.shown
    assert checkout.changed() == ["up --yes --skip-preview --stack dev"]


@pytest.mark.parametrize("answer", ["", "n", "no", "what?", "\x04"])
def test_any_answer_but_yes_changes_nothing(checkout, answer):
    done = checkout.typed(answers=("y", answer))
    assert done.code == 2, done.shown
    assert done.shown.splitlines()[-1] == "deploy: declined: nothing was changed on AWS"
    assert checkout.changed() == []


def test_ctrl_c_at_a_question_ends_with_one_line(checkout):
    done = checkout.typed(answers=("y",), interrupt=True)
    assert done.code == 130, done.shown
    assert done.shown.splitlines()[-1] == "deploy: stopped"
    assert "Traceback" not in done.shown
    assert checkout.changed() == []


def test_without_a_terminal_or_yes_it_is_refused(checkout):
    said = checkout.refused("--stage", "dev")
    assert said.startswith("there is no terminal to ask for confirmation: run it in one, or say YES=1")
    assert checkout.pulumi.asked() == []


def test_the_estimated_cost_is_computed_from_the_config_of_the_stack(checkout):
    shown = checkout.run("--stage", "dev", "--yes").stdout
    checkout.write("full", config={"crudstack:storage": "postgres-s3", "crudstack:postgres": {"proxy": True}})
    more = checkout.run("--stage", "dev", "--stack", "full", "--yes").stdout
    found = [re.search(r"whole stack: ([\d.]+) USD a month idle, ([\d.]+) USD", each) for each in (shown, more)]
    assert float(found[0][1]) < 2
    assert float(found[1][1]) > 20
    assert float(found[0][1]) < float(found[0][2])


def test_an_unknown_cost_is_reported_as_unknown(checkout):
    checkout.write(
        config={"crudstack:storage": "postgres-s3", "crudstack:postgres": {"class": "db.m7g.large", "proxy": True}}
    )
    done = checkout.run("--stage", "dev", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Estimated cost: unknown, because docs/costs.md has no price of db.m7g.large" in done.stdout


def test_the_stage_prod_is_explained(checkout):
    done = checkout.run("--stage", "prod", "--yes")
    assert done.returncode == 0, done.stderr
    assert checkout.stack_file("prod")["config"]["crudstack:stage"] == "prod"
    assert "The stage prod protects its data" in done.stdout
    assert "The stage prod" not in checkout.run("--stage", "dev", "--yes").stdout


@pytest.mark.parametrize(
    ("auth", "header"),
    [
        ({"mode": "none"}, ""),
        ({"mode": "jwt", "issuer": "https://i.example", "audiences": ["a"]}, ' -H "Authorization: Bearer $JWT"'),
    ],
)
def test_the_curl_command_has_the_credentials_of_the_auth_mode(checkout, auth, header):
    checkout.pulumi.will_output({**OUTPUTS, "auth": auth})
    shown = checkout.run("--stage", "dev", "--yes").stdout
    assert shown.splitlines()[-1] == f'curl -s "https://x.example.com/readyz"{header}'
    assert ("JSON Web Token of https://i.example" in shown) == (auth["mode"] == "jwt")
