"""Blob: a field type that refers to a file, and the rules for names and types of files."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Struct

OCTET_STREAM = "application/octet-stream"
MAX_NAME = 255
"""Largest name of a file, in bytes of UTF-8. Most file systems have this limit."""
MAX_TYPE = 255
"""Largest content type, in characters."""
MAX_EXTENSION = 20
"""Largest extension that stays if a name is shortened, in characters."""

_RESTRICTED = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"  # RFC 6838, 4.2
_WORD = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
TYPE_PATTERN = rf'{_RESTRICTED}/{_RESTRICTED}(?:[ \t]*;[ \t]*{_WORD}=(?:{_WORD}|"[ !#-\[\]-~]*"))*'
"""The pattern of a content type: `type/subtype`, and parameters without escapes."""
_TYPE = re.compile(TYPE_PATTERN)
_PATH = re.compile(r"[/\\]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXAMPLE = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class Blob(Struct, frozen=True, kw_only=True):
    """A reference to an uploaded file, for fields of models.

        class Article(Struct):
            title: str
            photo: Blob | None = None
            attachments: list[Blob] = []

    The bytes of the file are not part of the data. `ResourceManager.upload` (`POST /{model}/blobs`) stores them and
    returns the reference. `ResourceManager.blob` (`GET /{model}/{id}/blobs/{sha256}`) reads them.

    Attributes:
        sha256: The SHA-256 of the content, as 64 lower-case hex digits.
        size: The size of the content in bytes. Each write sets it from the store, so it may be left out.
        content_type: The media type, such as `image/png`.
        name: The file name without a path, at most 255 bytes of UTF-8; "" for none.
    """

    sha256: Annotated[
        str,
        Meta(
            pattern="^[0-9a-f]{64}$",
            min_length=64,
            max_length=64,
            description="SHA-256 of the content, in hex",
            examples=[_EXAMPLE],
        ),
    ]
    size: Annotated[int, Meta(ge=0, description="bytes; set by the server, whatever a request contains")] = 0
    content_type: Annotated[str, Meta(extra_json_schema={"maxLength": MAX_TYPE, "pattern": f"^{TYPE_PATTERN}$"})] = (
        OCTET_STREAM
    )
    name: Annotated[str, Meta(description="file name without a path", extra_json_schema={"maxLength": MAX_NAME})] = ""


def is_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256 as references hold it."""
    return _SHA256.fullmatch(text) is not None


def name_error(name: str) -> str | None:
    """Return the rule that a file name breaks, as a sentence for its sender, or None."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > MAX_NAME:
        return f"expected a file name of at most {MAX_NAME} bytes in UTF-8, got {size}"
    for pattern, what in ((_PATH, "path"), (_CONTROL, "control character"), (_BIDI, "mark of writing direction")):
        if pattern.search(name) is not None:
            return f"expected a file name without a {what}, got {name!r}"
    return f"expected a file name, got the path {name!r}" if name in (".", "..") else None


def type_error(content_type: str) -> str | None:
    """Return the rule that a content type breaks, as a sentence for its sender, or None."""
    if len(content_type) > MAX_TYPE:
        return f"expected a content type of at most {MAX_TYPE} characters, got {len(content_type)}"
    if _TYPE.fullmatch(content_type) is None:
        return f"expected a content type like image/png, got {content_type!r}"
    return None


def safe_name(name: str) -> str:
    """Return a file name that breaks no rule, for a stored reference that no write has checked.

    Takes the last part of a path, replaces each control character and mark of writing direction by "_", and shortens a
    long name before its extension.
    """
    last = _PATH.split(name)[-1]
    if last in (".", ".."):
        return ""
    last = _BIDI.sub("_", _CONTROL.sub("_", last))
    if len(last.encode()) <= MAX_NAME:
        return last
    stem, dot, extension = last.rpartition(".")
    if not stem or len(extension) > MAX_EXTENSION:
        stem, dot, extension = last, "", ""
    end = f"{dot}{extension}".encode()
    return (stem.encode()[: MAX_NAME - len(end)] + end).decode(errors="ignore")


def safe_type(content_type: str) -> str:
    """Return a content type, or that of plain bytes if it breaks a rule, as one that no write has checked may."""
    return content_type if type_error(content_type) is None else OCTET_STREAM
