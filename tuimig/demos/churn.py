"""churn: maps, unmaps and empties memory all the time. `python -m tuimig.demos.churn MEGABYTES`.

It keeps a book of what each of its areas must hold. Memory that is freed after T0 but before it was captured is gone
for ever: `munmap` tells userfaultfd only afterwards, and the report of `MADV_DONTNEED` lets the page go as soon as it
is read. That is what the guard is for.
"""

from __future__ import annotations

import mmap
import random
import struct
import threading
import time
from typing import Any

from tuimig.demos.serving import PAGE, memory, pages_asked, serve

AREA_PAGES = 64
PAUSE_S = 0.002
STAMP = struct.Struct("=QQQ")  # the area's number, how often it was made anew, the page
EMPTY = bytes(STAMP.size)


class Area:
    """`turn` times made anew; `filled` of its pages are stamped, the others must be zero."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.turn = 0
        self.filled = 0
        self.memory = memory(AREA_PAGES)
        self.fill(AREA_PAGES)

    def fill(self, pages: int) -> None:
        for page in range(pages):
            STAMP.pack_into(self.memory, page * PAGE, self.number + 1, self.turn, page)
        self.filled = pages

    def map_anew(self, pages: int) -> None:
        self.memory.close()  # munmap
        self.memory = memory(AREA_PAGES)
        self.turn += 1
        self.fill(pages)

    def empty(self, pages: int) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.turn += 1
        self.fill(pages)

    def wrong(self) -> int:
        wrong = 0
        for page in range(AREA_PAGES):
            found = self.memory[page * PAGE : page * PAGE + STAMP.size]
            expected = STAMP.pack(self.number + 1, self.turn, page) if page < self.filled else EMPTY
            wrong += found != expected
        return wrong


class Churn(threading.Thread):
    def __init__(self, pages: int) -> None:
        super().__init__(daemon=True)
        self.areas = [Area(number) for number in range(max(pages // AREA_PAGES, 1))]
        self.dice = random.Random(20)
        self.count = 0
        self.lock = threading.Lock()

    def run(self) -> None:
        while True:
            with self.lock:
                area = self.dice.choice(self.areas)
                change = area.map_anew if self.dice.random() < 0.5 else area.empty
                change(self.dice.randrange(AREA_PAGES + 1))
                self.count += 1
            time.sleep(PAUSE_S)

    def state(self) -> dict[str, Any]:
        with self.lock:
            wrong = sum(area.wrong() for area in self.areas)
            return {"pages": len(self.areas) * AREA_PAGES, "counts": [self.count], "wrong": wrong}


def main() -> None:
    churn = Churn(pages_asked())
    serve(churn.state, churn.start)


if __name__ == "__main__":
    main()
