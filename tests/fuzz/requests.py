"""Requests as bytes: valid, invalid, and malformed ones. A number always gives the same request."""

from __future__ import annotations

import random
import re

IDS = ("sun", "moon", "BOS", "a.b", "-", "~", "A" * 128, "A" * 129, "batch", "count", "unknown")
EVIL = (
    *(
        "",
        " ",
        ".",
        "..",
        "%",
        "%0",
        "%00",
        "%2e%2e",
        "%2f",
        "%5c",
        "%c0%af",
        "%ff%fe",
        "%ud800",
        "%F0%9F%98%80",
        "+",
        "\\",
    ),
    *(
        "'",
        '"',
        "';--",
        "{}",
        "[]",
        "null",
        "true",
        "-1",
        "0",
        "1e999",
        "9" * 400,
        "\u00e9",
        "\ufeff",
        "\x7f",
        "<script>",
    ),
    *("../../etc/passwd", "${x}", "{{7*7}}", "*", "?", "#", "&", "=", ",", ";", ":", "W/", "a" * 3000),
)
FIELDS = (
    "author",
    "published",
    "title",
    "iata",
    "latitude",
    "email",
    "meta.version",
    "meta.created_time",
    "meta.",
    "",
    "nope",
)
OPS = (
    *(
        "eq",
        "ne",
        "lt",
        "lte",
        "gt",
        "gte",
        "in",
        "not_in",
        "contains",
        "starts_with",
        "ends_with",
        "is_null",
        "exists",
    ),
    *("nope", "", "[", "]"),
)
MODELS = ("article", "airport", "user")
PLACES = (
    *("", "/{id}", "/{id}/data", "/{id}/publish", "/{id}/switch", "/{id}/restore", "/{id}/purge", "/{id}/revisions"),
    *("/{id}/revisions/1", "/{id}/diff?a=1&b=2", "/count", "/batch", "/{id}/{id}", "/", "//"),
)
OTHERS = (
    "/healthz",
    "/readyz",
    "/openapi.json",
    "/docs",
    "/docs/assets/favicon.png",
    "/docs/assets/{id}",
    "/",
    "*",
    "",
)
METHODS = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") * 12,
    *("TRACE", "CONNECT", "get", "PROPFIND", "", "G T"),
)
VERSIONS = (*("HTTP/1.1",) * 150, "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.10", "HTTP/", "", "http/1.1", "XTTP/1.1")
ENDS = (*("\r\n",) * 300, "\n", "\r", "\r\n ", "\r\r\n", "")
BODIES = (
    *(
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"',
        b"\xff",
        b"{" * 2000,
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"1" * 5000,
        b" " * 5000,
    ),
    b'{"title": "t", "content": "c", "author": "a"}',
    b'{"title": "t", "content": "\\ud800", "author": "a"}',
    b'{"title": "t", "title": "u", "content": "c", "author": "a"}',
    b'{"iata": "BOS", "name": "n", "city": null, "state": null, "country": "c", "latitude": 1e400, "longitude": 0}',
    b'{"username": "u", "email": "u"}',
    b'{"revision": 99999999999999999999999}',
    b'{"operations": [{"op": "create", "data": {"title": "t", "content": "c", "author": "a"}}]}',
    b'{"operations": [{"op": "patch", "id": "sun", "patch": [{"op": "add", "path": "/title", "value": "x"}]}]}',
    b'[{"op": "copy", "from": "/title", "path": "/content"}, {"op": "test", "path": "/a~2", "value": 1}]',
    b'[{"op": "move", "from": "", "path": "/title"}]',
    b'[{"op": "add", "path": "/title/0/-1/01/~", "value": {}}]',
)
HEADERS = {
    "Content-Type": (
        *("application/json",) * 6,
        *(
            "application/merge-patch+json",
            "application/json-patch+json",
            "text/plain",
            "application/json; charset=x",
            "/",
            "",
        ),
    ),
    "If-Match": ('"1-0123456789abcdef"', "*", 'W/"1-0"', '"', '"a"' * 2, ", ".join(['"x"'] * 500), "1"),
    "If-None-Match": ("*", '"1-0123456789abcdef"', ",,,", '"\xff"', ", ".join(['"x"'] * 500)),
    "Idempotency-Key": ("k", "a" * 255, "a" * 256, "\xe9", "a b", ""),
    "Content-Encoding": ("gzip", "identity", "br, gzip", "nope"),
    "Transfer-Encoding": ("chunked", "gzip, chunked", "chunked, chunked", "identity", "xchunked", "chunked\x0b"),
    "Content-Length": ("0", "1", "-1", "+5", "5,5", "0x5", "1e3", "9" * 30, " 5 ", "5 5"),
    "Host": ("127.0.0.1", "localhost:1", "evil.example", "", "a@b", "[::1]", "127.0.0.1:99999", "\xe9"),
    "Origin": ("http://localhost:5173", "https://evil.example", "null", "", "x"),
    "Sec-Fetch-Site": ("cross-site", "same-origin", "none", ""),
    "Expect": ("100-continue", "200-ok"),
    "Upgrade": ("websocket", "h2c"),
    "Connection": ("close", "keep-alive", "Upgrade", "upgrade, http2-settings", "x" * 200),
    "Range": ("bytes=0-1", "bytes=-1", "bytes=9-1", "lines=1"),
    "Accept": ("text/html", "*/*;q=x"),
    "Authorization": ("Bearer x", "Basic Og==", "Bearer " + "x" * 3000),
    "Access-Control-Request-Method": ("PATCH", ""),
    "X-Many": ("1",),
    "": ("x",),
    "Na me": ("x",),
    "Name\x00": ("x",),
    "N\xe9": ("\x01\x02",),
}
ARTICLE = b'{"title": "t", "content": "c", "author": "a"}'
RIGHT = (
    *(
        ("GET", f"/article{rest}", b"")
        for rest in ("", "/sun", "/sun/data", "/sun/revisions", "/sun/diff?from=1", "/count")
    ),
    *(("GET", "/article?author[in]=a,b&sort=-author&limit=3&fields=title", b""), ("HEAD", "/article/sun", b"")),
    *(("POST", "/article", ARTICLE), ("POST", "/article/batch", BODIES[-5]), ("PUT", "/article/sun", ARTICLE)),
    *(
        ("PATCH", "/article/sun", b'{"title": "x"}'),
        ("DELETE", "/article/moon", b""),
        ("POST", "/article/sun/publish", b""),
    ),
    *(("POST", "/article/sun/switch", b'{"revision": 1}'), ("POST", "/article/moon/restore", b"")),
)
"""Requests that succeed unless they are changed."""
ORDINARY = (
    "If-Match",
    "If-None-Match",
    "Idempotency-Key",
    "Accept",
    "Range",
    "Content-Type",
    "Sec-Fetch-Site",
    "X-Many",
)
"""Headers that do not change the meaning of a request."""


def request(number: int) -> bytes:
    """Return the request of this number, or several requests in one text."""
    chance = random.Random(number)
    count = chance.choice((1, 1, 1, 1, 1, 1, 2, 3))
    made = b"".join(_one(chance, is_last=at == count - 1) for at in range(count))
    return _damaged(chance, made) if chance.random() < 0.2 else made


def _one(chance: random.Random, *, is_last: bool) -> bytes:
    if chance.random() < 0.4:
        method, target, body = chance.choice(RIGHT)
    else:
        method, target = chance.choice(METHODS), _target(chance)
        body = chance.choice(BODIES) if method in ("POST", "PUT", "PATCH") or chance.random() < 0.1 else b""
    lines = [f"{method} {target} {chance.choice(VERSIONS)}"]
    if chance.random() < 0.95:
        lines.append("Host: 127.0.0.1")
    if chance.random() < 0.9:
        lines.append(
            "Content-Type: application/json"
            if chance.random() < 0.7
            else f"Content-Type: {_value(chance, 'Content-Type')}"
        )
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 5))):
        name = chance.choice(list(HEADERS) if chance.random() < 0.2 else ORDINARY)
        lines.append(f"{name}: {_value(chance, name)}")
    if is_last and chance.random() < 0.9:
        lines.append("Connection: close")  # so that the server does not wait for more
    if chance.random() < 0.02:
        lines += ["X-Many: " + "v" * chance.choice((1, 100))] * chance.choice((60, 500, 3000))
    if chance.random() < 0.02:
        lines.append("X-Long: " + "v" * chance.choice((8_000, 70_000, 400_000)))
    if chance.random() < 0.3:
        chance.shuffle(lines[1:])
    chunked = chance.random() < 0.15
    if chunked:
        lines.append("Transfer-Encoding: chunked")
        body = _chunked(chance, body)
    elif body and chance.random() < 0.97:
        lines.append(f"Content-Length: {len(body)}")
    end = chance.choice(ENDS)
    head = end.join(lines) + (end * 2 if end else "\r\n\r\n")
    return head.encode("latin-1", "replace") + body


def _target(chance: random.Random) -> str:
    target = chance.choice(OTHERS) if chance.random() < 0.15 else f"/{chance.choice(MODELS)}{chance.choice(PLACES)}"
    while "{id}" in target:
        target = target.replace("{id}", chance.choice(IDS if chance.random() < 0.7 else EVIL), 1)
    if chance.random() < 0.4:
        target += "&" if "?" in target else "?"
        target += "&".join(_parameter(chance) for _ in range(chance.choice((1, 1, 2, 4, 30))))
    if chance.random() < 0.03:
        target = (
            chance.choice(("http://127.0.0.1", "http://evil.example", "//evil.example", "evil.example:443")) + target
        )
    return target


def _parameter(chance: random.Random) -> str:
    if chance.random() < 0.3:
        name = chance.choice(
            ("limit", "cursor", "sort", "fields", "data", "include_deleted", "status", "mode", "revision", "a", "b")
        )
    else:
        name = chance.choice(FIELDS)
        if chance.random() < 0.6:
            name += f"[{chance.choice(OPS)}]"
    return f"{name}={chance.choice((*EVIL, *FIELDS, 'true', 'stable', 'a,b', '2026-01-01T00:00:00Z', '1'))}"


def _value(chance: random.Random, name: str) -> str:
    return chance.choice(HEADERS[name]) if chance.random() < 0.8 else chance.choice(EVIL)


def _chunked(chance: random.Random, body: bytes) -> bytes:
    made, at = b"", 0
    while at < len(body):
        size = chance.choice((1, 7, 1000, len(body)))
        piece = body[at : at + size]
        at += size
        extension = chance.choice((b"",) * 12 + (b";a=b", b";" + b"x" * 5000, b" ", b"\t"))
        made += b"%x" % (len(piece) + chance.choice((0,) * 30 + (1, 10**9))) + extension + b"\r\n" + piece + b"\r\n"
        if len(made) > 200_000:
            break
    trailer = chance.choice(
        (b"",) * 8 + (b"X-Trailer: 1\r\n", b"Content-Length: 5\r\n", b"X: " + b"t" * 9000 + b"\r\n")
    )
    return made + chance.choice((b"0", b"0", b"0", b"00000", b"-0", b"")) + b"\r\n" + trailer + b"\r\n"


def _damaged(chance: random.Random, sent: bytes) -> bytes:
    found = bytearray(sent)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(5):
            case 0 if found:
                found[min(at, len(found) - 1)] = chance.randrange(256)
            case 1:
                found[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 8))))
            case 2:
                del found[at : at + chance.choice((1, 2, 10, 200))]
            case 3:
                piece = found[at : at + chance.choice((1, 20, 200))]
                found[at:at] = piece * chance.choice((1, 2, 50))
            case 4:
                del found[at:]
    return bytes(found)


def smaller(sent: bytes) -> list[bytes]:
    """Return smaller variants of a request that failed: each lacks one part, the largest part first."""
    lines = re.split(rb"(?<=\n)", sent)
    without = [b"".join(lines[:at] + lines[at + 1 :]) for at in range(len(lines))]
    size = max(1, len(sent) // 2)
    while size >= 1 and len(without) < 400:
        without += [sent[:at] + sent[at + size :] for at in range(0, len(sent), size)]
        size //= 2
    return without
