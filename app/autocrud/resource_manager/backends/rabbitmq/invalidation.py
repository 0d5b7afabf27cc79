"""The messages between instances: bodies to evict, an index that has changed, or everything."""

from __future__ import annotations

import logging

import msgspec
from msgspec import Struct

log = logging.getLogger("crudstack.amqp")

VERSION = 1
MOST_UIDS = 10_000
"""How many uids a message lists. If there are more, it says that all bodies are to be evicted."""


class Invalidation(Struct, frozen=True):
    """The bodies and the index that readers can no longer rely on.

    forget   uids of bodies that were deleted
    refresh  True if the index has changed
    clear    True if any body may have been deleted
    """

    forget: frozenset[str] = frozenset()
    refresh: bool = False
    clear: bool = False

    def __bool__(self) -> bool:
        return self.refresh or self.clear or bool(self.forget)

    def merged_with(self, other: Invalidation) -> Invalidation:
        """Return an invalidation that says what both say."""
        forget = self.forget | other.forget
        clear = self.clear or other.clear or len(forget) > MOST_UIDS
        return Invalidation(frozenset() if clear else forget, self.refresh or other.refresh, clear)


NOTHING = Invalidation()
REFRESH = Invalidation(refresh=True)
EVERYTHING = Invalidation(refresh=True, clear=True)


class Message(Struct, frozen=True, omit_defaults=True):
    """An invalidation for all instances, or a marker for the queue of its sender.

    version       VERSION
    sender        the name of the session that sent it
    invalidation  `words` on the wire
    marker        the number of a marker; None if the message is an invalidation
    """

    version: int
    sender: str
    invalidation: Invalidation = msgspec.field(default=NOTHING, name="words")
    marker: int | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Message)


def encode(sender: str, invalidation: Invalidation = NOTHING, marker: int | None = None) -> bytes:
    """Return the body of a message."""
    return _encode(Message(VERSION, sender, invalidation, marker))


def decode(body: bytes) -> Message:
    """Return the message of a body.

    A body that cannot be read may have meant anything, so the message for it invalidates everything.
    """
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
