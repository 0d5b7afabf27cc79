"""Fixtures of the tests of the zip for Lambda. The zip is built once for all of them."""

from __future__ import annotations

import shutil
import zipfile

import pytest

from infra.artifact import ROOT, build


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """A copy of the app, because a developer may edit the app while the tests run."""
    copy = tmp_path_factory.mktemp("source") / "app"
    shutil.copytree(ROOT / "app", copy)
    return copy


@pytest.fixture(scope="session")
def built(tmp_path_factory, app):
    """The zip for Lambda, from scratch."""
    directory = tmp_path_factory.mktemp("built")
    return build(directory / "out" / "lambda.zip", app=app, cache=directory / "cache")


@pytest.fixture(scope="session")
def cache(built):
    """The directory with the wheels of `built`."""
    return built.path.parents[1] / "cache"


@pytest.fixture(scope="session")
def contents(built):
    with zipfile.ZipFile(built.path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.fixture
def small_app(tmp_path):
    """An app of one module."""
    directory = tmp_path / "small" / "app"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("answer = 42\n")
    return directory
