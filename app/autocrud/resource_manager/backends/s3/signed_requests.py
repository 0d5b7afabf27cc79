"""Requests to S3 that obstore cannot sign or send: presigned URLs with headers, checksums, conditional copies.

botocore signs them. It is imported at the first of these requests, because that takes a tenth of a second. AWS Lambda
has botocore; elsewhere it comes with boto3. Addresses and region are those that obstore uses, so both always mean the
same bucket.

HEAD and COPY may take effect twice without harm, so they are repeated, each attempt on a new connection.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import http.client
import importlib.util
import logging
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

from typing_extensions import override

from ....errors import ConfigError, StoreUnavailable
from ....secret import endpoint_url
from ...runtime.threads import in_daemon_thread
from .clients import RENEW_PAUSE_S, RENEWABLE, WAITS_S
from .errors import element
from .objects import Head, Signed

if TYPE_CHECKING:
    from obstore.store import S3Credential

T = TypeVar("T")
Method = Literal["GET", "HEAD", "PUT"]

log = logging.getLogger("crudstack.s3")

COPY_WAITS_S = (120.0, 120.0, 120.0)
"""Seconds without a byte of the answer to a COPY, by attempt. Some servers answer only when they have copied all."""
RETRIED = (429, 500, 502, 503, 504)
"""Statuses of answers after which a request is repeated."""
MAX_ANSWER = 64 * 1024
"""More bytes of an answer are not read."""
_OF_WHOLE_OBJECT = re.compile(r"[A-Za-z0-9+/]{43}=")
"""A SHA-256 in base64. The checksum of an object that was uploaded in parts has a suffix, and is one of checksums."""


class _Answer(NamedTuple):
    """The answer to a request. The names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def code(self) -> str:
        """The error code of S3; empty if there is none, as in every answer to HEAD."""
        return element("Code", self.body) or ""


class SignedRequests:
    """Signs and sends requests to one bucket.

    Args:
        bucket: Its name.
        address: Returns the presigned URL of an object. Scheme, host, path and region are taken from it.
        credentials: Returns credentials; may block. None if botocore is to find those of the environment.
        renew: Forgets cached credentials, so that new ones are fetched.
        public_url: The address of the server that clients reach, for presigned URLs. None: that of `address`.
    """

    def __init__(
        self,
        bucket: str,
        address: Callable[[str], Any],
        credentials: Callable[[], S3Credential] | None,
        renew: Callable[[], None] | None,
        public_url: str | None = None,
    ) -> None:
        self._bucket, self._address, self._given, self._renew = bucket, address, credentials, renew
        self._public = None if public_url is None else endpoint_url(public_url, "public_url").rstrip("/")
        self._ambient: Any = None
        self._mutex = threading.Lock()

    async def head(self, key: str) -> Head | None:
        """Return the properties of an object with its checksum, or None if there is no such object."""
        answer = await self._send("HEAD", key, {"x-amz-checksum-mode": "ENABLED"}, WAITS_S["small"])
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise _unavailable("HEAD", key, str(answer.status))
        found = answer.headers.get("x-amz-checksum-sha256", "")
        return Head(
            int(answer.headers["content-length"]),
            answer.headers.get("etag", ""),
            parsedate_to_datetime(answer.headers["last-modified"]),
            b64decode(found).hex() if _OF_WHOLE_OBJECT.fullmatch(found) else None,
        )

    async def copy(self, source: str, target: str, etag: str) -> bool:
        """Copy the content of an object if it has this ETag. Return False if it has another one, or is missing."""
        headers = {
            "content-type": "application/octet-stream",
            "x-amz-copy-source": f"/{self._bucket}/{quote(source)}",
            "x-amz-copy-source-if-match": etag,
            "x-amz-metadata-directive": "REPLACE",
            "x-amz-tagging-directive": "REPLACE",
        }
        answer = await self._send("PUT", target, headers, COPY_WAITS_S)
        if answer.status == 412 or (answer.status == 404 and answer.code != "NoSuchBucket"):
            return False
        if answer.status != 200 or "<CopyObjectResult" not in answer.body:  # errors come with status 200 too
            raise _unavailable("COPY", target, f"{answer.status} {answer.code}")
        return True

    async def verifies_checksums(self, key: str) -> bool:
        """Return whether the server refuses an upload whose content has another SHA-256 than its signed header.

        Uploads an object twice by presigned URLs, with the right content and with another one. Raises StoreUnavailable
        if the first upload fails.
        """
        body, other = b"right", b"wrong"
        checksum = b64encode(hashlib.sha256(body).digest()).decode()
        signed = Signed(headers={"content-length": str(len(body)), "x-amz-checksum-sha256": checksum})
        url, region = await self._target(key)
        url = await self._presign(url, region, "PUT", 60, signed)
        first, second = [
            await in_daemon_thread(functools.partial(_put, url, content, signed.headers)) for content in (body, other)
        ]
        if first != 200:
            raise _unavailable("PUT", key, f"{first} for an upload by a presigned URL")
        return second in range(400, 500)

    async def presign(self, key: str, method: Method, seconds: int, signed: Signed) -> str:
        """Return a URL, for clients, that allows only requests with these parameters and headers."""
        url, region = await self._target(key)
        if self._public is not None:  # signed for this address, because the signature covers the host
            url = f"{self._public}/{self._bucket}/{quote(key)}"
        return await self._presign(url, region, method, seconds, signed)

    async def _presign(self, url: str, region: str, method: Method, seconds: int, signed: Signed) -> str:
        def work() -> str:
            from botocore.auth import S3SigV4QueryAuth
            from botocore.awsrequest import AWSRequest

            request = AWSRequest(method, url, headers=dict(signed.headers), params=dict(signed.query))
            S3SigV4QueryAuth(self._credentials(), "s3", region, expires=seconds).add_auth(request)
            return str(request.url)

        return await in_daemon_thread(work)

    async def _send(self, method: Method, key: str, headers: Mapping[str, str], waits_s: Sequence[float]) -> _Answer:
        """Send a request without a body, and return its answer. Raises StoreUnavailable if there is none.

        waits_s  seconds to wait for a byte of the answer, by attempt
        """
        url, region = await self._target(key)
        problem, renewed = "", False
        for wait_s in waits_s:
            try:
                answer = await in_daemon_thread(
                    functools.partial(self._send_once, method, url, region, headers, wait_s)
                )
            except (OSError, http.client.HTTPException) as error:
                problem = _reason(error)
                continue
            problem = f"{answer.status} {answer.code}".strip()
            expired = answer.code in RENEWABLE or (method == "HEAD" and answer.status in (400, 403))
            if expired and not renewed:  # an answer to HEAD has no code
                renewed = True
                self._forget()
                await asyncio.sleep(RENEW_PAUSE_S)
            elif answer.status not in RETRIED:
                return answer
        raise _unavailable(method, key, problem)

    async def _target(self, key: str) -> tuple[str, str]:
        """Return the URL of an object, without a query, and the region that signatures name."""
        if importlib.util.find_spec("botocore") is None:
            raise ConfigError("direct transfers to S3 are signed by boto3, which is not installed: install boto3")
        url = urlsplit(await self._address(key))
        region = parse_qs(url.query)["X-Amz-Credential"][0].split("/")[-3]
        return url._replace(query="").geturl(), region

    def _send_once(self, method: Method, url: str, region: str, headers: Mapping[str, str], wait_s: float) -> _Answer:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        signed = AWSRequest(method, url, headers=dict(headers), data=b"")
        S3SigV4Auth(self._credentials(), "s3", region).add_auth(signed)
        request = urllib.request.Request(url, b"" if method == "PUT" else None, dict(signed.headers), method=method)
        try:
            with _opener().open(request, timeout=wait_s) as response:
                return _answer(response.status, response)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error)

    def _credentials(self) -> Any:
        """Return credentials. May block. Raises StoreUnavailable if there are none."""
        if self._given is not None:
            from botocore.credentials import ReadOnlyCredentials

            given = self._given()
            return ReadOnlyCredentials(given["access_key_id"], given["secret_access_key"], given["token"])
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with self._mutex:
                if self._ambient is None:
                    from botocore.session import Session

                    self._ambient = Session().get_credentials()
                found = self._ambient
            if found is not None:
                return found.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"there are no AWS credentials: {' '.join(str(error).split())[:300]}") from None
        raise StoreUnavailable("there are no AWS credentials to sign with")

    def _forget(self) -> None:
        """Forget the credentials, because S3 may have refused them."""
        if self._renew is not None:
            self._renew()
        with self._mutex:
            self._ambient = None


def _put(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Send a PUT, and return the status of the answer; 0 if there is none."""
    headers = {**headers, "content-type": "application/octet-stream"}
    try:
        with _opener().open(urllib.request.Request(url, body, headers, method="PUT"), timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, http.client.HTTPException):
        return 0


def _unavailable(method: str, key: str, problem: str) -> StoreUnavailable:
    """Log the problem, and return the error for the client, which does not name it."""
    log.error("%s %s: %s", method, key, problem)
    return StoreUnavailable("the object storage cannot be used right now; nothing was changed")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the signature to another server, which could not verify it."""

    @override
    def redirect_request(self, *_: object) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        context.load_verify_locations(bundle)
    return urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))


def _answer(status: int, response: Any) -> _Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return _Answer(status, headers, response.read(MAX_ANSWER).decode(errors="replace"))


def _reason(error: BaseException) -> str:
    """Return the cause of a failed connection, without the URL."""
    reason = getattr(error, "reason", error)
    return f"{type(reason).__name__}: {getattr(reason, 'strerror', None) or type(error).__name__}"
