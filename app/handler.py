"""The entry point of the Lambda function, `app.handler.handler`. The import creates the app; see `aws_lambda`."""

from __future__ import annotations

import os

from . import settings
from .aws_lambda import LambdaHandler

if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
    # All machines that start from the snapshot would otherwise generate the same ids.
    from snapshot_restore_py import register_after_restore
    from uuid_utils import reseed_rng

    register_after_restore(reseed_rng)

handler = LambdaHandler(settings.load())
