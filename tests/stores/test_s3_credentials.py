"""Credentials for S3 that obstore does not find by itself."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.s3_credentials import FULL_URI, TOKEN, TOKEN_FILE, container_credentials, provider
from tests.lambda_runtime import CredentialsEndpoint


@pytest.fixture
def endpoint():
    with CredentialsEndpoint("the-key", "the-secret") as endpoint:
        yield endpoint


def test_obstore_is_left_alone_where_it_finds_credentials_itself():
    uri = {FULL_URI: "http://127.0.0.1:1/", TOKEN: "x"}
    assert provider({}) is None
    assert provider({**uri, TOKEN_FILE: "/token"}) is None  # EKS
    assert provider({**uri, "AWS_ACCESS_KEY_ID": "x"}) is None
    assert provider(uri) is not None


def test_the_environment_is_read_at_each_call(endpoint):
    environment = {FULL_URI: "http://127.0.0.1:1/", TOKEN: "old"}
    asked = provider(environment)
    environment |= endpoint.environment  # as a restored snapshot may find it
    found = asked()
    assert (found["access_key_id"], found["secret_access_key"], found["token"]) == ("the-key", "the-secret", "session")
    assert 3500 < (found["expires_at"] - datetime.now(UTC)).total_seconds() <= 3600


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({FULL_URI: "http://example.org/credentials"}, "expected https, or http on this machine"),
        ({FULL_URI: "file:///etc/passwd"}, "expected https, or http on this machine"),
        ({FULL_URI: "http://127.0.0.1:1/"}, "cannot be reached"),
        ({TOKEN: "a-wrong-secret"}, "answered 403"),
    ],
)
def test_what_is_wrong_is_one_sentence_without_a_secret(endpoint, changed, reason):
    with pytest.raises(StoreUnavailable, match=reason) as raised:
        container_credentials({**endpoint.environment, **changed})
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_an_answer_that_is_none_quotes_nothing(endpoint, monkeypatch):
    monkeypatch.setattr(type(endpoint), "TOKEN", "another")
    endpoint.environment[TOKEN] = "another"
    monkeypatch.setattr("tests.lambda_runtime.json.dumps", lambda _: '["the-secret"]')
    with pytest.raises(StoreUnavailable, match="did not answer AccessKeyId") as raised:
        container_credentials(endpoint.environment)
    assert "the-secret" not in str(raised.value)
