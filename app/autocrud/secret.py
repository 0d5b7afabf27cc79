"""Texts that nothing prints, and addresses with credentials, parsed once and strictly.

    Secret("hunter2")                                           prints ***
    redis_url("redis://:hunter2@cache/0")                      prints redis://***@cache/0

Drivers disagree about addresses that are not percent-encoded: libpq ends a password at the first `@`, Python at the last
one. The rest of the password then is a host name, which drivers, name servers and logs repeat. So each address
that two readers could take apart in different ways is refused. No error of this module quotes what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload
from urllib.parse import quote, unquote

from .errors import ConfigError

HIDDEN = "***"
SHORTEST = 4
"""Characters of a secret that `hide` replaces: shorter ones stand in ordinary words."""


class Secret:
    """A text whose `str`, `repr` and attributes do not show it. `reveal()` returns it; equal texts are equal secrets.

    shown  what is printed instead
    parts  the texts that `hide` removes besides: the password of an address, as it is sent
    """

    __slots__ = ("_parts", "reveal", "shown")
    reveal: Callable[[], str]
    shown: str
    _parts: Callable[[], list[str]]

    def __init__(self, text: str, shown: str = HIDDEN, parts: Iterable[str] = ()) -> None:
        # In closures: debuggers and loggers that print the attributes of objects do not find the text either.
        hidden = sorted({text, *parts}, key=len, reverse=True)

        def reveal() -> str:
            return text

        def all_parts() -> list[str]:
            return hidden

        self.reveal, self._parts, self.shown = reveal, all_parts, shown

    def hide(self, text: str) -> str:
        """Return a text without this secret, for words of drivers and servers."""
        for part in self._parts():
            if len(part) >= SHORTEST:
                text = text.replace(part, HIDDEN)
        return text

    def __repr__(self) -> str:
        return self.shown

    def __eq__(self, other: object) -> bool:
        return self.reveal() == other.reveal() if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.reveal())


class AddressFormat(NamedTuple):
    """A kind of address: the name that errors use, an example, the schemes, and a pattern of what is after the scheme."""

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
    """Return a text that may be a secret. For whoever is about to hand it to a driver."""
    return text.reveal() if isinstance(text, Secret) else text


@overload
def hidden(text: str | Secret) -> Secret: ...
@overload
def hidden(text: None) -> None: ...
def hidden(text: str | Secret | None) -> Secret | None:
    """Return a text as a secret, whatever it holds; None for None."""
    return Secret(text) if isinstance(text, str) else text


def url(text: str | Secret, *forms: AddressFormat) -> Secret:
    """Return an address as a secret. Raises ConfigError, which does not quote it, if it is none or is ambiguous."""
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
    """Return the address of a PostgreSQL: a URL, or libpq's `host=... password=...`. Raises ConfigError."""
    text = plain(text)
    if "://" not in text and re.match(r"\s*\w+\s*=", text):
        # password, and what else ends so: sslpassword
        found = re.findall(r"password\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", text)
        parts = [part for value in found for part in (value, re.sub(r"\\(.)", r"\1", value.strip("'")))]
        return Secret(text, HIDDEN, tuple(parts))
    return url(text, POSTGRES)


def redis_url(text: str | Secret) -> Secret:
    """Return the address of a Redis. Raises ConfigError."""
    return url(text, REDIS, REDIS_SOCKET)


def amqp_url(text: str | Secret) -> Secret:
    """Return the address of a RabbitMQ. Raises ConfigError."""
    return url(text, AMQP)


def http_url(text: str | Secret) -> Secret:
    """Return the URL of an S3 server, which may hold user and password. Raises ConfigError."""
    return url(text, HTTP)


def endpoint_url(text: str, name: str) -> str:
    """Return the URL of an S3 server. Raises ConfigError, which does not quote it, if it is none or holds credentials."""
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
    """Return a value for an error message: as it is if it is a short word or number, else only what kind of thing it is.

    A secret that was put into the wrong setting is longer than a word, or has digits and punctuation.
    """
    shown = repr(value)
    if re.fullmatch(r"[A-Za-z '_\[\]-]{1,18}|-?[0-9]{1,3}", shown):
        return shown
    return f"a text of {len(value)} characters" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _parts(credentials: str, query: str) -> set[str]:
    """Return the password as it is written and as it is sent, and the values of the query, among which may be one too."""
    written = {credentials, credentials.partition(":")[2]}
    written |= {pair.partition("=")[2] for pair in query.split("&") if "pass" in pair.partition("=")[0].lower()}
    return {form for part in written for form in (part, unquote(part), quote(unquote(part), safe=""))}


def _unreadable(form: AddressFormat, found: str) -> ConfigError:
    return ConfigError(f"{form.name} cannot be read: {found}; expected {form.like}; {ENCODE}")
