"""The body of a request while it arrives: its end, and the limits of its framing and of its duration."""

from __future__ import annotations

from ..autocrud.errors import CrudError
from .connections import HeadersTooLarge, MalformedRequest, RequestTimeout

MAX_CHUNKS = 32 * 1024
MAX_FRAMING = 32 * 1024
"""Bytes of chunk extensions and trailers of a body."""
CHUNK_FRAMING = 12
"""Bytes of size and line ends that each chunk may have."""
LEAST_CHUNK = 1024
"""Average size of the chunks of an upload after the first MAX_CHUNKS, at least, in bytes."""
BODY_S = 10.0
UPLOAD_PAUSE_S = 30.0
"""Seconds that the client of an upload may pause. It must not begin again because its network was gone for a moment."""
MIN_RATE = 4096
"""Bytes per second of a body that a client must send, or of a response that it must read, after the first seconds."""


class RequestBody:
    """The counts of a body.

    left      bytes that have not arrived; None if the body is chunked
    raw       bytes that have arrived, with their framing
    received  bytes of the content that have arrived
    chunks    number of chunks that have arrived
    streamed  whether the application processes the body while it arrives, so that it needs no memory (an upload)
    """

    __slots__ = ("chunks", "left", "raw", "received", "streamed")

    def __init__(self, left: int | None = 0) -> None:
        self.left, self.raw, self.received, self.chunks, self.streamed = left, 0, 0, 0, False

    def arrived(self, size: int) -> None:
        """Count bytes that have arrived."""
        self.raw += size
        if self.left is not None:
            self.left -= size

    def framing_error(self) -> CrudError | None:
        """Return the error if a chunked body exceeds a limit of its framing."""
        if self.chunks > MAX_CHUNKS + (self.received // LEAST_CHUNK if self.streamed else 0):
            return MalformedRequest(
                f"found a body of {self.chunks} chunks, which is too many; expected fewer and larger ones"
            )
        if self.raw - self.received > MAX_FRAMING + CHUNK_FRAMING * self.chunks:
            return HeadersTooLarge(
                f"found over {MAX_FRAMING} bytes of chunk extensions or trailers; expected at most {MAX_FRAMING}"
            )
        return None

    def lateness(self, waited: float, pause: float) -> CrudError | None:
        """Return the error if the client has missed a deadline.

        waited  seconds since the body began, without those in which the application did not read
        pause   seconds since bytes have arrived
        """
        grace = UPLOAD_PAUSE_S if self.streamed else BODY_S
        if waited <= grace + self.raw / MIN_RATE and pause <= grace:
            return None
        return RequestTimeout(
            f"found {self.received} bytes of a body after {waited:.0f} s;"
            f" expected {MIN_RATE} bytes a second after the first {grace:g} s"
        )
