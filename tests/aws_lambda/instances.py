"""Settings and requests of the instances of a function that share a bucket."""

from __future__ import annotations

import hashlib
import json

from tests.lambda_runtime import Instance
from tests.services import BUCKET

TOKEN = "a-very-secret-token-0123456789"  # noqa: S105 - of these tests
ARTICLE = {"title": "Sun", "content": "It shines.", "author": "alice"}
SIGNED_IN = {"authorization": f"Bearer {TOKEN}"}


def settings(s3, prefix: str, url: str | None = None, **outputs) -> dict[str, str]:
    token = {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
    stack = {"version": 1, "storage": "s3-sqlite", "bucket": BUCKET, "prefix": prefix, "auth": token, **outputs}
    return {
        "CRUDSTACK_OUTPUTS": json.dumps(stack),
        "AWS_ENDPOINT_URL_S3": url or s3.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
    }


def ask(one: Instance, method: str, path: str, **how):
    headers = {**SIGNED_IN, **how.pop("headers", {})}
    return one.request(method, path, headers=headers, **how)
