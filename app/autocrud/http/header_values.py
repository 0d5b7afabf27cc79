"""Values of header fields: parameters, file names (RFC 6266), and digests (RFC 9530)."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import quote, unquote_to_bytes

from ..errors import CrudError
from .conditions import InvalidCondition
from .messages import Request

_WORD = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_VALUE = r"[^\x00-\x20\x7f\";]+"
"""A value without quotes. Clients also send parentheses and other characters that a token may not have."""
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*(?:({_WORD})[ \t]*=[ \t]*({_VALUE}|"(?:[^"\\]|\\.)*"))?')
_EXTENDED = re.compile(r"([A-Za-z0-9-]+)'[A-Za-z0-9-]*'((?:[A-Za-z0-9!#$&'()*+.^_`|~-]|%[0-9A-Fa-f]{2})*)")
"""An extended value (RFC 8187), and the characters '()* that encodeURIComponent leaves as they are."""
_SHA256_DIGEST = re.compile(r"(?:^|,)[ \t]*sha-256=:([A-Za-z0-9+/=]*):[ \t]*(?=,|$)")
_UNRESERVED = "!#$&+-.^_`|~"
"""Characters of an extended value that are not encoded, besides letters and digits (RFC 8187, 3.2.1)."""
MAX_SHOWN = 100


class InvalidUpload(CrudError, ValueError):
    """A header or the framing of an upload is invalid."""

    type, title, status = "invalid-upload", "The upload cannot be understood", 400


def with_parameters(field: str, value: str) -> tuple[str, dict[str, str]]:
    """Return a value like `form-data; name="file"`: its first part in lower case, and its parameters.

    field  the name of the header field, for errors

    Raises InvalidUpload.
    """
    first, _, _ = value.partition(";")
    found: dict[str, str] = {}
    at = len(first)
    if "=" in first or (at < len(value) and not first.strip(" \t")):  # a file name in this place would be lost
        raise InvalidUpload(f"{field}: expected a type before the parameters, got {value[:MAX_SHOWN]!r}")
    while at < len(value):
        match = _PARAMETER.match(value, at)
        if match is None:
            if not value[at:].strip(" \t"):
                break
            raise InvalidUpload(f"{field}: expected parameters like name=value, got {value[at:][:MAX_SHOWN]!r}")
        at = match.end()
        if match[1] is not None:
            name, text = match[1].lower(), match[2]
            if name in found:
                raise InvalidUpload(f"{field}: the parameter {name!r} is given twice")
            found[name] = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if text.startswith('"') else text
    return first.strip(" \t").lower(), found


def file_name(field: str, parameters: dict[str, str]) -> str | None:
    """Return the file name in the parameters of a Content-Disposition, or None. `filename*` takes precedence.

    Clients send a plain `filename` as UTF-8; one that is not UTF-8 is taken as ISO-8859-1. Raises InvalidUpload.
    """
    extended = parameters.get("filename*")
    if extended is not None:
        match = _EXTENDED.fullmatch(extended)
        try:
            if match is not None and match[1].lower() == "utf-8":
                return unquote_to_bytes(match[2]).decode()
        except UnicodeDecodeError:
            pass
        raise InvalidUpload(f"{field}: expected filename*=UTF-8''... in UTF-8, got {extended[:MAX_SHOWN]!r}")
    plain = parameters.get("filename")
    if plain is None:
        return None
    try:
        return plain.encode("latin-1").decode()
    except UnicodeDecodeError:
        return plain


def disposition(kind: str, name: str) -> bytes:
    """Return the Content-Disposition of a response: `kind` is `inline` or `attachment`, `name` may be empty."""
    if not name:
        return kind.encode()
    plain = re.sub(r'[^ -~]|["\\%]', "_", name)
    value = f'{kind}; filename="{plain}"'
    if plain != name:
        value += f"; filename*=UTF-8''{quote(name, safe=_UNRESERVED)}"
    return value.encode()


def announced_sha256(request: Request) -> str | None:
    """Return the SHA-256 of the body, in hex, that Content-Digest or Repr-Digest announces, or None.

    Both cover the whole body, because a body has no Content-Encoding. Raises InvalidCondition if one of them has no
    valid SHA-256, or if they differ.
    """
    found: set[str] = set()
    for field in ("Content-Digest", "Repr-Digest"):
        value = request.header(field.lower().encode())
        if value is None:
            continue
        digest = _sha256_of(value)
        if digest is None:
            raise InvalidCondition(f"{field}: expected sha-256=:BASE64:, got {value[:MAX_SHOWN]!r}")
        found.add(digest)
    if len(found) > 1:
        raise InvalidCondition("Content-Digest and Repr-Digest differ: expected the same SHA-256 in both")
    return next(iter(found), None)


def _sha256_of(value: str) -> str | None:
    match = _SHA256_DIGEST.search(value)
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None
    return digest.hex() if len(digest) == 32 else None
