"""Removes archives that a killed command has left in the bucket of a stack, with all their versions.

`stack_backup` deletes its archives as soon as they are not needed. A rule of the bucket cannot be relied on to remove
what is left within a day: it acts at midnight only, and in a bucket with versions it needs two such nights.
"""

from __future__ import annotations

import datetime as dt
from email.utils import parsedate_to_datetime
from typing import Any

from .settings import EXPORTS, Settings

LIFE = dt.timedelta(hours=20)
"""Age of archives that are removed. They are looked for every hour, so none is kept for longer than a day."""
TIMEOUT_S = 10


def remove_old_exports(settings: Settings) -> int:
    """Delete all versions of old archives, and return how many versions there were. Ages are those of S3. Blocks.

    Raises ClientError or BotoCoreError if S3 refuses or does not answer.
    """
    import boto3.session
    from botocore.config import Config

    bucket = settings.outputs.bucket
    patience = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"max_attempts": 1})
    session = boto3.session.Session(region_name=settings.outputs.region)
    client: Any = session.client("s3", endpoint_url=settings.local.s3_endpoint_url, config=patience)
    removed = 0
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=EXPORTS):
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
            if now - version["LastModified"] >= LIFE:
                client.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
                removed += 1
    return removed
