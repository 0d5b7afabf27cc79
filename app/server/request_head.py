"""The head of a request: its end, and the limits of its request line and of its size."""

from __future__ import annotations

from .connections import HeadersTooLarge, UriTooLong

MAX_LINE = 16 * 1024
MAX_HEAD = 32 * 1024
END = b"\r\n\r\n"


class RequestHead:
    """A head that arrives in parts. It ends with its first empty line."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that belong to the head, of all parts."""
        self._tail = b""
        """The last bytes of an incomplete head, which may be the first bytes of END."""
        self._line_ended = False

    def add(self, data: bytes) -> int:
        """Return how many bytes of this part belong to the head.

        Raises UriTooLong if the request line has more than MAX_LINE bytes, and HeadersTooLarge if the head has more
        than MAX_HEAD bytes.
        """
        before = self.size
        found = data.find(END)
        end = found + len(END) if found >= 0 else len(data)
        if self._tail:
            overlap = (self._tail + data[: len(END) - 1]).find(END)
            if overlap >= 0:
                found, end = 0, overlap + len(END) - len(self._tail)
        self.size += end
        if found >= 0:
            self._tail = b""
            if self.size <= MAX_HEAD:
                self._line_ended = True
                return end
        else:
            self._tail = (self._tail + data)[1 - len(END) :]
        if not self._line_ended:
            line = data.find(b"\r\n", 0, end)
            self._line_ended = line >= 0
            if before + (line if line >= 0 else end) > MAX_LINE:
                raise UriTooLong(f"found a request line of over {MAX_LINE} bytes; expected at most {MAX_LINE}")
        if self.size > MAX_HEAD:
            raise HeadersTooLarge(f"found over {MAX_HEAD} bytes of headers; expected at most {MAX_HEAD}")
        return end
