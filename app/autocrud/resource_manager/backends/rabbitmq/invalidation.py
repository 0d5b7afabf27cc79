"""What instances tell each other: bodies to forget, an index to look at again, or everything."""

from __future__ import annotations

import logging

import msgspec
from msgspec import Struct

log = logging.getLogger("crudstack.amqp")

VERSION = 1
MOST_UIDS = 10_000
"""How many are listed; where there are more, everything is forgotten instead."""


class Words(Struct, frozen=True):
    """
    forget   uids of bodies that are gone
    refresh  whether the index has changed
    clear    whether anything may be gone
    """

    forget: frozenset[str] = frozenset()
    refresh: bool = False
    clear: bool = False

    def __bool__(self) -> bool:
        return self.refresh or self.clear or bool(self.forget)

    def and_(self, others: Words) -> Words:
        """Both at once."""
        forget = self.forget | others.forget
        clear = self.clear or others.clear or len(forget) > MOST_UIDS
        return Words(frozenset() if clear else forget, self.refresh or others.refresh, clear)


NOTHING = Words()
REFRESH = Words(refresh=True)
EVERYTHING = Words(refresh=True, clear=True)


class Message(Struct, frozen=True, omit_defaults=True):
    """As it is sent. `marker` is for the queue of its sender alone."""

    version: int
    sender: str
    words: Words = NOTHING
    marker: int | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Message)


def written(sender: str, words: Words = NOTHING, marker: int | None = None) -> bytes:
    return _encode(Message(VERSION, sender, words, marker))


def read(body: bytes) -> Message:
    """A message; one that cannot be read may have meant anything."""
    try:
        message = _decoder.decode(body)
    except msgspec.MsgspecError as error:  # UnicodeDecodeError is not one
        reason = str(error)
    except UnicodeDecodeError:
        reason = "it is no text"
    else:
        if message.version == VERSION:
            return message
        reason = f"its version is {message.version}"
    log.warning("RabbitMQ: a message cannot be read (%s); everything is forgotten", reason)
    return Message(VERSION, "", EVERYTHING)
