"""The board: memory shared between a session process and the console that watches it.

The session writes and never waits: the latest counters in one place, fault records in a ring where old ones are
overwritten. The reader copies, and then looks whether the writer came round meanwhile. Both rely on x86's order of
stores and on 8-byte stores being whole; those of `struct.pack_into` are not, it writes zeros first.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final, Self

from tuimig.core.model import RECORD

RECORDS: Final = 1 << 16  # slots of the ring: 2 MiB
STATE_MOST: Final = 4 << 20  # bytes of the latest state
_SEQUENCE, _LENGTH = 0, 1  # numbers of the words: of the state
_HEAD, _CLAIMED = 2, 3  # records that are there, and those that are there or being written
_STATE: Final = 4096
_RING: Final = _STATE + STATE_MOST
SIZE: Final = _RING + RECORDS * RECORD.size
_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Fault records since the last look, oldest first; `missed` more were overwritten before it."""

    records: bytes
    missed: int


class Board:
    """One session's board. Create it, hand `fd` to the session process, and open it there by that number."""

    def __init__(self, fd: int) -> None:
        """Takes `fd` over."""
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._words = memoryview(self._map)[:_STATE].cast("Q")
        self._written = self._word(_HEAD)
        self._read = self._written
        self._seen = 0

    @classmethod
    def create(cls) -> Self:
        fd = os.memfd_create("tuimig-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    def close(self) -> None:
        if self.fd >= 0:
            self._words.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    # ------------------------------------------------------------ the session's side

    def show(self, state: bytes) -> None:
        """Replace the latest state. One that is too large is left out: the next smaller one is shown."""
        if len(state) > STATE_MOST:
            return
        sequence = self._word(_SEQUENCE)
        self._put(_SEQUENCE, sequence + 1)  # odd: being written
        self._put(_LENGTH, len(state))
        self._map[_STATE : _STATE + len(state)] = state
        self._put(_SEQUENCE, sequence + 2)

    def log(self, records: bytes) -> None:
        """Append fault records."""
        data = memoryview(records)
        while data:
            slot = self._written % RECORDS
            count = min(len(data) // RECORD.size, RECORDS - slot)
            at = _RING + slot * RECORD.size
            self._put(_CLAIMED, self._written + count)
            self._map[at : at + count * RECORD.size] = data[: count * RECORD.size]
            self._written += count
            self._put(_HEAD, self._written)
            data = data[count * RECORD.size :]

    # ------------------------------------------------------------ the console's side

    def state(self) -> bytes | None:
        """The latest state, None where there is none that was not returned before."""
        for _ in range(_TRIES):
            before = self._word(_SEQUENCE)
            if before == self._seen:
                return None
            if before % 2:
                continue
            state = self._map[_STATE : _STATE + min(self._word(_LENGTH), STATE_MOST)]
            if self._word(_SEQUENCE) == before:
                self._seen = before
                return state
        return None  # written all the time: the next look will find it

    def batch(self) -> Batch:
        head = self._word(_HEAD)
        # A quarter of the ring is left to the writer while we copy.
        first = max(self._read, head - RECORDS * 3 // 4)
        copied = self._slots(first, head)
        overwritten = max(0, self._word(_CLAIMED) - RECORDS - first)
        missed = first - self._read + min(overwritten, head - first)
        self._read = head
        return Batch(copied[overwritten * RECORD.size :], missed)

    def _slots(self, first: int, last: int) -> bytes:
        begin, end = first % RECORDS, last % RECORDS
        if last == first:
            return b""
        if begin < end:
            return self._map[_RING + begin * RECORD.size : _RING + end * RECORD.size]
        return self._map[_RING + begin * RECORD.size : SIZE] + self._map[_RING : _RING + end * RECORD.size]

    def _word(self, at: int) -> int:
        return self._words[at]

    def _put(self, at: int, value: int) -> None:
        self._words[at] = value
