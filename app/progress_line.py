"""A line on stderr that shows how far a command is, if stderr is a terminal."""

from __future__ import annotations

import shutil
import sys
import time

BAR = 20
SHOW_EVERY_S = 0.1
MB = 1_000_000


class ProgressLine:
    """One line that is replaced by the next one."""

    def __init__(self) -> None:
        self._shown = False
        self._watched = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        """Show a step in place of the one before."""
        self.show(f"{what}...")

    def show(self, text: str) -> None:
        """Show a text in place of the one before."""
        if self._watched:
            line = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


class ProgressBar:
    """A progress bar for exports and imports: what is worked on, how much of it is done, and how fast.

    bytes_of  the texts after which an amount is in bytes
    """

    def __init__(self, *bytes_of: str) -> None:
        self._line, self._bytes_of = ProgressLine(), bytes_of
        self._what, self._began, self._next = "", 0.0, 0.0

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """Show the progress. Called as often as the work likes."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._next = what, now, 0.0
        if now >= self._next or done == total:
            self._next = now + SHOW_EVERY_S
            self._line.show(self._text(done, total, now - self._began))

    def _text(self, done: int, total: int | None, seconds: float) -> str:
        amount = self._amount(done) if total is None else f"{self._amount(done)} of {self._amount(total)}"
        speed = f", {self._amount(round(done / seconds))}/s" if seconds > 1 else ""
        if not total:
            return f"{self._what}: {amount}{speed}"
        filled = BAR * min(done, total) // total
        return f"{self._what} [{'#' * filled}{'.' * (BAR - filled)}] {amount}{speed}"

    def _amount(self, number: int) -> str:
        return f"{number / MB:,.1f} MB" if self._what.endswith(self._bytes_of) else f"{number:,}"

    def clear(self) -> None:
        """Remove the bar."""
        self._line.clear()
