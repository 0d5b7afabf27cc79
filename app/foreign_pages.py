"""Cross-origin requests: protection against CSRF and DNS rebinding, and CORS.

A browser sends some requests of any page without a preflight request: forms, beacons, `fetch` in mode no-cors. A page
can also let its own host name resolve to 127.0.0.1 (DNS rebinding), so that the browser treats this server as the
page's own. So every page that is open on a developer's machine can reach a server on that machine.

Invariants:

- F1 *A foreign page changes nothing.* An unsafe request with an `Origin` is foreign if that is not the server's own and
  not allowed. An unsafe request without `Origin` is foreign if `Sec-Fetch-Site` is cross-site or same-site. Foreign
  requests are refused with 403 before any work. Browsers send `Origin` with every unsafe request of a page, and the
  page cannot remove it.
- F2 *A foreign host name reads nothing.* If the server listens on loopback, or CRUDSTACK_HOSTS is set, a `Host` must be
  a loopback name or in CRUDSTACK_HOSTS. Other hosts are refused with 421, for reads too. So `Host` is never the page's
  name, and F1 can compare `Origin` with `Host`.
- F3 *A page declares its content type.* If a request has an `Origin` and a body, it needs a content type. A page cannot
  send the content type of JSON without a preflight request.

With bearer tokens none of this is needed, because a browser never adds such a token by itself. SAFE_HEADERS are added
to every response in any case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response as HttpResponse
from typing_extensions import override

from .autocrud.errors import CrudError
from .autocrud.http import problems
from .autocrud.http.messages import Receive, Scope, Send
from .settings import EXPOSED_HEADERS

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1)."""
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1)(:\d{1,5})?"
"""Origins that may call a server on loopback: pages of the developer's own machine."""
PREFLIGHT_S = 600
MAX_QUOTED = 200
"""Characters of a header in an error."""
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"private, no-cache"),
)
"""Headers of every response: no content sniffing, no use as script or image of another origin, no shared caching.

A response that has one of them keeps its own, for example a file, which a browser may keep in its cache.
"""
OF_PAGES = frozenset({b"origin", b"sec-fetch-site"})
"""Headers that only browsers send."""
MAX_KNOWN = 100
"""Number of accepted Host headers to remember."""


class ForeignOrigin(CrudError):
    """An unsafe request comes from a page of another origin."""

    type, title, status = "foreign-origin", "This page may not change anything here", 403


class MisdirectedRequest(CrudError):
    """The Host header is not a name of this server."""

    type, title, status = "misdirected-request", "This server does not serve that host name", 421


class ContentTypeMissing(CrudError):
    """A request of a page has a body without a content type."""

    type, title, status = "unsupported-media-type", "The body has no content type", 415


class ForeignPages:
    """ASGI middleware that protects the application from pages of other origins, and adds SAFE_HEADERS.

    origins     allowed origins besides the server's own, like https://app.example.org; "*" allows all
    hosts       host names of the server besides those of loopback
    loopback    whether the server listens on a loopback address
    own_origin  for a gateway that answers CORS preflight requests itself: the origin of the API in a request. If None,
                this class answers them, and the own origin follows from the Host header
    signed_in   whether clients must authenticate; if so, this class refuses no request
    """

    def __init__(
        self,
        app: Any,
        *,
        origins: Collection[str] = (),
        hosts: Collection[str] = (),
        loopback: bool = False,
        own_origin: Callable[[Scope], str] | None = None,
        signed_in: bool = False,
    ) -> None:
        self._app, self._origins = app, frozenset(origins)
        self._hosts = frozenset(name.lower() for name in hosts)
        self._asks_host = not signed_in and own_origin is None and (loopback or bool(hosts))
        self._own_origin, self._signed_in = own_origin, signed_in
        self._local = re.compile(LOCAL_PAGES, re.IGNORECASE) if loopback else None
        self._for_pages = app if own_origin is not None else PageAnswers(app, origins=origins, loopback=loopback)
        self._known_hosts: set[bytes] = set()
        """Host headers that were accepted, so that each is checked once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it if it comes from a foreign page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                own = {name for name, _ in headers}
                message["headers"] = [*headers, *(header for header in SAFE_HEADERS if header[0] not in own)]
            await send(message)

        host: bytes | None = None
        is_page = False
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name in OF_PAGES:
                is_page = True
        if not is_page and (not self._asks_host or host in self._known_hosts):
            await self._app(scope, receive, sent)
        elif (refusal := self._refusal(scope)) is None:
            if host is not None and len(self._known_hosts) < MAX_KNOWN:
                self._known_hosts.add(host)
            await self._for_pages(scope, receive, sent)
        else:
            await problems.response(refusal).send(sent, head=scope["method"] == "HEAD")

    def _refusal(self, scope: Scope) -> CrudError | None:
        if self._signed_in:
            return None
        host = (_one(scope, b"host") or "").lower()
        if self._asks_host and host and not self._is_ours(host):
            return MisdirectedRequest(
                f"found the host name {host[:MAX_QUOTED]!r}; expected a name of loopback, like localhost, or one that"
                " CRUDSTACK_HOSTS names"
            )
        origins = _values(scope, b"origin")
        if scope["method"] not in SAFE and self._is_foreign(scope, origins, host):
            found = f"the origin {origins[0][:MAX_QUOTED]!r}" if origins else "a page of another site"
            return ForeignOrigin(f"found {found}; expected the server's own, or one that CRUDSTACK_CORS or cors names")
        if origins and _has_body(scope) and not _values(scope, b"content-type"):
            return ContentTypeMissing(
                "found a body without a content type from a page; expected one, like application/json"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+\Z", host) else host
        return LOOPBACK.fullmatch(host) is not None or host in self._hosts or name in self._hosts

    def _is_foreign(self, scope: Scope, origins: Sequence[str], host: str) -> bool:
        if origins:
            return len(origins) > 1 or not self._is_allowed(origins[0], scope, host)
        return (_one(scope, b"sec-fetch-site") or "").lower() in ("cross-site", "same-site")

    def _is_allowed(self, origin: str, scope: Scope, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        if self._local is not None and self._local.fullmatch(origin):
            return True
        if self._own_origin is not None:
            return origin == self._own_origin(scope)
        # A proxy may terminate TLS for the server, so both schemes are the server's own.
        scheme, found, name = origin.lower().partition("://")
        default = {"http": ":80", "https": ":443"}.get(scheme)
        return bool(found and host) and default is not None and name.removesuffix(default) == host.removesuffix(default)


class PageAnswers(CORSMiddleware):
    """CORS: answers preflight requests, and lets pages of the allowed origins read responses."""

    def __init__(self, app: Any, *, origins: Collection[str], loopback: bool) -> None:
        super().__init__(
            app,
            allow_origins=list(origins),
            allow_origin_regex=LOCAL_PAGES if loopback else None,
            allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
            max_age=PREFLIGHT_S,
        )

    @override
    def preflight_response(self, request_headers: Headers) -> HttpResponse:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        refusal = problems.response(
            ForeignOrigin(
                f"found the origin {request_headers['origin'][:MAX_QUOTED]!r} that requests"
                f" {request_headers['access-control-request-method'][:MAX_QUOTED]!r}; expected an origin that"
                " CRUDSTACK_CORS or cors names, and a method that the API has"
            )
        )
        kept = {name: value for name, value in answer.headers.items() if name.startswith(("vary", "access-control-"))}
        return HttpResponse(refusal.body, refusal.status, kept, refusal.content_type.decode())


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _one(scope: Scope, name: bytes) -> str | None:
    found = _values(scope, name)
    return found[0] if found else None


def _has_body(scope: Scope) -> bool:
    return _one(scope, b"content-length") not in (None, "0") or bool(_values(scope, b"transfer-encoding"))
