"""The prefix of the API behind a proxy: requests with and without it are answered, and links have it."""

from __future__ import annotations

import re

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import settings
from app.autocrud.errors import ConfigError
from app.autocrud.http.messages import route_path
from app.base_path import below, put_below
from app.main import create_app
from app.server.overload import HEALTH, Overload

ARTICLE = {"title": "Sun", "content": "It shines.", "author": "alice"}


def client(base: str | None, **more: str) -> httpx.AsyncClient:
    environment = {"CRUDSTACK_STORAGE": "memory", **({} if base is None else {"CRUDSTACK_BASE_PATH": base}), **more}
    app = create_app(settings.load(environment))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


@pytest.mark.parametrize(("base", "prefix"), [(None, ""), ("/", ""), ("/v1", "/v1"), ("/a.b/c~d", "/a.b/c~d")])
async def test_links_have_the_prefix(base, prefix):
    async with client(base) as api:
        for asked in {"", prefix}:  # a proxy may remove it
            made = [await api.post(f"{asked}/article", json=ARTICLE) for _ in range(2)]
            for created in made:
                assert created.headers["location"].startswith(f"{prefix}/article/")
                assert (await api.get(created.headers["location"])).status_code == 200
            link = re.fullmatch(r'<(.+)>; rel="next"', (await api.get(f"{asked}/article?limit=1")).headers["link"])
            assert link is not None
            assert link[1].startswith(f"{prefix}/article?")
            assert (await api.get(link[1])).status_code == 200
            page = (await api.get(f"{asked}/docs")).text
            links = re.findall(r"(?:href|src)=\"([^\"]+)\"|url: '([^']+)'", page)
            assert len(links) >= 4
            for path in map("".join, links):
                assert path.startswith(f"{prefix}/")
                assert (await api.get(path)).status_code == 200
            servers = (await api.get(f"{asked}/openapi.json")).json().get("servers")
            assert servers == ([{"url": prefix}] if prefix else None)


async def test_the_prefix_matches_only_whole_segments():
    async with client("/v1") as api:
        for path in ("/v1", "/v1/", "/v1x/article", "/v1//article", "/v1/v1/article", "/v2/article"):
            assert (await api.get(path)).status_code == 404, path
        assert (await api.get("/%76%31/article")).status_code == 200
        assert (await api.get("/v1%2Farticle")).status_code == 404


async def test_the_prefix_does_not_bypass_authentication():
    async with client("/v1", CRUDSTACK_AUTH='{"mode": "token", "token_sha256": "%s"}' % ("0" * 64)) as api:
        for path in ("/healthz", "/v1/healthz"):
            assert (await api.get(path)).status_code == 200
        for path in ("/v1/article", "/v1/v1/healthz", "/v1//healthz", "/v1/healthz/", "/v1/docs", "/v1/openapi.json"):
            assert (await api.get(path)).status_code == 401, path


async def test_a_retry_under_the_other_path_is_idempotent():
    async with client("/v1") as api:
        key = {"idempotency-key": "order-17"}
        answers = [await api.post(path, json=ARTICLE, headers=key) for path in ("/v1/article", "/article")]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert len({answer.headers["location"] for answer in answers}) == 1


async def test_health_checks_never_wait_under_the_prefix():
    """No slot is free, and the queue has no space."""
    asked = []

    async def app(scope, _receive, _send):
        asked.append(scope["path"])

    async def send(message):
        sent.append(message.get("status"))

    limited = Overload(app, in_progress=0, queued=0, base="/v1")
    for path in (HEALTH, f"/v1{HEALTH}", f"/v2{HEALTH}", "/article"):
        sent: list[int | None] = []
        await limited({"type": "http", "method": "GET", "path": path}, None, send)
        assert (503 in sent) == (path not in (HEALTH, f"/v1{HEALTH}"))
    assert asked == [HEALTH, f"/v1{HEALTH}"]


@pytest.mark.parametrize(
    "base",
    ["v1", "/v1/", "//v1", "/a//b", "/..", "/a/../b", "/.", "/a b", "/a%20b", "/a?b", "/ä", "https://a/b", "/v1\n"],
)
def test_an_invalid_prefix_is_refused(base):
    with pytest.raises(ConfigError, match="expected a path like /v1"):
        settings.load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_BASE_PATH": base})


@pytest.mark.parametrize("base", ["/article", "/healthz/x", "/docs"])
def test_a_prefix_that_begins_like_a_route_is_refused(base):
    with pytest.raises(ConfigError, match="begins like a path of the API"):
        client(base)


def test_the_environment_overrides_the_stack():
    outputs = '{"version": 1, "storage": "memory", "base_path": "/v1"}'
    assert settings.load({"CRUDSTACK_OUTPUTS": outputs}).base_path == "/v1"
    assert settings.load({"CRUDSTACK_OUTPUTS": outputs, "CRUDSTACK_BASE_PATH": "/v2"}).base_path == "/v2"
    assert settings.load({"CRUDSTACK_OUTPUTS": outputs, "CRUDSTACK_BASE_PATH": "/"}).base_path == ""
    with pytest.raises(ConfigError, match="base_path is 'v1'"):
        settings.load({"CRUDSTACK_OUTPUTS": outputs.replace("/v1", "v1")})


SEGMENT = st.text("abv1.~-_", min_size=1, max_size=3)
PATHS = st.lists(st.text("abv1%2F/", max_size=6), max_size=4).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(SEGMENT, max_size=3), PATHS)
def test_a_resource_created_under_the_prefix_is_found_under_it(segments, path):
    root = "".join(f"/{segment}" for segment in segments)
    assert below(root + path, root) == path
    scope: dict[str, object] = {}
    put_below(scope, root, path)
    plain: dict[str, object] = {}
    put_below(plain, "", path)
    assert route_path(scope) == route_path(plain) == plain["path"]
    if (rest := below(path, root)) is not None:
        assert rest.startswith("/")
        assert path.count("/") >= len(segments)
