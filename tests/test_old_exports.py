"""Archives that a killed command leaves in the bucket of a stack: the hourly maintenance of the app removes them."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from types import SimpleNamespace

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError

from app import aws_lambda, old_exports
from app.autocrud.secret import Secret
from app.aws_lambda import LambdaHandler
from app.settings import EXPORTS
from tests.stack_double import Stacks

pytestmark = pytest.mark.slow


@pytest.fixture
def stacks(ministack_s3, monkeypatch):
    made = Stacks(ministack_s3, monkeypatch)
    yield made
    made.close()


def test_all_versions_of_old_archives_are_removed(stacks, database, monkeypatch):
    client = boto3.session.Session().client("s3")
    client.put_bucket_versioning(Bucket=stacks.bucket, VersioningConfiguration={"Status": "Enabled"})
    key, other = f"{EXPORTS}left/article-0.tar.gz", "exports/of-a-model-with-this-name"
    for body in (b"first", b"second"):
        client.put_object(Bucket=stacks.bucket, Key=key, Body=body)
    client.delete_object(Bucket=stacks.bucket, Key=key)
    client.put_object(Bucket=stacks.bucket, Key=other, Body=b"data")
    assert stacks.keys(f"{EXPORTS}left/") == [key] * 3

    _, function = stacks.make("old-exports", "postgres-s3", pg_dsn=Secret(database))
    handler = LambdaHandler(function.settings)
    context = SimpleNamespace(aws_request_id="1", get_remaining_time_in_millis=lambda: 29_000)
    try:
        handler({"crudstack": "maintain"}, context)
        assert stacks.keys(f"{EXPORTS}left/") == [key] * 3, "a command may still need them"
        monkeypatch.setattr(old_exports, "LIFE", dt.timedelta(minutes=-1))
        handler({"crudstack": "maintain"}, context)
        assert stacks.keys(f"{EXPORTS}left/") == []
        assert stacks.keys("exports/") == [other]

        maintain, budgets = handler._crud.maintain, []

        async def noted(budget: float) -> None:
            budgets.append(budget)
            await maintain(budget)

        def slow(_: object) -> int:
            time.sleep(0.5)
            return 0

        monkeypatch.setattr(handler._crud, "maintain", noted)
        monkeypatch.setattr(aws_lambda, "remove_old_exports", slow)
        handler({"crudstack": "maintain"}, context)
        assert budgets[0] <= 27.5, "the time of the removal is part of the budget"

        def refused(_: object) -> int:
            raise EndpointConnectionError(endpoint_url="of S3")

        monkeypatch.setattr(aws_lambda, "remove_old_exports", refused)
        told = handler({"crudstack": "maintain"}, context)
        assert told["maintained"], "the stores are maintained if S3 cannot be asked for archives"
    finally:
        handler._loop.run_until_complete(handler._crud.close())
        handler._loop.run_until_complete(handler._loop.shutdown_default_executor())
        handler._loop.close()
        asyncio.set_event_loop(None)
