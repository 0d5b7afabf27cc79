"""The port to S3 on boto3, to measure its cost. It implements only what a cold start and a read need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from app.autocrud.resource_manager.backends.s3.object_store import (
    UNCHANGED,
    Head,
    Listed,
    NotStored,
    Object,
    ObjectStore,
    Outcome,
    Signed,
    Stored,
    Unchanged,
)


class Boto3ObjectStore(ObjectStore):
    def __init__(self, bucket: str, url: str) -> None:
        self._bucket = bucket
        keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
        self._client: Any = boto3.client("s3", endpoint_url=url, config=Config(s3={"addressing_style": "path"}), **keys)

    async def _call(self, name: str, **arguments: Any) -> Any:
        method = getattr(self._client, name)
        return await asyncio.to_thread(lambda: method(Bucket=self._bucket, **arguments))

    async def get(self, key: str) -> Object | None:
        try:
            found = await self._call("get_object", Key=key)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return Object(found["Body"].read(), found["ETag"])

    async def get_if_changed(self, key: str, etag: str) -> Object | Unchanged | None:
        try:
            found = await self._call("get_object", Key=key, IfNoneMatch=etag)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 304:
                return UNCHANGED
            return None
        return Object(found["Body"].read(), found["ETag"])

    async def get_range(self, key: str, start: int, end: int) -> bytes | None:
        raise AssertionError("a cold start reads no part of an object")

    async def put(self, key: str, body: bytes) -> None:
        await self._call("put_object", Key=key, Body=body)

    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            return Stored((await self._call("put_object", Key=key, Body=body, **condition))["ETag"])
        except ClientError:
            return NotStored()

    def list(self, prefix: str, after: str = "") -> AsyncIterator[Listed]:
        raise AssertionError("a cold start lists nothing")

    async def delete(self, keys: Sequence[str]) -> None:
        raise AssertionError("a cold start deletes nothing")

    async def download(self, key: str, path: Path) -> bool:
        found = await self.get(key)
        if found is not None:
            path.write_bytes(found.body)
        return found is not None

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None] | None:
        raise AssertionError("a cold start reads no part of an object")

    async def upload(self, key: str, path: Path) -> None:
        raise AssertionError("a cold start uploads nothing")

    async def head(self, key: str, *, checksum: bool = False) -> Head | None:
        raise AssertionError("a cold start asks for no properties")

    async def copy(self, source: str, target: str, etag: str) -> bool:
        raise AssertionError("a cold start copies nothing")

    async def verifies_checksums(self, key: str) -> bool:
        raise AssertionError("a cold start uploads nothing")

    async def presign(self, key: str, method: Literal["GET", "PUT"], seconds: int, signed: Signed | None = None) -> str:
        raise AssertionError("a cold start signs nothing")
