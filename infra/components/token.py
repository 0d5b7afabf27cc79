"""The API token: in Secrets Manager, and nowhere else. The app knows its SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import pulumi
import pulumi_aws as aws
from pulumi import Input, Output, Resource

from infra.components import Component, StackContext

LABEL = "sha256-"


class ApiToken(Component):
    """A token that is made once and stays the same.

    Each run draws a token, and only the run that makes the secret's version uses it. The app's SHA-256 must be of the
    token in that version, even if a run is cut off. So the SHA-256 is written in the same request as the token: as a
    label of the version, beside AWSCURRENT. Later runs ignore what they draw, and read the label from the state.

    The token is an ordinary argument, which the state holds encrypted and a refresh reads again from AWS. A write-only
    argument would be null after a refresh, and the next update would fail.

    name          of the secret: unique in the account and its region
    generation    a version of the secret each: raising it replaces the token. In prod, where the current version is
                  protected, it is raised by one at a time: the version before stays until the next rotation

    Outputs: `sha256`, hexadecimal; unknown while the version is only planned, because the update draws another token.
    """

    def __init__(self, context: StackContext, *, name: Input[str], generation: int) -> None:
        super().__init__(context, "token")
        secret = aws.secretsmanager.Secret(
            self.resource_name("token"),
            name=name,
            description="The API token, for Authorization: Bearer ...",
            recovery_window_in_days=30 if context.is_protected else 0,
            opts=self.protected_options(),
        )
        version = self._secret_version(secret, generation)
        if context.is_protected and generation > 1:
            self._secret_version(secret, generation - 1, after=version)
        # A preview draws another token than the update. It does not know the id of a version that is only planned, so it
        # shows no SHA-256 for it.
        labels = Output.all(version.version_id, version.version_stages)
        self.sha256: Output[str] = labels.apply(lambda known: _labelled(known[1]))
        self.register_outputs({"sha256": self.sha256})

    def _secret_version(
        self, secret: aws.secretsmanager.Secret, generation: int, *, after: Resource | None = None
    ) -> aws.secretsmanager.SecretVersion:
        """Register a generation. `after`: the current one, if this is the one before.

        The generation before is registered without protection, so that the next rotation can delete it. If it has to be
        made anew, for instance after an aborted `destroy`, it comes after the current one and does not take AWSCURRENT.
        """
        token = secrets.token_urlsafe(32)
        label = LABEL + hashlib.sha256(token.encode()).hexdigest()
        ignored = ["secret_string", "version_stages"]
        return aws.secretsmanager.SecretVersion(
            self.resource_name(f"token-{generation}"),
            secret_id=secret.id,
            secret_string=Output.secret(token),
            version_stages=["AWSCURRENT", label] if after is None else [label],
            opts=self.protected_options(ignore_changes=ignored)
            if after is None
            else self.child_options(ignore_changes=ignored, depends_on=[after]),
        )


def _labelled(labels: Sequence[str]) -> str:
    for label in labels:
        if label.startswith(LABEL):
            return label.removeprefix(LABEL)
    raise pulumi.RunError(
        f"the secret of the API token has lost its label {LABEL}...: expected the label that the program gave it; "
        f"raise {pulumi.get_project()}:token_generation by one to make a new token"
    )
