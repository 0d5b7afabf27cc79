"""`make deploy`: the quota of concurrent executions that a stack with a database reserves for its function."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import boto3
import pytest
from botocore.stub import Stubber

from app.autocrud.errors import ConfigError
from app.settings import parse_outputs
from infra import deploy
from infra.config import read
from tests.deploy_checkout import OUTPUTS

WITH_DATABASE = read({"storage": "postgres-s3"})


def deploy_to(*, free: int | None, reserved: int | None = None) -> None:
    """Check the quota before the update of a stack with a database, and the reservation after it.

    Lambda reports `free` unreserved executions (None: access is denied) and `reserved` for the function.
    """
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


def test_a_sufficient_quota_is_accepted():
    deploy_to(free=135, reserved=35)


def test_an_insufficient_quota_is_refused_before_the_update():
    with pytest.raises(ConfigError, match=r"has 134 unreserved concurrent executions of Lambda, expected 135: request"):
        deploy_to(free=134)


def test_a_quota_that_cannot_be_read_is_reported_as_not_checked(capsys):
    deploy_to(free=None, reserved=35)
    assert "Not checked: the account's quota of concurrent executions (AccessDenied" in capsys.readouterr().out


@pytest.mark.parametrize(("reserved", "said"), [(None, "no"), (10, "10")])
def test_a_missing_or_smaller_reservation_is_reported(reserved, said):
    with pytest.raises(ConfigError, match=f"crudstack-dev-api reserves {said} concurrent executions, expected 35"):
        deploy_to(free=1000, reserved=reserved)


def test_lambda_is_not_asked_about_a_stack_that_reserves_nothing():
    asks_nothing = deploy.Aws(None, "1", "eu-central-1")
    deploy.check_quota(asks_nothing, read({}), "crudstack-dev-api")
    deploy.check_reservation(asks_nothing, read({}), parse_outputs(json.dumps(OUTPUTS), "OUTPUTS"))


@pytest.mark.parametrize(("free", "held", "fits"), [(100, 35, True), (110, 20, False), (134, None, False)])
def test_the_present_reservation_of_the_function_counts_as_free(free, held, fits):
    """An update that adds a database, or a larger one, is checked too."""
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = boto3.client("lambda", region_name="eu-central-1", **keys)
    stub = Stubber(client)
    limit = {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": free}
    stub.add_response("get_account_settings", {"AccountLimit": limit}, {})
    held_now = {} if held is None else {"ReservedConcurrentExecutions": held}
    stub.add_response("get_function_concurrency", held_now, {"FunctionName": "crudstack-dev-api"})
    aws = deploy.Aws(SimpleNamespace(client=lambda _: client), "1", "eu-central-1")
    with stub, contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="unreserved"):
        deploy.check_quota(aws, WITH_DATABASE, "crudstack-dev-api")
