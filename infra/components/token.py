"""The API token: in Secrets Manager, and nowhere else. The app knows its SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import pulumi_aws as aws
from pulumi import Input, Output

from infra.components import Component, Stack

LABEL = "sha256-"


class ApiToken(Component):
    """A token that is made once and stays the same.

    Each run draws a token, and only the run that makes the secret's version uses it. Its SHA-256 must be of the very same token, whatever run
    is cut off where. So it is written in the same request: as a label of the version, beside AWSCURRENT. Later runs ignore what they draw, and
    read the label from the state. The state has the token encrypted, as an argument of the version, and AWS has no way to tell it from there.

    name          of the secret: unique in the account and its region
    generation    a version of the secret each: raising it replaces the token

    Outputs: `sha256`, hexadecimal.
    """

    def __init__(self, stack: Stack, *, name: Input[str], generation: int) -> None:
        super().__init__(stack, "token")
        token = secrets.token_urlsafe(32)
        secret = aws.secretsmanager.Secret(
            self.named("token"),
            name=name,
            description="The API token, for Authorization: Bearer ...",
            recovery_window_in_days=30 if stack.keeps else 0,
            opts=self.child(),
        )
        version = aws.secretsmanager.SecretVersion(
            self.named(f"token-{generation}"),
            secret_id=secret.id,
            secret_string_wo=Output.secret(token),
            secret_string_wo_version=1,
            version_stages=["AWSCURRENT", LABEL + hashlib.sha256(token.encode()).hexdigest()],
            opts=self.child(ignore_changes=["secret_string_wo", "version_stages"]),
        )
        self.sha256: Output[str] = version.version_stages.apply(_labelled)
        self.register_outputs({"sha256": self.sha256})


def _labelled(labels: Sequence[str]) -> str:
    return next(label.removeprefix(LABEL) for label in labels if label.startswith(LABEL))
