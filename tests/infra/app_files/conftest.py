"""Fixtures of the tests of the app's files: directories with an app, in a checkout of git and in none."""

from __future__ import annotations

import os

import pytest

from tests.infra.app_files.trees import git, put


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    """Hide the git settings of this machine's user, so that they ignore no file."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def app(tmp_path):
    """An app of one module, in a project that is no checkout."""
    directory = tmp_path / "project" / "app"
    put(directory, "models.py")
    return directory


@pytest.fixture(params=["checkout", "without git", "no checkout"])
def project(request, app, monkeypatch):
    """The same app in a checkout, in a checkout on a machine without git, and in no checkout."""
    if request.param != "no checkout":
        git(app.parent, "init", "--quiet")
    if request.param == "without git":
        monkeypatch.setenv("PATH", str(app.parent / "nothing"))
    return app
