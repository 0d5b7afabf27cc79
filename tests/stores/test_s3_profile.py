"""Credentials and region of profiles in ~/.aws, through botocore's own chain."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.object_store import S3ObjectStore
from app.autocrud.resource_manager.s3_credentials import provider
from app.autocrud.resource_manager.s3_profile import region
from tests.services import BUCKET


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, and no settings of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_keys_of_a_file_are_read_and_read_again_when_they_change(home):
    home.joinpath("credentials").write_text("[default]\naws_access_key_id = one\naws_secret_access_key = s\n")
    asked = provider()
    assert asked()["access_key_id"] == "one"
    home.joinpath("credentials").write_text("[default]\naws_access_key_id = two\naws_secret_access_key = s\n")
    found = asked()
    assert (found["access_key_id"], found["secret_access_key"], found["token"]) == ("two", "s", None)
    assert found["expires_at"] > datetime.now(UTC)


@pytest.mark.usefixtures("home")
def test_keys_of_the_environment_come_before_a_profile_and_import_no_botocore(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert provider() is None
    code = (
        "import sys; from app.autocrud.resource_manager.object_store import S3ObjectStore;"
        " S3ObjectStore('b', region_name='us-east-1'); print('botocore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_a_config_with_a_region_alone_leaves_obstore_alone(home):
    home.joinpath("config").write_text("[default]\nregion = eu-west-3\n[profile mine]\nregion = eu-west-1\n")
    assert provider() is None
    assert region() == "eu-west-3"
    assert region({**os.environ, "AWS_PROFILE": "mine"}) == "eu-west-1"
    assert region({**os.environ, "AWS_REGION": "eu-north-1"}) == "eu-north-1"


def test_a_process_is_asked_again_when_its_credentials_are_about_to_end(home, monkeypatch):
    """Credentials that end within botocore's ten minutes are renewed at each call."""
    script = home / "keys.py"
    count = home / "count"
    script.write_text(
        "import datetime, json, pathlib\n"
        f"count = pathlib.Path({str(count)!r})\n"
        "number = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(number))\n"
        "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'key{number}', 'SecretAccessKey': 's', 'SessionToken': 't',"
        " 'Expiration': end.isoformat()}))\n"
    )
    home.joinpath("config").write_text(f"[profile mine]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    asked = provider()
    first, second = asked(), asked()
    assert first["access_key_id"] != second["access_key_id"]
    assert second["token"] == "t"  # noqa: S105
    assert second["expires_at"] <= datetime.now(UTC) + timedelta(minutes=5)


@pytest.mark.usefixtures("home")
def test_a_profile_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(
        StoreUnavailable, match=r"the profile in use has no AWS credentials: .*nobody.* could not be found"
    ):
        provider()()


@pytest.mark.usefixtures("home")
def test_a_profile_without_boto3_is_one_sentence(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="boto3 is not installed"):
        provider()


def test_s3_signs_with_the_keys_of_a_profile(home, seaweed_s3, monkeypatch):
    keys = f"aws_access_key_id = {seaweed_s3.access_key_id}\naws_secret_access_key = {seaweed_s3.secret_access_key}"
    home.joinpath("credentials").write_text(f"[mine]\n{keys}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")

    async def use() -> bytes:
        store = S3ObjectStore(BUCKET, seaweed_s3.url, region_name="us-east-1")
        await store.put("profile/a", b"x")
        return (await store.get("profile/a")).body

    assert asyncio.run(use()) == b"x"
