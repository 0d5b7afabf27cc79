"""Checks the bucket and the credentials before a command exports or imports.

Its errors name addresses and causes, which clients of the API do not see.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from .autocrud.errors import ConfigError, StoreUnavailable
from .autocrud.resource_manager.backends.s3 import errors
from .autocrud.resource_manager.backends.s3.object_store import S3ObjectStore, s3
from .settings import Settings, s3_endpoint
from .wiring import region_of

_WRONG_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidClientTokenId")
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


def bucket_client(bucket: str, settings: Settings) -> S3ObjectStore:
    """Return the client of a bucket, with the endpoint and the keys of `serve`."""
    return s3(bucket, settings.local.s3_endpoint_url or s3_endpoint(), region_name=region_of(settings))


async def check_bucket_of_settings(settings: Settings) -> None:
    """Check the bucket of the models, which use S3. Raises as `check_bucket` does."""
    bucket = settings.outputs.bucket
    if bucket is not None:
        await check_bucket(bucket_client(bucket, settings), bucket, "create it, or correct CRUDSTACK_BUCKET")


async def check_bucket(objects: S3ObjectStore, bucket: str, advice: str) -> None:
    """Look at a bucket. Raises ConfigError if it does not exist, or if there are no credentials or wrong ones.

    Raises StoreUnavailable, with the cause, if the server does not answer. The credentials need not be allowed to list
    the bucket.

    advice  what to do if there is no such bucket
    """
    try:
        with _without_log_lines():
            async with contextlib.aclosing(objects.list("")) as listed:  # type: ignore[type-var]
                async for _ in listed:
                    break
    except StoreUnavailable as error:
        cause = error.__cause__
        if cause is None:
            raise
        _, code = errors.s3_answer(cause) or (0, None)
        why = errors.describe(cause)
        if code == "NoSuchBucket":
            raise ConfigError(f"there is no bucket {bucket!r}: {advice}") from None
        if why == errors.NO_CREDENTIALS:
            raise ConfigError(f"{why}: set the two variables, or AWS_PROFILE") from None
        if code in _WRONG_KEYS:
            raise ConfigError(
                f"the credentials for the bucket {bucket!r} are refused ({why}): correct AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        if code in _WRONG_REGION:  # `why` says what to do
            raise ConfigError(f"the bucket {bucket!r} cannot be used: {why}") from None
        if code is None:
            raise StoreUnavailable(
                f"the object storage cannot be used right now ({why}); nothing was changed"
            ) from None


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Log nothing about S3, because the error that is raised says the same."""
    log = logging.getLogger("crudstack.s3")
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False
