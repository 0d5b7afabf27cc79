"""Fixtures: the unpacked zip for each version of Python, instances that run it, and an endpoint for credentials."""

from __future__ import annotations

import contextlib
import sys

import pytest

from app.autocrud.errors import ConfigError
from infra.artifact import interpreter
from tests.aws_lambda.instances import settings
from tests.lambda_runtime import CredentialsEndpoint, Instance, unpack


def other_version() -> list[str]:
    """Return Lambda's version of Python if it is installed. If not, `make package` and tests/infra say so and fail."""
    try:
        interpreter("3.13")
    except ConfigError:
        return []
    return ["3.13"]


HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
VERSIONS = list(dict.fromkeys([HERE, *other_version()]))


@pytest.fixture(scope="session", params=VERSIONS)
def each_task(request, tmp_path_factory):
    return unpack(request.param, tmp_path_factory.mktemp(f"task-{request.param}"))


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Unpack the zip for Lambda's version of Python if it is installed, or else for the running one."""
    return unpack(VERSIONS[-1], tmp_path_factory.mktemp("task"))


@pytest.fixture
def instance(ministack_s3, tmp_path, task):
    """Start instances that share a bucket."""
    with contextlib.ExitStack() as stack:
        yield lambda url=None, task=task, **outputs: stack.enter_context(
            Instance(task, settings(ministack_s3, tmp_path.name, url, **outputs), tmp_path)
        )


@pytest.fixture(scope="module")
def shared(ministack_s3, tmp_path_factory, task):
    """Run one instance for all tests that do not disturb it."""
    directory = tmp_path_factory.mktemp("shared")
    with Instance(task, settings(ministack_s3, directory.name), directory) as one:
        yield one


@pytest.fixture
def endpoint(ministack_s3):
    with CredentialsEndpoint(ministack_s3.access_key_id, ministack_s3.secret_access_key) as endpoint:
        yield endpoint
