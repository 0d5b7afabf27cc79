"""The bucket that holds the data: private, encrypted and versioned. It accepts requests over TLS only."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi_aws as aws
from pulumi import Input, Output

from app.settings import EXPORTS
from infra.components import Component, StackContext
from infra.grants import Grant, Statement

READ = ("s3:GetObject",)
WRITE = (*READ, "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
UPLOAD_HEADERS = ["content-type", "if-match", "if-none-match", "if-range", "range", "x-amz-checksum-sha256"]
"""Headers that pages may send to the bucket."""
DOWNLOAD_HEADERS = ["accept-ranges", "content-disposition", "content-range", "etag"]
"""Headers of the bucket's answers that pages may read, besides those that every page may read."""


class DataBucket(Component):
    """The bucket, its policy, and its rules for old versions, exports and pages of other origins.

    keep_days      days that deleted and overwritten objects can be restored
    keep_newest    the largest number of old versions of one object that are kept for these days: HEAD of an S3-SQLite
                   log is overwritten at every commit
    origins        origins whose pages may upload and download files by presigned URLs

    Outputs: `bucket`, which is its name, `arn` and `region`.
    """

    def __init__(
        self, context: StackContext, *, keep_days: int = 30, keep_newest: int = 100, origins: Sequence[str] = ()
    ) -> None:
        super().__init__(context, "bucket")
        bucket = aws.s3.Bucket(
            self.resource_name("data"), force_destroy=not context.is_protected, opts=self.data_options()
        )
        self.bucket, self.arn, self.region = bucket.bucket, bucket.arn, bucket.region
        # The resources that protect the data are protected like the bucket itself.
        aws.s3.BucketOwnershipControls(
            self.resource_name("data"),
            bucket=bucket.bucket,
            rule={"object_ownership": "BucketOwnerEnforced"},
            opts=self.data_options(),
        )
        closed = aws.s3.BucketPublicAccessBlock(
            self.resource_name("data"),
            bucket=bucket.bucket,
            block_public_acls=True,
            block_public_policy=True,
            ignore_public_acls=True,
            restrict_public_buckets=True,
            opts=self.data_options(),
        )
        versioning = aws.s3.BucketVersioning(
            self.resource_name("data"),
            bucket=bucket.bucket,
            versioning_configuration={"status": "Enabled"},
            opts=self.data_options(),
        )
        aws.s3.BucketServerSideEncryptionConfiguration(
            self.resource_name("data"),
            bucket=bucket.bucket,
            rules=[{"apply_server_side_encryption_by_default": {"sse_algorithm": "AES256"}}],
            opts=self.data_options(),
        )
        aws.s3.BucketLifecycleConfiguration(
            self.resource_name("data"),
            bucket=bucket.bucket,
            rules=[
                {
                    "id": "uploads",
                    "status": "Enabled",
                    "filter": {"prefix": ""},
                    "abort_incomplete_multipart_upload": {"days_after_initiation": 1},
                },
                {
                    "id": "days",
                    "status": "Enabled",
                    "filter": {"prefix": ""},
                    "expiration": {"expired_object_delete_marker": True},
                    "noncurrent_version_expiration": {"noncurrent_days": keep_days},
                },
                # Two rules, because one rule with both limits would keep the newest versions for ever.
                {
                    "id": "newest",
                    "status": "Enabled",
                    "filter": {"prefix": ""},
                    "noncurrent_version_expiration": {"noncurrent_days": 1, "newer_noncurrent_versions": keep_newest},
                },
                # An export is removed after its download, or by the app within a day if its command was killed. This
                # rule is for a stack whose app does not run. It takes up to four days.
                {
                    "id": "exports",
                    "status": "Enabled",
                    "filter": {"prefix": EXPORTS},
                    "expiration": {"days": 1},
                    "noncurrent_version_expiration": {"noncurrent_days": 1},
                },
            ],
            # S3 accepts a rule about old versions only if versioning is on.
            opts=self.data_options(depends_on=[versioning]),
        )
        if origins:
            # Not protected, unlike the rest: `cors` may become empty again.
            aws.s3.BucketCorsConfiguration(
                self.resource_name("data"),
                bucket=bucket.bucket,
                cors_rules=[
                    {
                        "allowed_origins": list(origins),
                        "allowed_methods": ["GET", "HEAD", "PUT"],
                        "allowed_headers": UPLOAD_HEADERS,
                        "expose_headers": DOWNLOAD_HEADERS,
                        "max_age_seconds": 3600,
                    }
                ],
                opts=self.child_options(),
            )
        aws.s3.BucketPolicy(
            self.resource_name("data"),
            bucket=bucket.bucket,
            policy=Output.json_dumps(
                {
                    "Version": "2012-10-17",
                    "Statement": [
                        {
                            "Sid": "TlsOnly",
                            "Effect": "Deny",
                            "Principal": "*",
                            "Action": "s3:*",
                            "Resource": [bucket.arn, Output.format("{0}/*", bucket.arn)],
                            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
                        }
                    ],
                }
            ),
            # S3 sometimes refuses two changes of a bucket at once.
            opts=self.data_options(depends_on=[closed]),
        )
        self.register_outputs({"bucket": self.bucket, "arn": self.arn, "region": self.region})

    def exports_grant(self) -> Grant:
        """Return a grant to remove exports for good: all their versions."""
        exports: Input[str] = Output.format("{0}/{1}*", self.arn, EXPORTS)
        return Grant(
            statements=(
                Statement(
                    "ListExports",
                    ("s3:ListBucketVersions",),
                    (self.arn,),
                    {"StringLike": {"s3:prefix": f"{EXPORTS}*"}},
                ),
                Statement("RemoveExports", ("s3:DeleteObjectVersion",), (exports,)),
            )
        )

    def grant(self, access: str, prefix: str = "") -> Grant:
        """Return a grant to list and read the objects whose keys begin with `prefix`, or also to write them.

        Raises ValueError if `access` is another word, or if the prefix has a wildcard.

        access    "read", or "write" for both
        """
        if access not in ("read", "write"):
            raise ValueError(f"access is {access!r}, expected read or write")
        if set(prefix) & set("*?$"):
            raise ValueError(f"the prefix is {prefix!r}, expected one without *, ? and $, which IAM reads as patterns")
        objects: Input[str] = Output.format("{0}/{1}*", self.arn, prefix)
        listed = {"StringLike": {"s3:prefix": f"{prefix}*"}} if prefix else None
        return Grant(
            statements=(
                Statement("ListData", ("s3:ListBucket",), (self.arn,), listed),
                Statement("UseData", READ if access == "read" else WRITE, (objects,)),
            ),
            outputs={"bucket": self.bucket, "prefix": prefix, "region": self.region},
        )
