"""Credentials for S3 that obstore does not find by itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.s3 import credentials as s3_credentials
from app.autocrud.resource_manager.backends.s3.credentials import (
    FOUND_BY_OBSTORE,
    FULL_URI,
    TOKEN,
    fetch,
    is_local,
    provider,
)
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from tests.lambda_runtime import CredentialsEndpoint

OTHERS = [name for name in os.environ if name.startswith("AWS_")]


@pytest.fixture
def endpoint():
    with CredentialsEndpoint("the-key", "the-secret") as endpoint:
        yield endpoint


@pytest.fixture
def environment(endpoint, monkeypatch):
    """Give this process the environment of a Lambda function with SnapStart."""
    for name in OTHERS:
        monkeypatch.delenv(name)
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bucket():
    """Run a server that accepts every request. Yields its URL, and the access key and token of each request."""
    signed = []

    class S3(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
            signed.append((key, self.headers.get("x-amz-security-token")))
            self.send_response(200)
            for name, value in {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", signed
    server.shutdown()
    server.server_close()


def test_there_is_no_provider_if_obstore_finds_credentials_itself(tmp_path):
    home = {"HOME": str(tmp_path)}
    uri = {FULL_URI: "http://127.0.0.1:1/", TOKEN: "x", **home}
    assert provider(home) is None
    assert provider(uri) is not None
    secret = {"AWS_SECRET_ACCESS_KEY": "x"}
    keys = {name: {**uri, name: "x"} | (secret if name == "AWS_ACCESS_KEY_ID" else {}) for name in FOUND_BY_OBSTORE}
    assert {name for name, given in keys.items() if provider(given) is None} == {
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    }


@pytest.mark.parametrize(
    ("given", "missing"),
    [("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")],
)
def test_one_of_two_keys_is_one_sentence_at_start(tmp_path, given, missing):
    told = f"crudstack: {given} is set and {missing} is not: set both, or neither to use a profile or a role\n"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), given: "the-secret"}
    environment |= {"CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b"}
    for arguments in (["serve", "--port", "0"], ["s3-check", "s3://b"]):
        command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


@pytest.mark.usefixtures("environment")
async def test_one_fetch_signs_many_requests_of_all_clients(endpoint, bucket, tmp_path):
    url, signed = bucket
    store = S3ObjectStore("b", url)
    assert endpoint.asked == 0
    await asyncio.gather(*(store.get(f"{number}") for number in range(50)))
    await store.download("file", tmp_path / "file")
    assert set(signed) == {("the-key", "session")}
    assert (len(signed), endpoint.asked) == (51, 1)


async def test_keys_that_are_given_are_used_before_the_environment(environment, endpoint, bucket):
    url, signed = bucket
    await S3ObjectStore("b", url, "given-key", "given-secret").get("x")
    environment.setenv("AWS_ACCESS_KEY_ID", "plain-key")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "plain-secret")
    await S3ObjectStore("b", url).get("x")
    assert signed == [("given-key", None), ("plain-key", None)]
    assert endpoint.asked == 0


def test_a_fetch_is_reused_briefly_in_the_same_environment_only(endpoint):
    environment = dict(endpoint.environment)
    credentials = provider(environment)
    assert credentials()["access_key_id"] == credentials()["access_key_id"] == "the-key"
    assert endpoint.asked == 1
    environment[TOKEN] = "another"
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="answered 403"):
            credentials()
    assert endpoint.asked == 2


async def test_a_restored_snapshot_uses_the_identity_of_its_environment(environment, endpoint, bucket):
    """The environment is read at each fetch. Credentials that expired in the snapshot are not used."""
    url, signed = bucket
    endpoint.lives_s = 2
    store = S3ObjectStore("b", url)
    await store.get("x")
    with CredentialsEndpoint("another-key", "another-secret", "another-token") as other:
        for name, value in other.environment.items():
            environment.setenv(name, value)
        await asyncio.sleep(2.1)
        await store.get("x")
    assert signed == [("the-key", "session"), ("another-key", "session")]


@pytest.mark.parametrize("ends", ["2126-01-02T03:04:05Z", "2126-01-02T03:04:05.678901Z", "2126-01-02T03:04:05"])
def test_every_form_of_an_expiration_is_utc(endpoint, ends):
    endpoint.expiration = ends
    found = fetch(*endpoint.environment.values())
    assert (found["access_key_id"], found["secret_access_key"], found["token"]) == ("the-key", "the-secret", "session")
    assert found["expires_at"].replace(microsecond=0) == datetime(2126, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("169.254.170.2", True),
        ("169.254.100.1", True),
        ("fd00:ec2::23", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("2001:db8::1", False),
    ],
)
def test_the_token_is_sent_in_plain_text_on_this_machine_only(host, local):
    assert is_local(host) is local
    if not local:
        name = f"[{host}]" if ":" in host else host
        with pytest.raises(StoreUnavailable, match="expected https, or http to a loopback or link-local address"):
            fetch(f"http://{name}/credentials", "a-secret")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({FULL_URI: "http://user:a-secret@example.org/?key=a-secret"}, "names http://example.org: expected https"),
        ({FULL_URI: "file:///etc/a-secret"}, "names file://: expected https"),
        ({FULL_URI: "a-secret"}, "expected https"),
        ({FULL_URI: "http://127.0.0.1:a-secret/"}, "is not a URL"),
        ({FULL_URI: "http://[a-secret/"}, "is not a URL"),
        ({FULL_URI: "http://127.0.0.1:1/a-secret?key=a-secret"}, "at http://127.0.0.1:1 cannot be reached: Conn"),
        ({FULL_URI: "http://localhost:1/a secret"}, "at http://localhost:1 gave no HTTP answer: InvalidURL"),
        ({TOKEN: "a-secret"}, "answered 403"),
        ({TOKEN: "a-secret\n"}, "has characters that no HTTP header can have"),
        ({TOKEN: "a-secret-ü"}, "has characters that no HTTP header can have"),
    ],
)
async def test_a_failure_is_one_sentence_without_a_secret(environment, endpoint, bucket, changed, reason, caplog):
    """This holds for the error of the provider, and for the log and the error of the store."""
    with pytest.raises(StoreUnavailable, match=reason) as raised:
        fetch(*{**endpoint.environment, **changed}.values())
    assert raised.value.__cause__ is None
    for name, value in changed.items():
        environment.setenv(name, value)
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreUnavailable, match="cannot be used right now") as told:
        await S3ObjectStore("b", bucket[0]).get("x")
    assert reason in caplog.text
    assert "External AWS credential provider" not in caplog.text  # obstore's own words
    for text in (str(raised.value), str(told.value), caplog.text):
        assert "secret" not in text.replace("SecretAccessKey", "")


@pytest.mark.parametrize(
    "answer",
    [
        '["the-secret"]',
        "the-secret",
        '{"AccessKeyId": "", "SecretAccessKey": "the-secret"}',
        '{"AccessKeyId": "the-key", "SecretAccessKey": "the-secret", "Expiration": "the-secret"}',
        json.dumps({"AccessKeyId": "the-key", "SecretAccessKey": "the-secret", "Padding": "x" * 100_000}),
    ],
)
def test_another_answer_is_refused_and_not_quoted(endpoint, answer):
    endpoint.answer = answer
    with pytest.raises(StoreUnavailable, match="did not answer AccessKeyId") as raised:
        fetch(*endpoint.environment.values())
    assert "the-secret" not in str(raised.value)


def test_without_a_token_no_authorization_header_is_sent(endpoint):
    endpoint.token = None
    assert fetch(endpoint.environment[FULL_URI], None)["access_key_id"] == "the-key"


def test_an_endpoint_that_fails_briefly_is_asked_again(endpoint):
    endpoint.failures = ["closed", 500]
    assert fetch(*endpoint.environment.values())["access_key_id"] == "the-key"
    assert endpoint.asked == 3
    endpoint.failures = [503] * 9
    with pytest.raises(StoreUnavailable, match="answered 503"):
        fetch(*endpoint.environment.values())
    assert endpoint.asked == 6


@pytest.mark.usefixtures("environment")
async def test_requests_that_wait_for_a_dead_endpoint_fail_together(endpoint, bucket):
    """The event loop continues meanwhile. obstore alone would ask once for each request, one after the other."""
    endpoint.delay_s = 60
    store, turns = S3ObjectStore("b", bucket[0]), []

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.01)
            turns.append(endpoint.asked)

    watching = asyncio.create_task(watch())
    failed = await asyncio.gather(*(store.get(f"{number}") for number in range(20)), return_exceptions=True)
    watching.cancel()
    assert {type(one) for one in failed} == {StoreUnavailable}
    assert endpoint.asked == 1
    assert turns.count(1) > 1  # of the event loop, while the endpoint was asked
    endpoint.delay_s = 0
    await asyncio.sleep(s3_credentials.REUSE_S)
    assert await store.get("x") is not None
