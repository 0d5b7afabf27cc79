"""Texts that are never printed, and addresses with credentials, which are parsed once and strictly.

    Secret("hunter2")                      prints ***
    redis_url("redis://:hunter2@cache/0")  prints redis://***@cache/0

Drivers disagree about addresses that are not percent-encoded: libpq ends a password at the first `@`, Python at the
last one. The rest of the password then becomes a host name, which drivers, name servers and logs repeat. So an address
is refused if two parsers could read it in different ways. No error of this module quotes the address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload
from urllib.parse import quote, unquote

from typing_extensions import override

from .errors import ConfigError

HIDDEN = "***"
SHORTEST = 4
"""The minimal length of a secret that `hide` replaces: a shorter one may be part of an ordinary word."""


class Secret:
    """A text that `str`, `repr` and attributes do not show. `reveal()` returns it. Equal texts are equal secrets.

    Args:
        text: The secret.
        shown: The text to print in its place.
        parts: Other texts that `hide` removes, such as the password of an address in the form in which it is sent.
    """

    __slots__ = ("_parts", "reveal", "shown")
    reveal: Callable[[], str]
    shown: str
    _parts: Callable[[], list[str]]

    def __init__(self, text: str, shown: str = HIDDEN, parts: Iterable[str] = ()) -> None:
        # The text is kept in closures, so that debuggers and loggers that print attributes do not show it.
        hidden = sorted({text, *parts}, key=len, reverse=True)

        def reveal() -> str:
            return text

        def all_parts() -> list[str]:
            return hidden

        self.reveal, self._parts, self.shown = reveal, all_parts, shown

    def hide(self, text: str) -> str:
        """Return a message of a driver or a server without this secret."""
        for part in self._parts():
            if len(part) >= SHORTEST:
                text = text.replace(part, HIDDEN)
        return text

    @override
    def __repr__(self) -> str:
        return self.shown

    @override
    def __eq__(self, other: object) -> bool:
        return self.reveal() == other.reveal() if isinstance(other, Secret) else NotImplemented

    @override
    def __hash__(self) -> int:
        return hash(self.reveal())


class AddressFormat(NamedTuple):
    """The format of an address.

    `name` and `like` are the name and the example for errors, `schemes` the accepted schemes, and `rest` a pattern for
    the part after the scheme and the credentials.
    """

    name: str
    like: str
    schemes: tuple[str, ...]
    rest: str


_HOST = r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s/?#@:,\[\]]+)(?::[0-9]{0,5})?"
_QUERY = r"(?:\?[^\s#]*)?"
POSTGRES = AddressFormat(
    "the address of PostgreSQL",
    "postgresql://user:password@host:port/database",
    ("postgresql", "postgres"),
    rf"(?:{_HOST}(?:,{_HOST})*)?(?:/[^\s?#]*)?{_QUERY}",
)
REDIS = AddressFormat(
    "redis_url",
    "redis://[[user]:password@]host:port/db, where db is a number, or rediss:// with TLS",
    ("redis", "rediss"),
    rf"(?:{_HOST}|:[0-9]{{0,5}})?(?:/[0-9]*)?{_QUERY}",
)
REDIS_SOCKET = AddressFormat(REDIS.name, REDIS.like, ("unix",), rf"/[^\s?#]*{_QUERY}")
AMQP = AddressFormat(
    "amqp_url",
    "amqp://[user:password@]host[:port][/vhost], or amqps:// with TLS (?cafile=...)",
    ("amqp", "amqps"),
    rf"{_HOST}(?:/[^\s?#]*)?{_QUERY}",
)
HTTP = AddressFormat("the S3 endpoint", "http://127.0.0.1:9000", ("http", "https"), rf"{_HOST}(?:/[^\s?#]*)?")

ENCODE = "in user and password write @ as %40, / as %2F, ? as %3F, # as %23, % as %25, \\ as %5C and a blank as %20"


def plain(text: str | Secret) -> str:
    """Return the text of a secret, or a plain text as it is, to pass it to a driver."""
    return text.reveal() if isinstance(text, Secret) else text


@overload
def hidden(text: str | Secret) -> Secret: ...
@overload
def hidden(text: None) -> None: ...
def hidden(text: str | Secret | None) -> Secret | None:
    """Return a text as a secret, and None for None."""
    return Secret(text) if isinstance(text, str) else text


def url(text: str | Secret, *forms: AddressFormat) -> Secret:
    """Return an address as a secret.

    Raises ConfigError, which does not quote the address, if the address is invalid or ambiguous. `forms` are the
    accepted formats; the error describes the first one.
    """
    text = plain(text)
    form = forms[0]
    scheme, separator, after = text.partition("://")
    matching = next((one for one in forms if scheme.lower() in one.schemes), None)
    if not separator or matching is None:
        raise _unreadable(form, "it begins with none of " + ", ".join(f"{s}://" for f in forms for s in f.schemes))
    credentials, at, rest = after.rpartition("@")
    if "@" in credentials:
        raise _unreadable(form, "it has more than one @")
    if at and (found := re.search(r"[/?#\[\]\\\s]", credentials)):
        raise _unreadable(form, f"a {'blank' if found[0].isspace() else found[0]} comes before its @")
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise _unreadable(form, "a % in it is not followed by two hexadecimal digits")
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise _unreadable(form, "it holds a blank")
    if re.fullmatch(matching.rest, rest) is None:
        raise _unreadable(form, "what follows its scheme and credentials is no host, port and path")
    place, question, query = rest.partition("?")
    shown = f"{scheme}://{HIDDEN + at if at else ''}{place}{question + HIDDEN if question else ''}"
    return Secret(text, shown, _parts(credentials, query))


def postgres_url(text: str | Secret) -> Secret:
    """Return the address of a PostgreSQL server, a URL or `host=... password=...` as libpq takes it.

    Raises ConfigError if a URL is invalid or ambiguous.
    """
    text = plain(text)
    if "://" not in text and re.match(r"\s*\w+\s*=", text):
        # matches sslpassword too
        found = re.findall(r"password\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", text)
        parts = [part for value in found for part in (value, re.sub(r"\\(.)", r"\1", value.strip("'")))]
        return Secret(text, HIDDEN, tuple(parts))
    return url(text, POSTGRES)


def redis_url(text: str | Secret) -> Secret:
    """Return the address of a Redis server. Raises ConfigError if it is invalid or ambiguous."""
    return url(text, REDIS, REDIS_SOCKET)


def amqp_url(text: str | Secret) -> Secret:
    """Return the address of a RabbitMQ server. Raises ConfigError if it is invalid or ambiguous."""
    return url(text, AMQP)


def http_url(text: str | Secret) -> Secret:
    """Return the URL of an S3 server, which may hold user and password. Raises ConfigError if it is invalid."""
    return url(text, HTTP)


def endpoint_url(text: str, name: str) -> str:
    """Return the URL of an S3 server, which must not hold credentials.

    `name` is the setting that the error names. Raises ConfigError, which does not quote the URL, if the URL is invalid
    or holds credentials.
    """
    if "@" in text:
        raise ConfigError(
            f"{name} holds an @: expected a URL without user and password, like {HTTP.like}; keys belong in"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    try:
        return http_url(text).reveal()
    except ConfigError:
        raise ConfigError(f"{name} cannot be read: expected a URL without a query, like {HTTP.like}") from None


def quoted(value: Any) -> str:
    """Return a description of a value for an error message: the value if it is a short word or number, else its type.

    A secret in the wrong setting is not repeated, because it is longer than a word, or has digits and punctuation.
    """
    shown = repr(value)
    if re.fullmatch(r"[A-Za-z '_\[\]-]{1,18}|-?[0-9]{1,3}", shown):
        return shown
    return f"a text of {len(value)} characters" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _parts(credentials: str, query: str) -> set[str]:
    """Return the texts that may be a password: as they are written, decoded, and as they are sent.

    These are the credentials, the password in them, and values of the query whose name contains "pass".
    """
    written = {credentials, credentials.partition(":")[2]}
    written |= {pair.partition("=")[2] for pair in query.split("&") if "pass" in pair.partition("=")[0].lower()}
    return {form for part in written for form in (part, unquote(part), quote(unquote(part), safe=""))}


def _unreadable(form: AddressFormat, found: str) -> ConfigError:
    return ConfigError(f"{form.name} cannot be read: {found}; expected {form.like}; {ENCODE}")
