"""Pages of other origins cannot change or read data if callers need no credentials."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from app import models
from app.autocrud.errors import ConfigError
from app.main import create_app
from app.settings import load
from tests.http.albums import register

ARTICLE = {"title": "Sun", "content": "", "author": "a"}
WRITES = [
    ("POST", "/article", ARTICLE),
    ("PUT", "/article/moon", ARTICLE),
    ("PATCH", "/article/sun", {"title": "x"}),
    ("DELETE", "/article/sun", None),
    ("POST", "/article/sun/purge", None),
    ("POST", "/article/sun/restore", None),
    ("POST", "/batch", []),
]


def client(*, loopback: bool = True, base: str = "http://127.0.0.1:8000", **environment: str) -> httpx.AsyncClient:
    settings = load({"CRUDSTACK_STORAGE": "memory", **environment})
    transport = httpx.ASGITransport(create_app(settings, loopback=loopback))
    return httpx.AsyncClient(transport=transport, base_url=base)


async def put_sun(one: httpx.AsyncClient) -> None:
    answer = await one.put("/article/sun", json=ARTICLE, headers={"if-none-match": "*"})
    assert answer.status_code == 201


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1.evil.example:8000"},
        {"origin": "http://localhost.evil.example"},
        {"origin": "https://evil.example", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
async def test_a_foreign_page_cannot_change_data(page):
    async with client() as one:
        await put_sun(one)
        for method, path, body in WRITES:
            answer = await one.request(method, path, json=body, headers=page)
            assert (answer.status_code, answer.json()["type"]) == (403, "urn:crudstack:foreign-origin"), path
        assert (await one.get("/article/sun/data")).json()["title"] == "Sun"
        assert (await one.get("/article/count")).json() == {"count": 1}


@pytest.mark.parametrize(
    "page",
    [
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://localhost:5173"},
        {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "https://app.example.org"},
    ],
    ids=str,
)
async def test_programs_and_allowed_pages_can_change_data(page):
    async with client(CRUDSTACK_CORS="https://app.example.org, https://other.example.org") as one:
        answer = await one.post("/article", json=ARTICLE, headers=page)
        assert answer.status_code == 201
        if "origin" in page and page["origin"] != "http://127.0.0.1:8000":
            assert answer.headers["access-control-allow-origin"] == page["origin"]
            assert "etag" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
)
async def test_a_foreign_host_name_on_loopback_is_refused(host):
    async with client() as one:
        await put_sun(one)
        for method, path in (("GET", "/article"), ("GET", "/article/sun"), ("POST", "/article"), ("GET", "/healthz")):
            answer = await one.request(method, path, headers={"host": host})
            assert (answer.status_code, answer.json()["type"]) == (421, "urn:crudstack:misdirected-request")
            assert "sun" not in answer.text.lower()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.2:1", "[::1]:8000", "api.test:9"]
)
async def test_names_of_loopback_and_configured_names_are_served(host):
    async with client(CRUDSTACK_HOSTS="api.test") as one:
        assert (await one.get("/article", headers={"host": host})).status_code == 200


async def test_on_other_addresses_hosts_are_checked_only_if_configured():
    for named, status in (("", 200), ("api.example.org", 421)):
        async with client(loopback=False, CRUDSTACK_AUTH="none", CRUDSTACK_HOSTS=named) as one:
            assert (await one.get("/article", headers={"host": "evil.example"})).status_code == status
            assert (await one.get("/article", headers={"host": "api.example.org:8000"})).status_code == 200


async def test_an_accepted_host_does_not_admit_another_one():
    async with client() as one:
        for host, status in [
            ("localhost:8000", 200),
            ("evil.example", 421),
            ("localhost:8000", 200),
            ("evil.example", 421),
        ]:
            assert (await one.get("/article", headers={"host": host})).status_code == status
            assert (await one.options("/article", headers={"host": host})).status_code == (
                405 if status == 200 else 421
            )


async def test_on_other_addresses_the_origin_is_compared_with_the_host():
    async with client(loopback=False, base="http://api.example.org", CRUDSTACK_AUTH="none") as one:
        assert (await one.get("/article")).status_code == 200
        for origin, status in (
            ("http://api.example.org", 201),
            ("http://api.example.org:80", 201),
            ("http://api.example.org:81", 403),
            ("http://localhost:5173", 403),
            ("http://evil.example", 403),
        ):
            answer = await one.post("/article", json=ARTICLE, headers={"origin": origin})
            assert answer.status_code == status, origin


async def test_a_body_of_a_page_needs_a_content_type():
    async with client() as one:
        body = b'{"title": "Sun", "content": "", "author": "a"}'
        answer = await one.post("/article", content=body, headers={"origin": "http://localhost:5173"})
        assert (answer.status_code, answer.json()["type"]) == (415, "urn:crudstack:unsupported-media-type")
        assert (await one.post("/article", content=body)).status_code == 201
        await put_sun(one)
        answer = await one.post("/article/sun/purge", headers={"origin": "http://localhost:5173"})
        assert answer.status_code in (200, 202)


async def test_a_preflight_request_needs_no_credentials():
    token = "a-long-token-of-a-test-0123456789abcdef"  # noqa: S105 - of this test
    auth = f'{{"mode": "token", "token_sha256": "{hashlib.sha256(token.encode()).hexdigest()}"}}'
    async with client(CRUDSTACK_AUTH=auth, CRUDSTACK_CORS="https://app.example.org") as one:
        question = {
            "origin": "https://app.example.org",
            "access-control-request-method": "PATCH",
            "access-control-request-headers": "authorization, content-type, if-match",
        }
        answer = await one.options("/article/sun", headers=question)
        assert answer.status_code == 200
        assert "PATCH" in answer.headers["access-control-allow-methods"]
        foreign = await one.options("/article/sun", headers=question | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
        assert (foreign.status_code, foreign.json()["type"]) == (403, "urn:crudstack:foreign-origin")
        # No browser sends the token on its own, so who has it may ask from anywhere.
        headers = {"authorization": f"Bearer {token}", "origin": "https://evil.example"}
        assert (await one.post("/article", json=ARTICLE, headers=headers)).status_code == 201


@pytest.mark.parametrize(
    "given", ["app.example.org", "https://app.example.org/path", "ftp://x", "https://*.example.org"]
)
def test_an_invalid_origin_is_refused(given):
    with pytest.raises(ConfigError, match=r"CRUDSTACK_CORS has .* expected origins like"):
        load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_CORS": given})


def test_an_invalid_host_is_refused():
    with pytest.raises(ConfigError, match=r"CRUDSTACK_HOSTS has .* expected host names like"):
        load({"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_HOSTS": "https://api.test"})


@pytest.fixture
def albums(monkeypatch):
    monkeypatch.setattr(models, "register", register)


@pytest.mark.usefixtures("albums")
async def test_a_foreign_page_cannot_upload():
    """A form can be sent without a preflight request."""
    async with client() as one:
        for page in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            for body in (
                {"files": {"file": ("x", b"x")}},
                {"content": b"x", "headers": {"content-type": "text/plain"}},
            ):
                answer = await one.post("/album/blobs", **{**body, "headers": {**body.get("headers", {}), **page}})
                assert (answer.status_code, answer.json()["type"]) == (403, "urn:crudstack:foreign-origin")
        answer = await one.post(
            "/album/blobs", files={"file": ("x", b"x")}, headers={"origin": "http://localhost:5173"}
        )
        assert answer.status_code == 201


@pytest.mark.usefixtures("albums")
async def test_an_allowed_page_reads_files_and_their_ranges():
    page = {"origin": "https://app.example.org"}
    async with client(CRUDSTACK_CORS="https://app.example.org") as one:
        ref = (await one.post("/album/blobs", content=b"content", headers={"content-type": "image/png"})).json()
        path = (await one.post("/album", json={"title": "x", "cover": ref})).headers["location"]
        answer = await one.get(f"{path}/blobs/{ref['sha256']}", headers=page | {"range": "bytes=0-2"})
        assert (answer.status_code, answer.content) == (206, b"con")
        exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"accept-ranges", "content-range", "content-disposition", "etag"} <= exposed
        assert answer.headers.get_list("cache-control") == ["private, immutable, max-age=31536000"]
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert {name.strip().lower() for name in answer.headers["vary"].split(",")} == {"authorization", "origin"}
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-disposition"}
        assert (await one.options("/album/blobs", headers=page | preflight)).status_code == 200
