"""The zip through the real runtime client: cold starts, a thousand warm calls, bad events, limits, cut connections, freezes, time-outs."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.credentials import REUSE_S
from infra.artifact import interpreter
from tests.lambda_runtime import CredentialsEndpoint, Gateway, Instance, InvocationFailed, http_event, unpack
from tests.services import BUCKET
from tests.tcp_proxy import TcpProxy
from tests.test_readme import tour_script

TOKEN = "a-very-secret-token-0123456789"  # noqa: S105 - of these tests
ARTICLE = {"title": "Sun", "content": "It shines.", "author": "alice"}
SIGNED_IN = {"authorization": f"Bearer {TOKEN}"}


def other_version() -> list[str]:
    """Lambda's Python, where it can be had; `make package` and tests/infra fail with a sentence where it cannot."""
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
    """What runs on Lambda's version of Python, or else on this one."""
    return unpack(VERSIONS[-1], tmp_path_factory.mktemp("task"))


def settings(s3, prefix: str, url: str | None = None, **outputs) -> dict[str, str]:
    token = {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
    stack = {"version": 1, "storage": "s3-sqlite", "bucket": BUCKET, "prefix": prefix, "auth": token, **outputs}
    return {
        "CRUDSTACK_OUTPUTS": json.dumps(stack),
        "AWS_ENDPOINT_URL_S3": url or s3.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
    }


@pytest.fixture
def instance(ministack_s3, tmp_path, task):
    """Start instances that share a bucket."""
    with contextlib.ExitStack() as stack:
        yield lambda url=None, task=task, **outputs: stack.enter_context(
            Instance(task, settings(ministack_s3, tmp_path.name, url, **outputs), tmp_path)
        )


def ask(one: Instance, method: str, path: str, **how):
    headers = {**SIGNED_IN, **how.pop("headers", {})}
    return one.request(method, path, headers=headers, **how)


def test_the_tour_on_every_python(ministack_s3, tmp_path, each_task):
    """Two instances take turns, so that every request meets the other's writes."""
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


@contextlib.contextmanager
def restored(ministack_s3, tmp_path, task, endpoint, **changed):
    """An instance with SnapStart that was restored from its snapshot."""
    environment = settings(ministack_s3, tmp_path.name) | endpoint.environment | changed
    with Instance(task, environment, tmp_path, snap_start=True) as one:
        one.restore()
        yield one


@pytest.fixture
def endpoint(ministack_s3):
    with CredentialsEndpoint(ministack_s3.access_key_id, ministack_s3.secret_access_key) as endpoint:
        yield endpoint


def test_snap_start_takes_its_keys_from_the_endpoint(ministack_s3, tmp_path, task, endpoint):
    with restored(ministack_s3, tmp_path, task, endpoint) as one:
        assert one.request("GET", "/healthz").status == 200
        assert endpoint.asked == 0  # nothing that the snapshot could hold
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        for _ in range(20):
            assert ask(one, "GET", path).status == 200
        assert 1 <= endpoint.asked <= 3  # at most once for each client of the store
        assert endpoint.TOKEN not in one.log()


def test_keys_that_end_are_fetched_again(ministack_s3, tmp_path, task, endpoint):
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
def test_a_token_that_is_refused_is_a_503_and_not_logged(ministack_s3, tmp_path, task, endpoint, token, reason):
    wrong = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": token}
    with restored(ministack_s3, tmp_path, task, endpoint, **wrong) as one:
        for method, how in (("GET", {}), ("POST", {"json_body": ARTICLE})):
            answer = ask(one, method, "/article", **how)
            assert (answer.status, answer.json()["type"]) == (503, "urn:crudstack:store-unavailable")
            assert "secret" not in answer.body.decode()
        assert reason in one.log()
        assert "another-secret" not in one.log()


def test_a_dead_endpoint_is_a_503_in_time(ministack_s3, tmp_path, task, endpoint):
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


def test_cold_and_warm(instance):
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


def test_one_line_a_request(instance):
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
def test_bad_events_are_told_apart(shared, event):
    with pytest.raises(InvocationFailed) as failed:
        shared.invoke(event)
    said = failed.value.error
    assert said["errorType"] == "ValueError"
    assert said["errorMessage"].startswith("this event cannot be handled: ")
    assert "scheduled event" in said["errorMessage"]
    assert shared.request("GET", "/healthz").status == 200


@pytest.fixture(scope="module")
def shared(ministack_s3, tmp_path_factory, task):
    """An instance for tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("shared")
    with Instance(task, settings(ministack_s3, directory.name), directory) as one:
        yield one


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
    """Neither gateway makes another resource of it, and links lead where they should."""
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


def linked(one: Instance, prefix: str, **how) -> None:
    """All that an answer links to begins with the prefix, and leads to what it says."""
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
def test_links_lead_where_the_gateway_is(shared, prefix, how):
    linked(shared, prefix, **how)


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
def test_only_a_stage_is_taken_away(shared, path, how):
    assert ask(shared, "GET", path, **how).status == 404
    assert shared.request("GET", path, **how).status == 401


def test_a_path_is_that_of_one_field(shared):
    event = http_event("GET", "/healthz")
    event["requestContext"]["http"]["path"] = "/article"
    assert shared.invoke(event)["statusCode"] == 200
    event["rawPath"], event["requestContext"]["http"]["path"] = "/article", "/healthz"
    assert shared.invoke(event)["statusCode"] == 401


def test_the_base_path_of_a_mapping(instance):
    one = instance(base_path="/v1/api")
    linked(one, "/v1/api", domain=OWN_NAME)
    # Asked otherwise, the links stay those that its users know.
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


def test_no_content_has_no_type(shared):
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


def test_what_was_written_but_cannot_be_told_is_told_briefly(instance):
    """A patch may make more of a resource than one answer holds; it is acknowledged all the same."""
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


def test_connections_that_were_cut_cost_no_request(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        one = instance(proxy.url)
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        for number in range(20):
            one.freeze()
            cut = proxy.cut()
            one.thaw()
            if number % 2:
                assert ask(one, "PATCH", path, json_body={"title": f"{number}"}).status == 200
            else:
                assert ask(one, "GET", path).status == 200
            assert cut >= 1
        assert ask(one, "GET", path).json()["meta"]["revision"] == 11


def test_frozen_while_another_instance_writes(instance):
    frozen, other = instance(), instance()
    path = ask(frozen, "POST", "/article", json_body=ARTICLE).headers["location"]
    for round_ in range(5):
        frozen.freeze()
        for number in range(30):
            changed = ask(other, "PATCH", path, json_body={"title": f"{round_} {number}"})
            assert changed.status == 200
        other.invoke({"crudstack": "maintain"})
        frozen.thaw()
        seen = ask(frozen, "GET", path)
        assert (seen.headers["etag"], seen.json()["data"]["title"]) == (changed.headers["etag"], f"{round_} 29")
        stale = ask(frozen, "PATCH", path, json_body={"title": "stale"}, headers={"if-match": '"1-0000000000000000"'})
        assert stale.status == 412
        assert ask(frozen, "POST", "/article", json_body=ARTICLE | {"title": f"{round_}"}).status == 201
    assert ask(other, "GET", "/article/count").json() == {"count": 6}
    revisions = ask(other, "GET", f"{path}/revisions?limit=200").json()["items"]
    assert [one["revision"] for one in revisions] == list(range(151, 0, -1))


def test_two_instances_write_at_once_and_are_frozen_at_any_moment(instance):
    instances, acknowledged, ended = [instance(), instance()], [[], []], threading.Event()

    def write(at):
        for number in itertools.count():
            if ended.is_set():
                return
            created = ask(instances[at], "POST", "/article", json_body=ARTICLE | {"title": f"{at}.{number}"})
            assert created.status in (201, 503), created.body
            if created.status == 201:
                acknowledged[at].append((created.headers["location"], f"{at}.{number}"))

    threads = [threading.Thread(target=write, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for round_ in range(12):
        goal = len(acknowledged[1 - round_ % 2]) + 8
        instances[round_ % 2].freeze()
        while len(acknowledged[1 - round_ % 2]) < goal:
            threads[0].join(0.005)
        instances[round_ % 2].thaw()
    ended.set()
    for thread in threads:
        thread.join()
    for path, title in itertools.chain(*acknowledged):
        for one in instances:
            assert ask(one, "GET", f"{path}/data").json()["title"] == title


def test_the_time_ends_in_the_middle_of_a_write(instance, ministack_s3):
    """The answer to the swap is held up: the client hears 503 in time, and with the same key it is done once, wherever it asks."""
    key = {"idempotency-key": "order-17"}
    with TcpProxy(ministack_s3.url) as proxy:
        slow, other = instance(proxy.url), instance()
        assert ask(slow, "POST", "/article", json_body=ARTICLE).status == 201
        proxy.hold()
        late = ask(slow, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key, seconds=2.5)
        assert (late.status, late.json()["type"]) == (503, "urn:crudstack:outcome-unknown")
        first = ask(other, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key)
        assert first.status == 201
        proxy.release()
        again = ask(slow, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key)
        assert (again.status, again.body) == (201, first.body)
        assert again.headers["idempotency-replayed"] == "true"
        assert ask(slow, "GET", "/article/count").json() == {"count": 2}
        proxy.hold()
        read = ask(slow, "GET", "/article/count", seconds=2.0)
        assert (read.status, read.json()["type"]) == (503, "urn:crudstack:store-unavailable")


@pytest.mark.parametrize(("memory", "seconds", "status"), [(128, 6.0, 503), (512, 29.0, 200)])
def test_work_in_python_is_refused_if_it_might_not_end(ministack_s3, tmp_path, task, memory, seconds, status):
    """A text of five megabytes in escapes is a third of a second of a whole CPU, of which a function has a share.

    Running Python is not interrupted by a timer. What is refused was not done; what the limits allow is done with the defaults.
    """
    environment = settings(ministack_s3, tmp_path.name) | {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory)}
    body = json.dumps({"content": "\x01" * 600_000})  # each is six characters, and two more in an event
    with Instance(task, environment, tmp_path) as one:
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        ask(one, "PATCH", path, json_body={"title": "Moon"})
        before = ask(one, "GET", path)
        with one.throttled(memory / 1769):
            answer = ask(
                one, "PATCH", path, body=body, seconds=seconds, headers={"content-type": "application/merge-patch+json"}
            )
        assert answer.status == status, answer.body
        after = ask(one, "GET", path)
        if status == 503:
            assert answer.json()["type"] == "urn:crudstack:not-enough-time"
            assert after.body == before.body
        else:
            assert after.json()["meta"]["revision"] == 3


def test_housekeeping_that_takes_long_is_cut_off(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        one = instance(proxy.url)
        for number in range(20):
            assert ask(one, "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}).status == 201
        proxy.hold()
        one.invoke({"crudstack": "maintain"}, seconds=3)
        assert one.lines()[-1]["message"].startswith("maintain was cut off")
        proxy.release()
        assert ask(one, "GET", "/article/count").json() == {"count": 20}
        one.invoke({"crudstack": "maintain"})
        assert one.lines()[-1]["message"] == "maintain"


def test_killed_in_the_middle_of_a_write(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        for number in range(6):
            key = {"idempotency-key": f"key-{number}"}
            doomed = instance(proxy.url)
            assert doomed.request("GET", "/healthz").status == 200
            proxy.hold()
            asked = threading.Thread(target=_unheard, args=(doomed, key, number))
            asked.start()
            assert proxy.held.wait(20)
            doomed.kill()
            asked.join()
            proxy.release()
            proxy.cut()
            told = [
                ask(instance(), "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}, headers=key)
                for _ in range(2)
            ]
            assert [one.status for one in told] == [201, 201]
            assert told[0].body == told[1].body
    assert ask(instance(), "GET", "/article/count").json() == {"count": 6}


def _unheard(doomed: Instance, key, number) -> None:
    with pytest.raises(InvocationFailed):
        ask(doomed, "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}, headers=key)


def test_scheduled_housekeeping(instance):
    one = instance()
    ask(one, "POST", "/article", json_body=ARTICLE)
    scheduled = {"version": "0", "id": "1", "detail-type": "Scheduled Event", "source": "aws.events", "detail": {}}
    assert one.invoke(scheduled, 10)["maintained"] == ["airport", "article", "user"]
    (line,) = (line for line in one.lines() if line["message"] == "maintain")
    assert 7 < line["budget_s"] <= 9


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


def test_the_open_route_leads_to_healthz_only(instance):
    """API Gateway calls the function without a token for the path /healthz, and hands on no claims then."""
    one = instance(auth={"mode": "jwt", "issuer": "https://issuer.example", "audiences": ["app"]})
    for method, status in (("GET", 200), ("HEAD", 200), ("POST", 405), ("DELETE", 405)):
        assert one.request(method, "/healthz").status == status
    for path in ("/healthz/", "/healthz/x", "//healthz", "/healthz/../article", "/healthz%2F..%2Farticle", "/Healthz"):
        assert one.request("GET", path, headers=SIGNED_IN).status == 401, path
    for gateway in ("http-api", "function-url"):
        assert one.request("GET", "/%68ealthz", gateway=gateway).body == b'{"status":"ok"}'


def test_claims_that_api_gateway_verified(instance):
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
def test_what_cannot_run_there_is_refused_in_one_sentence(instance, outputs, said):
    with pytest.raises(InvocationFailed) as failed:
        instance(**outputs).invoke({})
    assert failed.value.error["errorType"] == "ConfigError"
    assert said in failed.value.error["errorMessage"]
    assert "\n" not in failed.value.error["errorMessage"]


def test_the_disk_of_a_function_is_no_storage(ministack_s3, tmp_path, task):
    environment = settings(ministack_s3, tmp_path.name, storage="disk") | {"CRUDSTACK_DATA_DIR": str(tmp_path)}
    with Instance(task, environment, tmp_path) as one, pytest.raises(InvocationFailed) as failed:
        one.invoke({})
    assert "use s3-sqlite" in failed.value.error["errorMessage"]
    assert not list(os.scandir(tmp_path / "article")) if (tmp_path / "article").exists() else True


@pytest.mark.parametrize("gateway", ["http-api", "function-url"])
def test_where_nobody_signs_in_foreign_pages_change_nothing(instance, gateway):
    """The gateway's own name decides; what the client writes into Host and the like does not."""
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
