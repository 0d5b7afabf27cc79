"""Requests to the zip in the real runtime client: cold and warm calls, logs, bad events, paths, links and limits."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.aws_lambda.instances import ARTICLE, TOKEN, ask, settings
from tests.lambda_runtime import Gateway, Instance, InvocationFailed, http_event
from tests.test_readme import tour_script


def test_the_tour_of_the_readme_on_every_python(ministack_s3, tmp_path, each_task):
    """Two instances take turns, so that every request reads the writes of the other instance."""
    environment = settings(ministack_s3, tmp_path.name)
    with Instance(each_task, environment, tmp_path) as one, Instance(each_task, environment, tmp_path) as two:
        with Gateway([one, two]) as gateway:
            script, check = tour_script(gateway.url)
            signed = f"curl() {{ command curl -H 'Authorization: Bearer {TOKEN}' \"$@\"; }}\n"
            done = subprocess.run(["bash", "-c", signed + script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        check(done.stdout)
        for log in (one.log(), two.log()):
            assert TOKEN not in log
            assert "It shines" not in log


def test_cold_and_warm_calls_do_not_leak(instance):
    one = instance()
    assert one.request("GET", "/healthz").status == 200
    created = ask(one, "POST", "/article", json_body=ARTICLE)
    assert created.status == 201
    path = created.headers["location"]

    def call(number):
        if number % 10:
            assert ask(one, "GET", path).status == 200
        else:
            assert ask(one, "PATCH", path, json_body={"title": f"{number}"}).status == 200

    for number in range(300):
        call(number)
    before = one.resources()
    for number in range(1000):
        call(number)
    memory, files = one.resources()
    assert files <= before[1] + 4, "connections or files grew"  # pools come and go by a few; a leak would be hundreds
    assert memory <= before[0] + 8 * 1024, f"memory grew from {before[0]} KiB to {memory}"
    lines = [line for line in one.lines() if line["message"] == "request"]
    assert [line["cold_start"] for line in lines] == [1] + [0] * 1301
    assert {line["route"] for line in lines} == {"/healthz", "/article", "/article/{id}"}
    (create,) = (line for line in lines if line["method"] == "POST")
    assert create["storage"]["PUT"] >= 2
    assert create["storage_requests"] == sum(create["storage"].values())
    reads = [line["storage"] for line in lines if line["method"] == "GET" and line["route"] == "/article/{id}"]
    assert all(read == {"GET": 2} for read in reads[1:])


def test_each_request_logs_one_line_without_private_data(instance):
    one = instance()
    answer = ask(one, "POST", "/article?status=draft", json_body=ARTICLE | {"title": "a secret title"})
    ask(one, "GET", "/article?author=private-author")
    ask(one, "GET", "/nowhere/private-path")
    one.request("GET", "/article", headers={"authorization": "Bearer wrong-secret"})
    ask(one, "PATCH", answer.headers["location"], json_body={"title": 1})
    lines = one.lines()
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/article", 201),
        ("/article", 200),
        ("none", 404),
        ("none", 401),
        ("/article/{id}", 422),
    ]
    for line in lines:
        assert re.fullmatch(r"[0-9a-f-]{36}", line["request_id"])
        (metrics,) = line["_aws"]["CloudWatchMetrics"]
        assert metrics["Dimensions"] == [["service"]]
        assert {metric["Name"] for metric in metrics["Metrics"]} <= line.keys()
        assert line["service"] == "crudstack-test"
    assert answer.headers["x-request-id"] == lines[0]["request_id"]
    for secret in ("secret", "private", TOKEN, answer.json()["meta"]["resource_id"]):
        assert secret not in one.log()


@pytest.mark.parametrize(
    "event",
    [
        {},
        None,
        [],
        "x",
        7,
        {"Records": [{"eventSource": "aws:s3"}]},
        {"httpMethod": "GET", "path": "/", "requestContext": {}, "resource": "/"},
        {**http_event("GET", "/article"), "version": "1.0"},
        {**http_event("GET", "/article"), "requestContext": {}},
        {**http_event("GET", "/article"), "requestContext": None},
        {**http_event("GET", "/article"), "headers": None},
        {**http_event("GET", "/article"), "headers": {"a": 1}},
        {**http_event("GET", "/article"), "rawPath": 7},
        {**http_event("GET", "/article"), "body": {"a": 1}},
        {**http_event("POST", "/article"), "body": "***", "isBase64Encoded": True},
        {**http_event("POST", "/article"), "body": "\ud800"},
        {**http_event("GET", "/article"), "headers": {"x": "\udfff"}},
    ],
)
def test_an_unknown_event_is_refused_with_its_reason(shared, event):
    with pytest.raises(InvocationFailed) as failed:
        shared.invoke(event)
    said = failed.value.error
    assert said["errorType"] == "ValueError"
    assert said["errorMessage"].startswith("this event cannot be handled: ")
    assert "scheduled event" in said["errorMessage"]
    assert shared.request("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "a:b:c"},
        {"host": "[::1]:80"},
        {"x-forwarded-port": "x"},
        {"x-forwarded-proto": "*"},
        {"host": ""},
        {"content-type": "é"},
        {"cookie": "a=b"},
    ],
)
def test_odd_headers_get_an_answer(shared, headers):
    answer = shared.invoke(http_event("GET", "/article", headers=headers))
    assert answer["statusCode"] == 401
    assert answer["headers"]["content-type"] == "application/problem+json"


@pytest.mark.parametrize("gateway", ["http-api", "function-url"])
@pytest.mark.parametrize(
    "path",
    [
        "/%61rticle/a%7Eb",
        "/article/%C3%A4",
        "/article/a%2Fb",
        "/article/a%252Fb",
        "/article/a%20b%3Fc",
        "/article/%ff",
        "/caf%C3%A9",
    ],
)
def test_paths_with_encoded_characters(shared, gateway, path):
    """Both gateways lead to the same resource, and links lead to it."""
    ids = {"/%61rticle/a%7Eb": "a~b"}
    answer = ask(shared, "PUT", path, gateway=gateway, json_body=ARTICLE, headers={"if-none-match": "*"})
    if path in ids:
        assert answer.status in (201, 412)
        assert ask(shared, "GET", path, gateway=gateway).json()["meta"]["resource_id"] == ids[path]
    else:
        assert answer.status in (404, 422), answer.body
    if answer.status == 201:
        assert answer.headers["location"] in (path, "/article/a~b")
        assert ask(shared, "GET", answer.headers["location"], gateway=gateway).status == 200


def test_a_query_with_encoded_characters(shared):
    created = ask(shared, "POST", "/article", json_body=ARTICLE | {"author": "ä&=+ b"})
    found = ask(shared, "GET", "/article?author=%C3%A4%26%3D%2B%20b&limit=1")
    assert [item["meta"]["resource_id"] for item in found.json()["items"]] == [created.json()["meta"]["resource_id"]]


def check_links(one: Instance, prefix: str, **how) -> None:
    """Check that every link in an answer begins with the prefix and leads to its resource."""
    ids = [ask(one, "POST", f"{prefix}/article", json_body=ARTICLE, **how).headers["location"] for _ in range(2)]
    chosen = f"{prefix}/article/{ids[0].rpartition('/')[2]}-again"
    put = ask(one, "PUT", chosen, json_body=ARTICLE, headers={"if-none-match": "*"}, **how)
    assert (put.status, put.headers["location"]) == (201, chosen)
    for path in ids:
        assert path.startswith(f"{prefix}/article/")
        assert ask(one, "GET", path, **how).status == 200
    page = ask(one, "GET", f"{prefix}/article?limit=1", **how)
    link = re.fullmatch(r'<(.+)>; rel="next"', page.headers["link"])[1]
    assert link.startswith(f"{prefix}/article?limit=1&cursor=")
    assert len(ask(one, "GET", link, **how).json()["items"]) == 1
    description = ask(one, "GET", f"{prefix}/openapi.json", **how).json()
    assert description.get("servers") == ([{"url": prefix}] if prefix else None)
    assert one.request("GET", f"{prefix}/healthz", **how).status == 200


AWS_NAME, OWN_NAME = "abc123.execute-api.us-east-1.amazonaws.com", "api.example.org"


@pytest.mark.parametrize(
    ("prefix", "how"),
    [
        ("", {"stage": "$default"}),
        ("/dev", {"stage": "dev"}),
        ("/article", {"stage": "article"}),
        ("", {"stage": "dev", "domain": OWN_NAME}),
        ("", {"gateway": "function-url"}),
    ],
)
def test_links_have_the_prefix_of_the_gateway(shared, prefix, how):
    check_links(shared, prefix, **how)


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/devother/healthz", {"stage": "dev"}),
        ("/dev", {"stage": "dev"}),
        ("/dev//healthz", {"stage": "dev"}),
        ("/dev/dev/healthz", {"stage": "dev"}),
        ("/dev/healthz", {"stage": "$default"}),
        ("/$default/healthz", {"stage": "$default"}),
        ("/dev/healthz", {"stage": "dev", "domain": OWN_NAME}),
        ("/dev/healthz", {"stage": "dev", "domain": "execute-api.example.org"}),
    ],
)
def test_only_the_stage_is_removed_from_a_path(shared, path, how):
    assert ask(shared, "GET", path, **how).status == 404
    assert shared.request("GET", path, **how).status == 401


def test_the_path_comes_from_one_field_of_the_event(shared):
    event = http_event("GET", "/healthz")
    event["requestContext"]["http"]["path"] = "/article"
    assert shared.invoke(event)["statusCode"] == 200
    event["rawPath"], event["requestContext"]["http"]["path"] = "/article", "/healthz"
    assert shared.invoke(event)["statusCode"] == 401


def test_the_base_path_of_a_mapping(instance):
    one = instance(base_path="/v1/api")
    check_links(one, "/v1/api", domain=OWN_NAME)
    # Requests by other paths get the same links, which users know.
    for path, how in [
        ("/article", {"domain": OWN_NAME}),
        ("/dev/article", {"stage": "dev"}),
        ("/dev/v1/api/article", {"stage": "dev"}),
    ]:
        made = ask(one, "POST", path, json_body=ARTICLE, **how)
        assert (made.status, made.headers["location"].rpartition("/")[0]) == (201, "/v1/api/article")
    assert ask(one, "GET", "/v1/article").status == 404
    assert ask(one, "GET", "/v1/apiary/article").status == 404
    assert one.request("GET", "/v1/api/healthz").status == 200
    for path in ("/v1/api/article", "/v1/api/healthz/", "/v1/api//healthz", "/v1/api/v1/api/healthz"):
        assert one.request("GET", path).status == 401


def test_an_answer_without_content_has_no_content_type(shared):
    path = ask(shared, "POST", "/article", json_body=ARTICLE).headers["location"]
    tag = {"if-none-match": ask(shared, "GET", path).headers["etag"]}
    answers = [
        ask(shared, method, below, headers=tag) for method in ("GET", "HEAD") for below in (path, f"{path}/data")
    ]
    answers.append(ask(shared, "DELETE", path))
    assert [answer.status for answer in answers] == [304] * 4 + [204]
    for answer in answers:
        assert answer.body == b""
        assert not {"content-type", "content-length"} & answer.headers.keys()


def test_bodies_at_the_limits(instance):
    one = instance()
    for text in ("x" * 5_900_000, "ä" * 2_900_000, '"\\' * 500_000 + "\u2028" * 300_000):
        created = ask(one, "POST", "/article", json_body=ARTICLE | {"content": text})
        assert created.status == 201
        path = created.headers["location"]
        assert created.json()["meta"]["resource_id"] == path.rpartition("/")[2]
        whole = ask(one, "GET", path)
        if whole.status == 200:
            assert whole.json()["data"]["content"] == text
        else:
            assert (whole.status, whole.json()["type"]) == (400, "urn:crudstack:response-too-large")
        assert ask(one, "GET", f"{path}?fields=title").json()["data"] == {"title": "Sun"}
        assert ask(one, "PATCH", path, json_body={"title": "Moon"}).status == 200
    items, cursor, pages = [], "", 0
    while cursor is not None:
        page = ask(one, "GET", f"/article?limit=200{cursor and '&cursor=' + cursor}").json()
        items, cursor, pages = items + page["items"], page["next_cursor"], pages + 1
    assert (len(items), pages) == (3, 3)
    binary = json.dumps(ARTICLE | {"content": "y" * 4_000_000}).encode()
    sent = ask(one, "POST", "/article", body=binary, headers={"content-type": "application/json"})
    assert sent.status == 201
    assert ask(one, "GET", f"{sent.headers['location']}/data").json()["content"] == "y" * 4_000_000


def test_a_write_with_a_too_large_answer_is_acknowledged_briefly(instance):
    """A patch may make a resource too large for one answer. The answer then has only the metadata."""
    one = instance()
    path = ask(one, "POST", "/article", json_body=ARTICLE | {"content": "x" * 3_500_000}).headers["location"]
    grown = ask(one, "PATCH", path, json_body={"title": '"' * 1_390_000})
    assert grown.status == 200
    assert (set(grown.json()), grown.json()["meta"]["revision"]) == ({"meta"}, 2)
    assert ask(one, "GET", path).status == 400
    ask(one, "POST", "/article", json_body=ARTICLE)
    first = ask(one, "GET", "/article?limit=2").json()
    (item,) = first["items"]
    assert (item["meta"], item["data"]) == (grown.json()["meta"], None)
    assert item["error"]["type"] == "urn:crudstack:response-too-large"
    (item,) = ask(one, "GET", f"/article?limit=2&cursor={first['next_cursor']}").json()["items"]
    assert item["data"] == ARTICLE | {"published": False}
    assert len(ask(one, "GET", f"{path}?fields=content").json()["data"]["content"]) == 3_500_000
