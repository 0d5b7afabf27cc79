"""Credentials for S3 that obstore does not find by itself.

obstore finds access keys in the environment, web identities, and the roles of ECS, EKS and EC2. `provider` says whether
the environment has credentials of another kind, and is then what obstore asks before a request, and again before they
expire. One kind is known today:

    a container's endpoint with its token in the environment    Lambda with SnapStart: the snapshot must hold no keys, so
                                                                Lambda sets no AWS_ACCESS_KEY_ID
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from ..errors import StoreUnavailable

FULL_URI, TOKEN = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN"
TOKEN_FILE = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"  # noqa: S105 - a name
TIMEOUT_S = 2.0
"""The endpoint is on this machine."""
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "169.254.170.2", "169.254.170.23", "fd00:ec2::23")
"""Hosts that are asked without TLS: loopback, and the link-local addresses of ECS and EKS. Others need https."""

Provider = Callable[[], dict[str, Any]]
"""Returns obstore's S3Credential: access_key_id, secret_access_key, token, and expires_at (None: never)."""


class _Answer(Struct, frozen=True, rename="pascal"):
    """https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html"""

    access_key_id: str
    secret_access_key: str
    token: str | None = None
    expiration: datetime | None = None


def provider(environment: Mapping[str, str] = os.environ) -> Provider | None:
    """Return what obstore must ask for credentials; None if it finds those of this environment by itself.

    The environment is read again at each call, because Lambda may change it when it restores a snapshot.
    """
    if environment.get("AWS_ACCESS_KEY_ID") or not environment.get(FULL_URI) or environment.get(TOKEN_FILE):
        return None
    return lambda: container_credentials(environment)


def container_credentials(environment: Mapping[str, str]) -> dict[str, Any]:
    """Fetch credentials from the endpoint that the environment names. Blocks for TIMEOUT_S at most.

    obstore calls this in a thread of its own. Raises StoreUnavailable with a reason that holds no secret.
    """
    from http.client import HTTPConnection, HTTPException, HTTPSConnection
    from urllib.parse import urlsplit

    given = environment.get(FULL_URI, "")
    uri = urlsplit(given)
    if not uri.hostname or not (uri.scheme == "https" or (uri.scheme == "http" and uri.hostname in LOCAL_HOSTS)):
        raise StoreUnavailable(f"{FULL_URI} is {given!r}: expected https, or http on this machine")
    kind = HTTPSConnection if uri.scheme == "https" else HTTPConnection
    connection = kind(uri.hostname, uri.port, timeout=TIMEOUT_S)
    where = f"the endpoint for AWS credentials, {uri.scheme}://{uri.netloc}{uri.path},"
    try:
        path = f"{uri.path or '/'}{f'?{uri.query}' if uri.query else ''}"
        connection.request("GET", path, headers={"Authorization": environment.get(TOKEN, "")})
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException) as error:
        raise StoreUnavailable(f"{where} cannot be reached: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise StoreUnavailable(f"{where} answered {response.status}")
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except msgspec.MsgspecError:  # without its words, which may quote the secret
        raise StoreUnavailable(f"{where} did not answer AccessKeyId, SecretAccessKey, Token and Expiration") from None
    return {
        "access_key_id": answer.access_key_id,
        "secret_access_key": answer.secret_access_key,
        "token": answer.token,
        "expires_at": answer.expiration,
    }
