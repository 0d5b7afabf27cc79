"""The API token, which is stored in Secrets Manager. The app has its SHA-256 only."""

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
    """A token that stays the same until its generation is raised.

    Each run generates a token. Only the run that creates the version of the secret uses it. The app's SHA-256 must
    belong to the token of that version, even if a run is interrupted. So one request writes both: the SHA-256 is a
    label of the version, beside AWSCURRENT. Later runs ignore the token that they generate, and read the label from the
    state.

    The token is an ordinary argument, which the state holds encrypted and a refresh reads from AWS. A write-only
    argument would be null after a refresh, and the next update would fail.

    name          the name of the secret, unique in the account and its region
    generation    each generation is a version of the secret, so raising it replaces the token. In a protected stack it
                  is raised by one at a time, because the previous version stays until the next rotation

    Outputs: `sha256`, hexadecimal. A preview that plans the version does not know it, because the update generates
    another token.
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
        # A preview generates another token than the update. It does not know the id of a version that is only planned,
        # so with the id in `all` it shows no SHA-256.
        labels = Output.all(version.version_id, version.version_stages)
        self.sha256: Output[str] = labels.apply(lambda known: _labelled(known[1]))
        self.register_outputs({"sha256": self.sha256})

    def _secret_version(
        self, secret: aws.secretsmanager.Secret, generation: int, *, after: Resource | None = None
    ) -> aws.secretsmanager.SecretVersion:
        """Register a generation of the token.

        The generation before the current one is registered without protection, so that the next rotation can delete it.
        If it has to be created again, for instance after an aborted `destroy`, it is created after the current one and
        does not get the label AWSCURRENT.

        after    the version of the current generation, if this is the generation before it
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
