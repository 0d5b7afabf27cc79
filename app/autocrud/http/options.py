"""The parts of a request besides its data: ids, keys and options."""

from __future__ import annotations

import hashlib
import re
from typing import cast

from ..errors import InvalidData, Violation
from ..resource_manager.basic import Status
from ..resource_manager.core import IdempotencyKey
from . import conditions, problems
from .messages import Request, bad_parameter, parse_flag, route_path

ID_PATTERN = r"[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,127}"
KEY_PATTERN = r"[!-~]{1,255}"
RESERVED_IDS = frozenset({"batch", "count"})
MAX_REVISION = 2**31
_id = re.compile(ID_PATTERN)
_key = re.compile(KEY_PATTERN)


async def idempotency_key(request: Request, method: str) -> IdempotencyKey | None:
    """Return the Idempotency-Key of a request, with the parts that identify the request, or None if it has no key.

    If-Match and If-None-Match do not identify a request, because a client may have read the resource again before it
    repeats the request. Raises InvalidCondition if the key is invalid. Reads the body.
    """
    given = request.header(b"idempotency-key")
    if given is None:
        return None
    if _key.fullmatch(given) is None:
        raise conditions.InvalidCondition(f"Idempotency-Key: expected 1 to 255 visible characters, got {given[:60]!r}")
    media = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    body = hashlib.sha256(await request.raw_body()).hexdigest()
    query = request.scope["query_string"].decode("latin-1")
    return IdempotencyKey(given, "\n".join((method, route_path(request.scope), query, media, body)))


def check_id(resource_id: str) -> None:
    """Raise InvalidData unless a client may choose this id."""
    if _id.fullmatch(resource_id) is None or resource_id in RESERVED_IDS:
        detail = (
            f"expected 1 to 128 of A-Z a-z 0-9 . _ ~ -, no dot at the start, none of {', '.join(sorted(RESERVED_IDS))};"
            f" got {resource_id[:140]!r}"
        )
        raise InvalidData(f"this id cannot be chosen: {detail}", (Violation("/id", detail),))


def check_revision(number: int) -> None:
    """Raise InvalidData unless a body may name this revision."""
    if not 1 <= number <= MAX_REVISION:
        shown = str(number) if abs(number) < 2**64 else "one of more than 64 bits"
        detail = f"expected a whole number from 1 to {MAX_REVISION}, got {shown}"
        raise InvalidData(f"revision: {detail}", (Violation("/revision", detail),))


def known_id(resource_id: str) -> str:
    """Return the id of a path. Raises NoSuchRoute if no resource can have this id."""
    if _id.fullmatch(resource_id) is None:
        raise problems.NoSuchRoute(f"there is no resource {resource_id[:140]!r}")
    return resource_id


def include_deleted_of(options: dict[str, str]) -> bool:
    """Return the option `include_deleted`. The default is false."""
    return "include_deleted" in options and parse_flag("include_deleted", options["include_deleted"])


def parse_status(options: dict[str, str]) -> Status:
    """Return the option `status`. The default is "stable"."""
    status = options.get("status", "stable")
    if status in ("draft", "stable"):
        return cast("Status", status)
    raise bad_parameter("status", f"expected draft or stable, got {status[:60]!r}")


def parse_mode(options: dict[str, str]) -> bool:
    """Return whether the option `mode` is "modify", which edits the current draft in place."""
    mode = options.get("mode", "update")
    if mode not in ("update", "modify"):
        raise bad_parameter("mode", f"expected update or modify, got {mode[:60]!r}")
    if mode == "modify" and "status" in options:
        raise bad_parameter("status", "modify keeps the status; publish makes a draft stable")
    return mode == "modify"
