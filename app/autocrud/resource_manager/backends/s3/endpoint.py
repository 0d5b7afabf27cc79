"""The server of a bucket: its name, and the CAs that are trusted besides those of the system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ....errors import ConfigError
from ....secret import Secret, http_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig


def server_name(endpoint_url: str | Secret | None) -> str:
    """Return scheme, host and port of an endpoint, without credentials and path; `aws` if there is none.

    Raises ConfigError if the endpoint is not a URL.
    """
    url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")  # as obstore does
    if not url:
        return "aws"
    parts = urlsplit(http_url(url).shown)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def trusted_certificates() -> ClientConfig:
    """Return the option that trusts the CAs of AWS_CA_BUNDLE besides those of the system.

    Raises ConfigError if it is not a PEM file.
    """
    path = os.environ.get("AWS_CA_BUNDLE")
    if not path:
        return {}
    try:
        pem = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"AWS_CA_BUNDLE names {path!r}, which cannot be read: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(f"AWS_CA_BUNDLE names {path!r}: expected a PEM file with the certificate of a CA")
    return {"root_certificate": pem}
