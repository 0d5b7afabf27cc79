"""Credentials and region of a profile in ~/.aws: keys, SSO, a role or a process, through botocore's own chain.

botocore is imported only when credentials are asked for, so it is never part of a cold start.
"""

from __future__ import annotations

import bisect
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from botocore.credentials import RefreshableCredentials
    from obstore.store import S3Credential

PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
ASK_AGAIN_S = 600
"""botocore is asked again after this time at the latest. It renews credentials in time, and reads a file that was changed."""
_CREDENTIALS = re.compile(r"^\s*(aws_access_key_id|credential_process|sso_|role_arn|login_session)", re.MULTILINE)


def has_profile(environment: Mapping[str, str]) -> bool:
    """Return whether a profile is named, or the default files of the AWS command line hold credentials."""
    if any(environment.get(name) for name in PROFILES):
        return True
    return any(_CREDENTIALS.search(_text(path)) for path in _files(environment))


def profile_credentials() -> ProfileCredentials:
    """Return what obstore must call for the profile's credentials. Raises ConfigError if botocore is not installed."""
    if importlib.util.find_spec("botocore") is None:
        raise ConfigError(
            "AWS credentials are in a profile (AWS_PROFILE or ~/.aws), which boto3 reads, and boto3 is not installed:"
            " install it, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return ProfileCredentials()


def region(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the region that AWS_REGION, AWS_DEFAULT_REGION or the profile in use names."""
    if given := environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"):
        return given
    import configparser

    profile = next((name for variable in PROFILES if (name := environment.get(variable))), "default")
    files = [text for path in _files(environment) if (text := _text(path))]
    for text in reversed(files):  # the config file comes first
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(text)
        except configparser.Error:
            continue  # botocore says what is wrong with it when it is asked for credentials
        for section in (f"profile {profile}", profile):
            if found := parser.get(section, "region", fallback=None):
                return found
    return None


def _files(environment: Mapping[str, str]) -> list[Path]:
    """Return the credentials file and the config file, whether they exist or not."""
    home = environment.get("HOME") or _home_of_user()
    found = []
    for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")):
        if given := environment.get(variable):
            found.append(Path(given).expanduser())
        elif home:
            found.append(Path(home) / ".aws" / name)
    return found


def _home_of_user() -> str | None:
    """Return the home directory that the user database names, which botocore reads too if HOME is not set."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


class ProfileCredentials:
    """Ask botocore's chain for credentials, each time it is called. Blocks; obstore calls it in a thread of its own.

    Credentials that botocore renews are kept with their session, so that it renews them before they end. Others are
    read again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renewed: Any = None
        for name in ("botocore.credentials", "botocore.tokens"):
            logging.getLogger(name).addFilter(_without_traceback)

    def forget(self) -> None:
        """Begin a new session of botocore at the next call."""
        with self._lock:
            self._renewed = None

    def __call__(self) -> S3Credential:
        """Return credentials. Raises StoreUnavailable with a reason that holds no secret."""
        import botocore.session
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import BotoCoreError, ClientError

        with self._lock:
            try:
                found = self._renewed or botocore.session.Session().get_credentials()
                if found is None:
                    raise StoreUnavailable(
                        "no AWS credentials found: neither the profile in use nor this machine has any"
                    )
                if isinstance(found, RefreshableCredentials):
                    self._renewed = found
                keys = found.get_frozen_credentials()
            except (BotoCoreError, ClientError) as error:
                raise StoreUnavailable(
                    f"the profile in use has no AWS credentials: {_one_line(error)}{_hint(error)}"
                ) from None
            lasts_s = _lasts_s(found) if isinstance(found, RefreshableCredentials) else ASK_AGAIN_S
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=lasts_s),
        }


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keep the one line that botocore logs if it cannot renew credentials. The reason is in the error that is raised."""
    record.exc_info = None
    return True


def _lasts_s(credentials: RefreshableCredentials) -> int:
    """Return for how many seconds credentials are valid, at most ASK_AGAIN_S. botocore tells only whether they last so long."""
    ends = bisect.bisect_left(
        range(ASK_AGAIN_S + 1), True, key=lambda seconds: credentials.refresh_needed(refresh_in=seconds)
    )
    return max(0, ends - 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hint(error: Exception) -> str:
    return "; run `aws sso login`" if "SSO" in type(error).__name__ or "sso" in str(error) else ""
