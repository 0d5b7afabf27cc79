"""Turn errors of obstore into one sentence each, without secrets.

The text of an error of obstore has the method, the URL and the body of the answer, and then a dump of its state.
`describe` keeps status, code and message of an S3 answer. If a connection failed, it takes the cause from the dump,
because only the dump has it.
"""

from __future__ import annotations

import html
import logging
import re

from ....errors import StoreUnavailable

log = logging.getLogger("crudstack.s3")

RANGE_NOT_SATISFIABLE = 416, "InvalidRange"
"""The answer of S3 to a GET of a range that starts behind the end of the object."""
LONGEST = 300
"""A message of the server is cut after so many characters, because some quote the whole request."""
NO_CREDENTIALS = (
    "no AWS credentials found: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set, AWS_PROFILE and ~/.aws name"
    " none, and this machine has no role"
)
_DUMP = "\n\nDebug source:"
_REQUEST = re.compile(r"Error performing ([A-Z]+) (\S+) in \S+?(?:, after \d+ retries[^-]*)? - ")
_STATUS = re.compile(r"Server returned (?:non-2xx status code|error response): (\d{3}[A-Za-z '-]*):? ?(.*)", re.DOTALL)
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_OS_MESSAGE = re.compile(r'Os \{[^}]*?message: "([^"]*)"')
_DNS = re.compile(r'"dns error",.*?error: "([^"]*)"', re.DOTALL)
_PROVIDER = re.compile(r"External AWS credential provider: (?:\w+: )?(.*)", re.DOTALL)


class RangesUnsupported(StoreUnavailable):
    """The object storage answers a GET of a range with the whole object."""


def unavailable(method: str, key: str, error: Exception) -> StoreUnavailable:
    """Return the error for the client. The details, for example an address, go only to the log."""
    log.error("%s %s: %s: %s", method, key, type(error).__name__, describe(error))
    if "non-partial response" in str(error):
        return RangesUnsupported("the object storage does not support ranges, which `crudstack s3-check` looks for")
    return StoreUnavailable("the object storage cannot be used right now; nothing was changed")


def describe(error: BaseException) -> str:
    """Describe an error of obstore in one line, such as `PUT URL: 403 Forbidden, AccessDenied: message`."""
    text, _, dump = str(error).partition(_DUMP)
    if "http://169.254.169.254/" in text:  # without keys, obstore asks the metadata service of this machine for a role
        return NO_CREDENTIALS
    if provider := _PROVIDER.search(text):
        return _line(provider[1])
    request = _REQUEST.search(text)
    what = f"{request[1]} {_address(request[2])}" if request else ""
    reason = text[request.end() :] if request else text
    if status := _STATUS.search(reason):
        return f"{what}: {_answer(status[1].strip(), status[2])}"
    if not request:
        return text.partition("\n")[0]
    return f"{what}: {_connection(reason, dump)}"


def s3_answer(error: BaseException) -> tuple[int, str] | None:
    """Return the status and the error code of the S3 answer that caused an error; None if there was no answer."""
    text = str(error).partition(_DUMP)[0]
    status = _STATUS.search(text)
    return None if status is None else (int(status[1][:3]), element("Code", status[2]) or "")


def had_no_answer(error: BaseException) -> bool:
    """Return whether the server may have received a request but gave no answer, or only a part of one.

    Returns False if there was no connection (refused, unknown name, TLS failure) or if there were no credentials.
    """
    text, _, dump = str(error).partition(_DUMP)
    if "http://169.254.169.254/" in text or _PROVIDER.search(text) or _STATUS.search(text):
        return False
    return "TimedOut" in dump or ("HttpError" in dump and "kind: Connect," not in dump)


def status_and_code(error: BaseException) -> str:
    """Return status and code of the S3 answer only, for readers who may not see addresses and names of accounts."""
    text = str(error).partition(_DUMP)[0]
    status = _STATUS.search(text)
    if status is None:
        return type(error).__name__
    code = element("Code", status[2])
    return f"{status[1].strip()}{f', {code}' if code else ''}"


def _answer(status: str, body: str) -> str:
    code, message = element("Code", body), element("Message", body)
    if code is None:
        return status
    hint = "; is the bucket in another region? set AWS_REGION" if code in _OF_REGION else ""
    return f"{status}, {code}{f': {message}' if message else ''}{hint}"


_OF_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


def element(name: str, body: str) -> str | None:
    """Return the text of an XML element of an answer in one line, or None if it is not there."""
    found = re.search(rf"<{name}>(.*?)</{name}>", body, re.DOTALL)
    return None if found is None else _line(html.unescape(found[1]))


def _connection(reason: str, dump: str) -> str:
    """Return the cause of a failed connection."""
    if certificate := _CERTIFICATE.search(dump):
        return (
            f"TLS: the certificate of the server is not accepted ({certificate[1]}); if a private CA signed it, set"
            " AWS_CA_BUNDLE to the PEM file of that CA"
        )
    if "InvalidContentType" in dump:
        return "TLS: the server does not speak TLS on this port; is its endpoint http:// instead of https://?"
    if dns := _DNS.search(dump):
        return f"the name of the server cannot be resolved ({dns[1]})"
    if "without LOCATION" in reason:
        return "the server redirects without a target; is the bucket in another region? set AWS_REGION"
    if cause := _OS_MESSAGE.search(dump):
        return cause[1]
    return _line(reason)


def _address(url: str) -> str:
    """Return a URL without its query, which may hold a signature, and without its user and password."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
