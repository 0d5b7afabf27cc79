"""Access control of a function, its own AWS credentials, and configurations that are refused."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest

from app.autocrud.resource_manager.backends.s3.credentials import REUSE_S
from tests.aws_lambda.instances import ARTICLE, SIGNED_IN, TOKEN, ask, settings
from tests.lambda_runtime import Instance, InvocationFailed, http_event


@contextlib.contextmanager
def restored(ministack_s3, tmp_path, task, endpoint, **changed):
    """Run an instance with SnapStart that was restored from its snapshot."""
    environment = settings(ministack_s3, tmp_path.name) | endpoint.environment | changed
    with Instance(task, environment, tmp_path, snap_start=True) as one:
        one.restore()
        yield one


def test_snap_start_gets_its_keys_from_the_endpoint(ministack_s3, tmp_path, task, endpoint):
    with restored(ministack_s3, tmp_path, task, endpoint) as one:
        assert one.request("GET", "/healthz").status == 200
        assert endpoint.asked == 0  # so the snapshot holds no keys
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        for _ in range(20):
            assert ask(one, "GET", path).status == 200
        assert 1 <= endpoint.asked <= 3  # at most once for each client of the store
        assert endpoint.TOKEN not in one.log()


def test_expired_keys_are_fetched_again(ministack_s3, tmp_path, task, endpoint):
    endpoint.lives_s = 2
    with restored(ministack_s3, tmp_path, task, endpoint) as one:
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        before = endpoint.asked
        time.sleep(2.1)
        assert ask(one, "GET", path).status == 200
        assert endpoint.asked > before


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("another-secret", "answered 403"),
        ("another-secret\r\nx: y", "has characters that no HTTP header can have"),
    ],
)
def test_a_rejected_token_gives_503_and_is_not_logged(ministack_s3, tmp_path, task, endpoint, token, reason):
    wrong = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": token}
    with restored(ministack_s3, tmp_path, task, endpoint, **wrong) as one:
        for method, how in (("GET", {}), ("POST", {"json_body": ARTICLE})):
            answer = ask(one, method, "/article", **how)
            assert (answer.status, answer.json()["type"]) == (503, "urn:crudstack:store-unavailable")
            assert "secret" not in answer.body.decode()
        assert reason in one.log()
        assert "another-secret" not in one.log()


def test_an_endpoint_that_does_not_answer_gives_503_in_time(ministack_s3, tmp_path, task, endpoint):
    endpoint.dead = True
    with restored(ministack_s3, tmp_path, task, endpoint) as one:
        assert ask(one, "GET", "/article/sun").status == 503
        endpoint.dead, endpoint.delay_s = False, 60
        time.sleep(REUSE_S)
        for method, how in (("GET", {}), ("POST", {"json_body": ARTICLE})):
            answer = ask(one, method, "/article", **how)
            assert (answer.status, answer.json()["type"]) == (503, "urn:crudstack:store-unavailable")
            time.sleep(REUSE_S)
        assert "did not answer within 2 s" in one.log()
        endpoint.delay_s = 0
        assert ask(one, "GET", "/article/sun").status == 404
        assert endpoint.TOKEN not in one.log()


def test_without_credentials_only_healthz_answers(instance):
    one = instance()
    assert one.request("GET", "/healthz").status == 200
    for path in (
        "/",
        "/article",
        "/article/x",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/healthz/",
        "/healthz/../article",
        "//article",
        "/%68ealthz2",
    ):
        for headers in (
            {},
            {"authorization": "Bearer "},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": TOKEN},
            {"authorization": "Bearer é"},
        ):
            answer = one.request("GET", path, headers=headers)
            assert (answer.status, answer.json()["type"]) == (401, "urn:crudstack:unauthenticated"), path
    assert ask(one, "GET", "/openapi.json").status == 200


def test_the_public_route_leads_only_to_healthz(instance):
    """For the path /healthz, API Gateway calls the function without a token and passes no claims."""
    one = instance(auth={"mode": "jwt", "issuer": "https://issuer.example", "audiences": ["app"]})
    for method, status in (("GET", 200), ("HEAD", 200), ("POST", 405), ("DELETE", 405)):
        assert one.request(method, "/healthz").status == status
    for path in ("/healthz/", "/healthz/x", "//healthz", "/healthz/../article", "/healthz%2F..%2Farticle", "/Healthz"):
        assert one.request("GET", path, headers=SIGNED_IN).status == 401, path
    for gateway in ("http-api", "function-url"):
        assert one.request("GET", "/%68ealthz", gateway=gateway).body == b'{"status":"ok"}'


def test_claims_verified_by_api_gateway(instance):
    auth = {"mode": "jwt", "issuer": "https://issuer.example", "audiences": ["app"]}
    one = instance(auth=auth)
    good = {"iss": "https://issuer.example", "aud": "[app other]", "sub": "alice", "scope": "read write"}
    created = one.request("POST", "/article", json_body=ARTICLE, claims=good)
    assert (created.status, created.json()["meta"]["created_by"]) == (201, "alice")
    for claims in (
        None,
        {},
        good | {"iss": "https://other.example"},
        good | {"aud": "other"},
        {**good, "sub": ""},
        {"sub": "alice"},
    ):
        assert one.request("GET", "/article", claims=claims, headers=SIGNED_IN).status == 401
    assert one.request("GET", "/article", claims={**good, "aud": "", "client_id": "app"}).status == 200


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (
            {"storage": "memory"},
            "the storage of article, airport, user is in the memory or on the disk of this function",
        ),
        (
            {"storage_overrides": {"user": "memory"}},
            "the storage of user is in the memory or on the disk of this function",
        ),
        ({"auth": None}, "auth is not set"),
        ({"bucket": None}, "CRUDSTACK_BUCKET is not set"),
        ({"storage": "disk"}, "CRUDSTACK_DATA_DIR is not set"),
        ({"auth": {"mode": "token", "token_sha256": "short"}}, "auth.token_sha256"),
    ],
)
def test_an_unusable_configuration_is_refused_in_one_sentence(instance, outputs, said):
    with pytest.raises(InvocationFailed) as failed:
        instance(**outputs).invoke({})
    assert failed.value.error["errorType"] == "ConfigError"
    assert said in failed.value.error["errorMessage"]
    assert "\n" not in failed.value.error["errorMessage"]


def test_the_storage_disk_is_refused(ministack_s3, tmp_path, task):
    environment = settings(ministack_s3, tmp_path.name, storage="disk") | {"CRUDSTACK_DATA_DIR": str(tmp_path)}
    with Instance(task, environment, tmp_path) as one, pytest.raises(InvocationFailed) as failed:
        one.invoke({})
    assert "use s3-sqlite" in failed.value.error["errorMessage"]
    assert not list(os.scandir(tmp_path / "article")) if (tmp_path / "article").exists() else True


@pytest.mark.parametrize("gateway", ["http-api", "function-url"])
def test_foreign_pages_change_nothing_if_auth_is_none(instance, gateway):
    """The origin is compared with the gateway's own name, not with Host and other headers of the client."""
    one = instance(auth={"mode": "none"}, cors=["https://app.example.org"])
    own = http_event("GET", "/", gateway=gateway)["requestContext"]["domainName"]
    made = one.request("POST", "/article", json_body=ARTICLE, gateway=gateway)
    assert made.status == 201
    path = made.headers["location"]
    for page, status in [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "https://evil.example", "host": "evil.example", "x-forwarded-host": "evil.example"}, 403),
        ({"origin": f"http://{own}"}, 403),
        ({"origin": "http://localhost:5173"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": f"https://{own}"}, 200),
        ({"origin": "https://app.example.org", "sec-fetch-site": "cross-site"}, 200),
        ({}, 200),
    ]:
        title = {"title": json.dumps(page)}
        assert one.request("PATCH", path, json_body=title, headers=page, gateway=gateway).status == status, page
        assert one.request("GET", path, headers=page, gateway=gateway).status == 200
    assert json.loads(one.request("GET", "/article/count", gateway=gateway).body) == {"count": 1}
