"""Keys that come faster than they are dealt with, in order: over a slow line they arrive in bursts.

Textual hands a key to whatever has the focus when it arrives. A key travels from there up to the app, and what it does
may move the focus: one that came right behind it would go to the wrong place. So one key is under way at a time. A
message follows it on the same way; when that has come through, the key has done what it does.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Final

from textual.app import App
from textual.events import Event, Key, Paste
from textual.message import Message
from textual.timer import Timer

ROUNDS: Final = 3  # a key's effect may itself be a message or two: an input's end, a table's choice
GIVE_UP_S: Final = 0.3  # the way is gone: a screen that has closed itself


class Behind(Message):
    """Comes to the app when all that was before it on its way is done."""

    def __init__(self, number: int, rounds: int) -> None:
        self.number = number
        self.rounds = rounds
        super().__init__()


class TypeAhead(App[int]):
    """An app that loses no key."""

    _numbers = itertools.count(1)
    _under_way = 0  # the number of the key; 0: none
    _given_up: Timer | None = None

    def __init__(self) -> None:
        super().__init__()
        self._typed: deque[Event] = deque()

    async def on_event(self, event: Event) -> None:
        if not isinstance(event, Key | Paste) or event.is_forwarded:
            await super().on_event(event)
        elif self._under_way:
            self._typed.append(event)
        else:
            await self._take(event)

    async def _take(self, event: Event) -> None:
        target = self.focused or self.screen
        number = self._under_way = next(self._numbers)
        await super().on_event(event)
        if target.post_message(Behind(number, ROUNDS)):
            self._given_up = self.set_timer(GIVE_UP_S, lambda: self._through(number))
        else:
            self.call_later(self._through, number)

    def on_behind(self, message: Behind) -> None:
        message.stop()
        if message.number != self._under_way:
            return
        target = self.focused or self.screen
        if message.rounds > 1 and self._typed and target.post_message(Behind(message.number, message.rounds - 1)):
            return
        self.call_later(self._through, message.number)

    async def _through(self, number: int) -> None:
        if number != self._under_way:
            return
        self._under_way = 0
        if self._given_up is not None:
            self._given_up.stop()
        if self._typed:
            await self._take(self._typed.popleft())
