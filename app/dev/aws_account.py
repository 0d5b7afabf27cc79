"""Makes commands for a stack use the AWS account of `aws:profile` in its config, as Pulumi's provider does.

The provider prefers this profile to access keys in the environment; boto3 and the S3 client prefer the keys. So
commands that call AWS themselves first call `use_profile`. Otherwise they would use another account.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from ..autocrud.errors import ConfigError
from .pulumi_cli import ConfigValue

KEY = "aws:profile"
PREFERRED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE")
"""Variables of credentials that boto3 prefers to AWS_PROFILE."""
PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")


def stack_profile(config: Mapping[str, ConfigValue]) -> str | None:
    """Return the profile in a stack's config, or None. Raises ConfigError if it is a secret."""
    value = config.get(KEY)
    if value is None or value.text == "":
        return None
    if value.text is None:
        raise ConfigError(f"{KEY} is a secret, expected the plain name of a profile: set it again without --secret")
    return value.text


def check_profile(profile: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if the environment names another profile, or if ~/.aws does not define this one."""
    if profile is None:
        return
    for variable in PROFILES:
        if (other := environment.get(variable)) and other != profile:
            raise ConfigError(
                f"{variable} is {other}, and {KEY} in the stack's config is {profile}: expected one account; `unset"
                f" {variable}`, or change the stack by `pulumi config set {KEY} {other}`"
            )
    if profile not in (known := _profiles()):
        there = f"are {', '.join(sorted(known))}" if known else "is none"
        raise ConfigError(
            f"{KEY} in the stack's config is {profile}, expected a profile in ~/.aws/config or ~/.aws/credentials,"
            f" where there {there}: run `aws configure --profile {profile}`, or change the stack by `pulumi config"
            f" set {KEY} NAME`"
        )


def _profiles() -> dict[str, dict[str, str]]:
    """Return the profiles in ~/.aws by name. Raises ConfigError if the files cannot be read."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        found: dict[str, dict[str, str]] = botocore.session.Session().full_config["profiles"]
    except BotoCoreError as error:
        raise ConfigError(f"the profiles in ~/.aws cannot be read: {' '.join(str(error).split())}") from None
    return found


def use_profile(profile: str | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Make every AWS client of this process use a stack's profile; None changes nothing.

    Call it after the last `pulumi` command, because Pulumi may keep its state in a bucket of the environment's account.
    Raises ConfigError like `check_profile`, or if the profile assumes its role with keys of the environment.
    """
    check_profile(profile, environment)
    if profile is None:
        return
    _check_source(profile)
    for name in (*PREFERRED, *PROFILES):
        environment.pop(name, None)
    environment["AWS_PROFILE"] = profile


def _check_source(profile: str) -> None:
    """Raise ConfigError if a profile assumes its role with keys of the environment, which `use_profile` removes."""
    known, seen, name = _profiles(), set(), profile
    while name in known and name not in seen:
        seen.add(name)
        if known[name].get("credential_source") == "Environment":
            raise ConfigError(
                f"the profile {name} has credential_source = Environment, expected source_profile = NAME: this command"
                " cannot tell the keys of the role from those that take it"
            )
        name = known[name].get("source_profile", "")
