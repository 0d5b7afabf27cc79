"""What an instance tells the others. What is not confirmed is kept, and said again in the next session: hearing it twice harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .invalidation import NOTHING, Words, written

ANSWER_S = 1.0
"""How long a writer waits for the broker."""
SILENCE_S = 5.0
"""How long a connection may be silent before another one is tried."""


class Speaker:
    """`reachable`: whether writers wait for an answer."""

    def __init__(self, name: str, unsaid: Words) -> None:
        self._name = name
        self.reachable = True
        self._waiting, self._under_way = unsaid, NOTHING
        self._speakers: list[asyncio.Future[None]] = []
        self._something = asyncio.Event()
        if unsaid:
            self._something.set()

    @property
    def unsaid(self) -> Words:
        return self._under_way.and_(self._waiting)

    async def say(self, words: Words) -> bool:
        """Tell the others, and wait until the broker has it: for ANSWER_S at most, and not at all while it is known to be down. False: the
        broker was silent."""
        self._waiting = self._waiting.and_(words)
        self._something.set()
        if not self.reachable:
            return True
        said = asyncio.get_running_loop().create_future()
        self._speakers.append(said)
        try:
            async with asyncio.timeout(ANSWER_S):
                await said
        except TimeoutError:
            return False
        return True

    def give_up(self) -> None:
        """Let nobody wait until it works again."""
        self.reachable = False
        speakers, self._speakers = self._speakers, []
        _answer(speakers)

    async def speak(self, publish: Callable[[bytes], Awaitable[object]], works: Callable[[], None]) -> None:
        """Say what there is to say, as long as the session lasts. Whoever speaks while a message is under way shares the next one."""
        while True:
            await self._something.wait()
            self._something.clear()
            self._under_way, self._waiting = self.unsaid, NOTHING
            speakers, self._speakers = self._speakers, []
            try:
                if self._under_way:
                    async with asyncio.timeout(SILENCE_S):
                        await publish(written(self._name, self._under_way))
            except BaseException:
                self._speakers += speakers
                self._something.set()
                raise
            self._under_way = NOTHING
            works()
            _answer(speakers)


def _answer(speakers: Sequence[asyncio.Future[None]]) -> None:
    for said in speakers:
        if not said.done():
            said.set_result(None)
