"""Credentials and region of a profile in ~/.aws: keys, SSO, a role or a process.

They come from the credential chain of botocore. botocore is imported only when credentials are requested, so it never
adds to a cold start.
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
"""botocore is asked again after at most so many seconds. It renews credentials in time, and reads a file that
changed."""
_CREDENTIALS = re.compile(r"^\s*(aws_access_key_id|credential_process|sso_|role_arn|login_session)", re.MULTILINE)


def has_profile(environment: Mapping[str, str]) -> bool:
    """Return whether a profile is named, or whether the files of the AWS command line hold credentials. Blocks."""
    if any(environment.get(name) for name in PROFILES):
        return True
    return any(_CREDENTIALS.search(_text(path)) for path in _files(environment))


def profile_credentials() -> ProfileCredentials:
    """Return the function that obstore must call for credentials. Raises ConfigError if botocore is not installed."""
    if importlib.util.find_spec("botocore") is None:
        raise ConfigError(
            "AWS credentials are in a profile (AWS_PROFILE or ~/.aws), which boto3 reads, and boto3 is not installed:"
            " install it, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return ProfileCredentials()


def region(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the region that AWS_REGION, AWS_DEFAULT_REGION or the profile in use names; None if none does. Blocks."""
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
            continue  # botocore reports what is wrong when it is asked for credentials
        for section in (f"profile {profile}", profile):
            if found := parser.get(section, "region", fallback=None):
                return found
    return None


def _files(environment: Mapping[str, str]) -> list[Path]:
    """Return the paths of the credentials file and the config file, even if they do not exist."""
    home = environment.get("HOME") or _home_of_user()
    found = []
    for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")):
        if given := environment.get(variable):
            found.append(Path(given).expanduser())
        elif home:
            found.append(Path(home) / ".aws" / name)
    return found


def _home_of_user() -> str | None:
    """Return the home directory in the user database, which botocore uses too if HOME is not set."""
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
    """Asks the credential chain of botocore at each call. Blocks; obstore calls it in its own thread.

    If botocore can renew the credentials, they are kept with their session, which renews them before they expire. Other
    credentials are read again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renewed: Any = None
        for name in ("botocore.credentials", "botocore.tokens"):
            logging.getLogger(name).addFilter(_without_traceback)

    def forget(self) -> None:
        """Forget the credentials, so that the next call begins a new session of botocore."""
        with self._lock:
            self._renewed = None

    def __call__(self) -> S3Credential:
        """Return credentials. Blocks. Raises StoreUnavailable with a reason that holds no secret."""
        import botocore.session
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import BotoCoreError, ClientError

        with self._lock:
            try:
                found = self._renewed or botocore.session.Session().get_credentials()
                if found is None:
                    raise StoreUnavailable(
                        "no AWS credentials found: the profile in use has none, and this machine has no role"
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
    """Log only one line if botocore cannot renew credentials. The error that is raised has the reason."""
    record.exc_info = None
    return True


def _lasts_s(credentials: RefreshableCredentials) -> int:
    """Return how many seconds credentials are valid, at most ASK_AGAIN_S.

    botocore only tells whether they are valid for a given time, so this is a binary search.
    """
    ends = bisect.bisect_left(
        range(ASK_AGAIN_S + 1), True, key=lambda seconds: credentials.refresh_needed(refresh_in=seconds)
    )
    return max(0, ends - 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hint(error: Exception) -> str:
    return "; run `aws sso login`" if "SSO" in type(error).__name__ or "sso" in str(error) else ""
