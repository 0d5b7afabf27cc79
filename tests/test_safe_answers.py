"""The headers of responses for browsers and caches, on every kind of route."""

from __future__ import annotations

import httpx
import pytest

from app.main import create_app
from app.settings import load

SCRIPT = "<html><script>alert(1)</script>"
ARTICLE = {"title": SCRIPT, "content": SCRIPT, "author": SCRIPT}
BASE = "http://127.0.0.1:8000"
ROUTES = [
    ("GET", "/article/sun"),
    ("GET", "/article/sun/data"),
    ("GET", "/article"),
    ("GET", "/article?author[contains]=<script>"),
    ("GET", "/article?<script>=1"),
    ("GET", "/article/<script>"),
    ("GET", "/article/sun/revisions"),
    ("GET", "/<script>alert(1)</script>"),
    ("POST", "/article"),
    ("POST", "/article/batch"),
    ("DELETE", "/<script>"),
    ("PATCH", "/article/sun"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/openapi.json"),
    ("OPTIONS", "/article"),
]
UNKEYED = {
    "x-forwarded-host": "evil.example",
    "x-forwarded-for": "203.0.113.9",
    "x-forwarded-proto": "gopher",
    "x-forwarded-prefix": "/evil",
    "x-forwarded-port": "666",
    "x-original-url": "/readyz",
    "x-rewrite-url": "/readyz",
    "x-http-method-override": "DELETE",
    "x-method-override": "DELETE",
    "forwarded": "host=evil.example",
    "accept": "text/html",
    "accept-language": "xx",
    "user-agent": SCRIPT,
    "referer": "https://evil.example",
    "cookie": "a=b",
}


@pytest.fixture
async def api():
    app = create_app(load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_AUTH": "none"}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        assert (await client.put("/article/sun", json=ARTICLE, headers={"if-none-match": "*"})).status_code == 201
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_data_is_never_served_as_a_page(api, method, path):
    answer = await api.request(
        method, path, json={} if method in ("POST", "PATCH") else None, headers={"accept": "text/html"}
    )
    assert answer.headers["content-type"].split(";")[0] in ("application/json", "application/problem+json")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "private, no-cache"


async def test_the_docs_page_cannot_be_framed_and_runs_no_foreign_scripts(api):
    answer = await api.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
    assert policy["default-src"] == "'self'"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "alert(1)" not in answer.text


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_responses_do_not_depend_on_headers_that_caches_ignore(api, method, path):
    """Responses do not repeat such a header either. Creation is left out, because each new resource has another id."""
    if (method, path) == ("POST", "/article"):
        return
    plain = await api.request(method, path)
    for name, value in UNKEYED.items():
        other = await api.request(method, path, headers={name: value})
        assert (other.status_code, other.content, dict(other.headers)) == (
            plain.status_code,
            plain.content,
            dict(plain.headers),
        ), name


@pytest.mark.parametrize("path", ["/article/", "/docs/", "/healthz/", "//evil.example/", "/openapi.json/"])
async def test_no_response_redirects_to_the_host_of_the_request(api, path):
    answer = await api.get(path, headers={"host": "evil.example"})
    assert "location" not in answer.headers
    assert answer.status_code < 300 or answer.status_code >= 400


async def test_a_response_that_depends_on_the_origin_has_vary():
    app = create_app(load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_CORS": "https://app.example.org"}), loopback=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        for origin in ("https://app.example.org", "http://localhost:5173", "https://evil.example"):
            answer = await client.get("/article", headers={"origin": origin})
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (None if "evil" in origin else origin)
            assert "access-control-allow-credentials" not in answer.headers
            if allowed is not None:
                assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize(
    "content_type", ["text/plain", "text/html", "application/x-www-form-urlencoded", "image/png", ""]
)
async def test_a_body_is_parsed_as_json_only_with_that_content_type(api, content_type):
    answer = await api.post("/article", content=b"{}", headers={"content-type": content_type})
    assert (answer.status_code, answer.json()["type"]) == (415, "urn:crudstack:unsupported-media-type")
