"""The part of `s3_check` about direct transfers: presigned URLs, signed lengths and checksums, conditional copies.

Clients upload blobs to S3 and download them from it by presigned URLs. A server that does not check all parts of them
is fit nevertheless, because the program checks the content itself; it only takes longer.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from typing import Literal
from uuid import uuid4

from ..autocrud.errors import ConfigError, StoreUnavailable
from ..autocrud.resource_manager.backends.s3.object_store import Signed
from .s3_requests import Answer, RecordedObjects, ask, reason_of

Say = Callable[[str, Literal["ok", "note", "not tested"], str], None]
"""Takes the name of a check, its result and a sentence."""
THROUGH_THE_SERVER = "clients must send files by POST /{model}/blobs, and read them with ?redirect=false"
SHOWN = Signed({"response-content-type": "image/png", "response-content-disposition": 'attachment; filename="a.png"'})


async def check_direct_transfers(objects: RecordedObjects, key: str, say: Say) -> None:
    """Try direct transfers with objects whose keys begin with `key`. Raises StoreUnavailable if a request fails."""
    body = uuid4().hex.encode()
    headers = {"x-amz-checksum-sha256": b64encode(hashlib.sha256(body).digest()).decode()}
    signed = Signed(headers={"content-length": str(len(body)), **headers})
    try:
        url = await objects.presign(key, "PUT", 300, signed)
    except ConfigError as error:
        say("presigned URLs", "not tested", error.detail)
        return
    put = status_of(await objects.use_presigned("PUT", url, key, body, headers))
    got = await ask("GET", await objects.presign(key, "GET", 300, SHOWN))
    if put != 200 or not isinstance(got, Answer) or (got.status, got.body) != (200, body):
        answers = f"PUT was answered {put}, GET {status_of(got)}"
        say("presigned URLs", "note", f"they do not work ({answers}): {THROUGH_THE_SERVER}")
        return
    say("presigned URLs", "ok", "a PUT and a GET by presigned URLs worked")
    await _check_downloads(got, say)
    found = await objects.head(key, checksum=True)
    kept = found is not None and found.sha256 == hashlib.sha256(body).hexdigest()
    other = body[::-1]
    wrong = status_of(await objects.use_presigned("PUT", url, key, other, headers))
    if wrong == 200 or not kept:
        what = "stored a wrong body" if wrong == 200 else "keeps no SHA-256 of uploads"
        say("checksums", "note", f"the server {what}: each direct upload is read again before it is accepted")
    else:
        say("checksums", "ok", f"a PUT with a wrong body was answered {wrong}, and the server keeps the SHA-256")
    longer = status_of(await objects.use_presigned("PUT", url, key, body + b"!", headers))
    if longer == 200:
        say("lengths", "note", "the server stored a body of another length than the signed one: it is refused later")
    else:
        say("lengths", "ok", f"a PUT with another length than the signed one was answered {longer}")
    again = status_of(await objects.use_presigned("PUT", url, key, body, headers))
    say(
        "second use",
        "ok",
        f"a second PUT by the same URL was answered {again}; it can only change an object that is not yet a file",
    )
    await _check_copies(objects, key, say)


async def _check_downloads(got: Answer, say: Say) -> None:
    shown = {name: got.headers.get(name) for name in ("content-type", "content-disposition")}
    if list(shown.values()) == list(SHOWN.query.values()):
        say("downloads", "ok", "a download has the type and the file name of its URL")
    else:
        say(
            "downloads",
            "note",
            f"a download has not the type and the file name of its URL, but {shown}; {THROUGH_THE_SERVER}",
        )


async def _check_copies(objects: RecordedObjects, key: str, say: Say) -> None:
    """Copy an object with its ETag and with an earlier one."""
    found = await objects.head(key)
    await objects.put(key, b"other")
    newest = await objects.head(key)
    if found is None or newest is None:
        say("copies", "note", f"an object that was just written is missing; {THROUGH_THE_SERVER}")
        return
    try:
        stale = await objects.copy(key, f"{key}-stale", found.etag)
        good = await objects.copy(key, f"{key}-copy", newest.etag)
    except StoreUnavailable as error:
        say("copies", "note", f"a copy failed ({reason_of(error)}): {THROUGH_THE_SERVER}")
        return
    copied = await objects.get(f"{key}-copy")
    if not good or copied is None or copied.body != b"other":
        say("copies", "note", f"a copy with the present ETag did not succeed: {THROUGH_THE_SERVER}")
    elif stale:
        say("copies", "note", "a copy with an old ETag succeeded; the program does not depend on it")
    else:
        say("copies", "ok", "a copy with an old ETag was refused, and one with the present ETag succeeded")


def status_of(answer: Answer | str) -> int | str:
    """Return the status of a response, or the reason why there was none."""
    return answer if isinstance(answer, str) else answer.status
