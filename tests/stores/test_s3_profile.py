"""Credentials and region of profiles in ~/.aws, through the credential chain of botocore."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.credentials import provider
from app.autocrud.resource_manager.backends.s3.errors import s3_answer
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from app.autocrud.resource_manager.backends.s3.profile import region
from tests.aws_sign_in_double import SignInDouble
from tests.services import BUCKET


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Use an empty home directory, and no settings of AWS."""
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
        "import sys; from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore;"
        " S3ObjectStore('b', region_name='us-east-1'); print('botocore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_a_config_with_only_a_region_has_no_provider(home):
    home.joinpath("config").write_text("[default]\nregion = eu-west-3\n[profile mine]\nregion = eu-west-1\n")
    assert provider() is None
    assert region() == "eu-west-3"
    assert region({**os.environ, "AWS_PROFILE": "mine"}) == "eu-west-1"
    assert region({**os.environ, "AWS_REGION": "eu-north-1"}) == "eu-north-1"


def test_a_process_is_asked_again_when_its_credentials_are_about_to_end(home, monkeypatch):
    """Credentials that expire within ten minutes are renewed at each call, as botocore does."""
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
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    with pytest.raises(
        StoreUnavailable, match=r"the profile in use has no AWS credentials: .*unknown.* could not be found"
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


# Profiles that sign in elsewhere: SSO, roles


@pytest.fixture
def sign_in():
    with SignInDouble() as double:
        yield double


def write_sso(home, double, *, ends: timedelta, more: dict[str, str] | None = None) -> None:
    """Write a profile `mine` with an SSO session, and the token that `aws sso login` would leave."""
    home.joinpath("config").write_text(
        "[profile mine]\nsso_session = corp\nsso_account_id = 123456789012\nsso_role_name = dev\nregion = us-east-1\n"
        f"services = local\n[sso-session corp]\nsso_region = us-east-1\nsso_start_url = {double.url}/start\n"
        f"{double.services()}"
    )
    cache = home / "sso" / "cache"
    cache.mkdir(parents=True)
    at = (datetime.now(UTC) + ends).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = {"startUrl": f"{double.url}/start", "region": "us-east-1", "accessToken": "sso-token", "expiresAt": at}
    name = hashlib.sha1(b"corp").hexdigest()  # noqa: S324 - botocore's name of the file
    (cache / f"{name}.json").write_text(json.dumps({**token, **(more or {})}))


def write_role(home, double, source: str) -> None:
    home.joinpath("config").write_text(
        "[profile mine]\nrole_arn = arn:aws:iam::123456789012:role/data\nrole_session_name = me\nregion = us-east-1\n"
        f"services = local\n{source}{double.services()}"
    )


SOURCE_PROFILE = (
    "source_profile = base\n[profile base]\naws_access_key_id = base-key\naws_secret_access_key = base-secret\n"
)


ASK = """
import json, sys
from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.s3.credentials import provider
asked = provider()
try:
    for _ in range(int(sys.argv[1])):
        print(json.dumps(asked(), default=lambda end: end.timestamp()))
except StoreUnavailable as error:
    print(json.dumps(str(error)))
"""


def ask(home, calls: int = 1) -> list:
    """Call the provider in a new process, because botocore reads the directory of SSO tokens when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"HOME": str(home.parent), "AWS_PROFILE": "mine", "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(calls)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_sso_gives_credentials_until_they_end(home, sign_in):
    write_sso(home, sign_in, ends=timedelta(hours=8))
    first, second = ask(home, 2)
    keys = (first["access_key_id"], first["secret_access_key"], first["token"])
    assert keys == ("dev-1", "sso-secret", "of-123456789012")
    assert 540 < first["expires_at"] - time.time() <= 600
    assert second["access_key_id"] == "dev-1"
    assert sign_in.asked == [("GetRoleCredentials", "sso-token")]


def test_sso_credentials_that_are_about_to_end_are_renewed(home, sign_in):
    write_sso(home, sign_in, ends=timedelta(hours=8))
    sign_in.lives = timedelta(minutes=4)
    first, second = ask(home, 2)
    assert (first["access_key_id"], second["access_key_id"]) == ("dev-1", "dev-2")
    assert 120 < second["expires_at"] - time.time() <= 240


def test_an_sso_session_that_ended_is_renewed_with_its_refresh_token(home, sign_in):
    client = {"clientId": "c", "clientSecret": "s", "refreshToken": "again"}
    client["registrationExpiresAt"] = "2126-01-01T00:00:00Z"
    write_sso(home, sign_in, ends=timedelta(minutes=-1), more=client)
    assert ask(home)[0]["access_key_id"] == "dev-2"
    assert sign_in.asked == [("CreateToken", "again"), ("GetRoleCredentials", "a-new-sso-token")]


@pytest.mark.parametrize("ends", [timedelta(minutes=-1), timedelta(hours=8)], ids=["ended", "revoked"])
def test_an_sso_session_that_is_over_names_the_command(home, sign_in, ends):
    write_sso(home, sign_in, ends=ends)
    sign_in.token = "another"  # noqa: S105
    (told,) = ask(home)
    assert told.startswith("the profile in use has no AWS credentials: ")
    assert told.endswith("; run `aws sso login`")
    assert "sso-token" not in told
    assert sign_in.asked == ([] if ends < timedelta() else [("GetRoleCredentials", "sso-token")])


def test_a_role_is_assumed_with_the_keys_of_another_profile_and_signs_for_s3(home, sign_in, seaweed_s3, monkeypatch):
    write_role(home, sign_in, SOURCE_PROFILE)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    asked = provider()
    first = asked()
    assert (first["access_key_id"], first["secret_access_key"], first["token"]) == (
        "role-1",
        "role-secret",
        "role-token",
    )
    assert asked()["access_key_id"] == "role-1"
    assert sign_in.asked == [("AssumeRole", "base-key")]
    error = asyncio.run(_get_error(S3ObjectStore(BUCKET, seaweed_s3.url, region_name="us-east-1")))
    assert s3_answer(error)[0] == 403  # it was signed with keys that this server does not know
    assert sign_in.asked[1:] == [("AssumeRole", "base-key")]


async def _get_error(store: S3ObjectStore) -> BaseException:
    with pytest.raises(StoreUnavailable) as raised:
        await store.get("a")
    return raised.value.__cause__


def test_credentials_of_a_role_that_are_about_to_end_are_renewed(home, sign_in, monkeypatch):
    write_role(home, sign_in, SOURCE_PROFILE)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    sign_in.lives = timedelta(seconds=90)
    asked = provider()
    first, second = asked(), asked()
    assert (first["access_key_id"], second["access_key_id"]) == ("role-1", "role-2")
    assert second["expires_at"] <= datetime.now(UTC) + timedelta(seconds=90)


def test_a_role_may_come_from_an_sso_session(home, sign_in):
    write_sso(home, sign_in, ends=timedelta(hours=8))
    text = home.joinpath("config").read_text().replace("[profile mine]", "[profile sso]")
    home.joinpath("config").write_text(
        "[profile mine]\nrole_arn = arn:aws:iam::123456789012:role/data\nsource_profile = sso\nregion = us-east-1\n"
        f"services = local\n{text}"
    )
    assert ask(home)[0]["access_key_id"] == "role-2"
    assert sign_in.asked == [("GetRoleCredentials", "sso-token"), ("AssumeRole", "dev-1")]


def test_a_role_that_may_not_be_assumed_is_one_sentence(home, sign_in, monkeypatch):
    write_role(home, sign_in, SOURCE_PROFILE)
    sign_in.denied = True
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(StoreUnavailable, match="alice may not assume this role") as raised:
        provider()()
    assert "\n" not in str(raised.value)
    assert "aws sso login" not in str(raised.value)


def test_without_home_the_files_are_those_of_the_user_database(home, monkeypatch):
    home.joinpath("credentials").write_text("[default]\naws_access_key_id = one\naws_secret_access_key = s\n")
    home.joinpath("config").write_text("[default]\nregion = eu-west-3\n")
    monkeypatch.delenv("HOME")
    user = pwd.getpwuid(os.getuid())
    changed = pwd.struct_passwd((*user[:5], str(home.parent), user[6]))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: changed)
    assert provider()()["access_key_id"] == "one"
    assert region() == "eu-west-3"


@pytest.mark.usefixtures("home")
def test_without_home_and_user_there_are_no_files(monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert provider() is None
    assert region() is None
