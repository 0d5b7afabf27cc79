"""Credentials for S3 that obstore does not find itself.

obstore finds access keys in the environment, web identities, and the roles of ECS, EKS and EC2. If the environment has
credentials of another kind, `provider` returns the function that obstore calls for them:

    ContainerCredentials   an endpoint whose token is in the environment. Lambda with SnapStart has one: it sets no
                           AWS_ACCESS_KEY_ID, because a snapshot must hold no keys
    ProfileCredentials     a profile in ~/.aws (profile)

To add a kind, return its function from `provider`. obstore 0.12 does this with the function:

- It calls it in its own thread and never in that of the event loop, so the function may block.
- It keeps the result until 5 minutes before `expires_at`, then calls again, at most once in 100 ms. None never expires.
- It keeps one result for each S3Store. Other requests wait during a call. If the call fails, the next waiting request
  calls again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from ....errors import ConfigError, StoreUnavailable
from ....secret import Secret, plain
from .profile import has_profile, profile_credentials

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from obstore.store import S3Credential

FULL_URI, TOKEN = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN"
FOUND_BY_OBSTORE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",  # ECS
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",  # EKS
)
TIMEOUT_S = 2.0
"""The limit of all attempts together. It is short because the endpoint is on this machine."""
PAUSES_S = (0.05, 0.2)
"""The pauses between attempts."""
REUSE_S = 0.5
"""The outcome of a fetch is reused for this long. A user who tries again takes longer. Requests that waited for the
same fetch share its outcome: if the endpoint is down, they fail together, and not one time-out after the other."""
MAX_ANSWER = 64 * 1024
"""More bytes of an answer are not read."""
ENDS_SOON = timedelta(minutes=5)
"""Credentials that expire within this time are fetched again."""


class _Answer(Struct, frozen=True, rename="pascal"):
    """The answer of the endpoint.

    See https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
    """

    access_key_id: str
    secret_access_key: str
    token: str | None = None
    expiration: datetime | None = None


class _Busy(Exception):
    """The endpoint cannot answer now; another attempt may succeed."""


def provider(environment: Mapping[str, str] = os.environ) -> Callable[[], S3Credential] | None:
    """Return the function that obstore must call for credentials; None if it finds those of this environment itself.

    Raises ConfigError if only one of the two access keys is set, or if there is a profile and botocore is not
    installed.
    """
    key, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if key and not secret:
        raise _one_key_alone("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if not key and has_profile(environment):
        return profile_credentials()
    if secret and not key:
        raise _one_key_alone("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    if not environment.get(FULL_URI) or any(environment.get(name) for name in FOUND_BY_OBSTORE):
        return None
    return ContainerCredentials(environment)


def _one_key_alone(given: str, missing: str) -> ConfigError:
    return ConfigError(f"{given} is set and {missing} is not: set both, or neither to use a profile or a role")


def given_keys(key: str, secret: str | Secret | None, token: str | None) -> S3Credential:
    """Return credentials that never expire."""
    shown: Any = None if secret is None else plain(secret)
    return {"access_key_id": key, "secret_access_key": shown, "token": token, "expires_at": None}


class KeptCredentials:
    """Caches the result of a provider, so that each new client of obstore does not call the provider again.

    The cache lasts until ENDS_SOON before the credentials expire, as in obstore, or until `renew`.
    """

    def __init__(self, provider: Callable[[], S3Credential]) -> None:
        self._provider = provider
        self._kept: S3Credential | None = None

    def __call__(self) -> S3Credential:
        """Return credentials. Blocks like the provider, and raises its errors."""
        kept = self._kept
        if kept is None or _ends_soon(kept):
            kept = self._kept = self._provider()
        return kept

    def renew(self) -> None:
        """Forget the credentials, because S3 refused them. The next call asks the provider again."""
        self._kept = None
        forget = getattr(self._provider, "forget", None)
        if forget is not None:
            forget()


def _ends_soon(credential: S3Credential) -> bool:
    ends = credential.get("expires_at")
    return ends is not None and ends - datetime.now(UTC) < ENDS_SOON


class ContainerCredentials:
    """Fetches credentials from the endpoint that the environment names.

    Reads the environment at each fetch, because it may change when a snapshot is restored. Uses the wall clock, because
    a monotonic clock may stop while the machine is frozen.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, str | None], float, S3Credential | StoreUnavailable] | None = None

    def __call__(self) -> S3Credential:
        """Return credentials, at most REUSE_S old. Blocks for about TIMEOUT_S at most.

        Raises StoreUnavailable with one sentence that holds no secret.
        """
        with self._lock:
            asked = self._environment.get(FULL_URI, ""), self._environment.get(TOKEN)
            if self._last is None or self._last[0] != asked or not 0 <= time.time() - self._last[1] < REUSE_S:
                outcome: S3Credential | StoreUnavailable
                try:
                    outcome = fetch(*asked)
                except StoreUnavailable as error:
                    outcome = error
                self._last = (asked, time.time(), outcome)
            outcome = self._last[2]
        if isinstance(outcome, StoreUnavailable):
            raise StoreUnavailable(str(outcome))
        return outcome

    def forget(self) -> None:
        """Forget the last outcome, so that the next call fetches."""
        with self._lock:
            self._last = None


def fetch(uri: str, token: str | None) -> S3Credential:
    """Fetch credentials from a container's endpoint. Blocks for about TIMEOUT_S at most.

    Repeats refused connections and answers of 500 and above. Raises StoreUnavailable with one sentence that holds no
    secret: no token, no part of the answer, and no user or query of the URI.
    """
    parts = _endpoint(uri)
    if token is not None and not (token.isascii() and token.isprintable()):
        raise StoreUnavailable(f"{TOKEN} has characters that no HTTP header can have: expected printable ASCII")
    port = "" if parts.port is None else f":{parts.port}"
    where = f"the endpoint for AWS credentials at {parts.scheme}://{parts.hostname}{port}"
    deadline = time.monotonic() + TIMEOUT_S
    for pause_s in (*PAUSES_S, None):
        try:
            body = _get(parts, token, deadline - time.monotonic())
            break
        except _Busy as busy:
            if pause_s is None or time.monotonic() + pause_s >= deadline:
                raise StoreUnavailable(f"{where} {busy}") from None
            time.sleep(pause_s)
        except StoreUnavailable as refused:
            raise StoreUnavailable(f"{where} {refused}") from None
    try:
        answer = msgspec.json.decode(body, type=_Answer)
        if not answer.access_key_id or not answer.secret_access_key:
            raise msgspec.ValidationError
    except msgspec.MsgspecError:  # its text may quote the secret, so it is left out
        raise StoreUnavailable(f"{where} did not answer AccessKeyId, SecretAccessKey, Token and Expiration") from None
    ends = answer.expiration
    return {
        "access_key_id": answer.access_key_id,
        "secret_access_key": answer.secret_access_key,
        "token": answer.token,
        # obstore requires a time zone; the times of AWS are in UTC.
        "expires_at": ends.replace(tzinfo=UTC) if ends is not None and ends.tzinfo is None else ends,
    }


def _endpoint(uri: str) -> SplitResult:
    """Return the parts of the URI. Raises StoreUnavailable if it is not safe to send the token there."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname or "", parts.port
    except ValueError:  # its text quotes the URI, so it is left out
        raise StoreUnavailable(f"{FULL_URI} is not a URL: expected https, or http to this machine") from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_local(host))):
        found = f"{parts.scheme}://{host}"
        raise StoreUnavailable(f"{FULL_URI} names {found}: expected https, or http to a loopback or link-local address")
    return parts


def is_local(host: str) -> bool:
    """Return whether data that is sent to this host stays on this machine.

    Accepts the hosts that botocore allows, and every link-local address, because the APIs of Lambda are at
    169.254.100.1.
    """
    from ipaddress import ip_address

    if host in ("localhost", "fd00:ec2::23"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_link_local


def _get(parts: SplitResult, token: str | None, timeout_s: float) -> bytes:
    """Return the body of the answer. Raises _Busy or StoreUnavailable; their texts continue a sentence."""
    from http.client import HTTPConnection, HTTPException, HTTPSConnection  # Lambda has loaded this module already

    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    try:
        connection.request("GET", path, headers={} if token is None else {"Authorization": token})
        response = connection.getresponse()
        body = response.read(MAX_ANSWER)
    except TimeoutError:
        raise StoreUnavailable(f"did not answer within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise _Busy(f"cannot be reached: {error.strerror or type(error).__name__}") from None
    except (HTTPException, ValueError) as error:  # their texts quote what was sent or received
        raise StoreUnavailable(f"gave no HTTP answer: {type(error).__name__}") from None
    finally:
        connection.close()
    if response.status >= 500:
        raise _Busy(f"answered {response.status}")
    if response.status != 200:
        raise StoreUnavailable(f"answered {response.status}")
    return body
