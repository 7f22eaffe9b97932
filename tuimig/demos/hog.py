"""hog: one thread that writes all of its memory, over and over. `python -m tuimig.demos.hog MEGABYTES`.

Every page is dirty again before a copy of all of them could be finished. Copying in rounds before the freeze never
catches up with it; capture on the first write after T0 does not have to.
"""

from __future__ import annotations

import threading
from typing import Any

from tuimig.demos.serving import PAGE, STAMP, memory, pages_asked, serve

BURST = 64  # pages between two moments at which it can be checked
BODY = PAGE - STAMP.size


class Hog(threading.Thread):
    """Writes whole pages: stamp, then one byte value a round. `count` is pages written so far."""

    def __init__(self, pages: int) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.memory = memory(pages)
        self.count = 0
        self.lock = threading.Lock()
        self.bodies = [bytes([value]) * BODY for value in range(256)]
        for page in range(pages):
            self._write(page, 0)

    def _write(self, page: int, turn: int) -> None:
        at = page * PAGE
        STAMP.pack_into(self.memory, at, turn, page)
        self.memory[at + STAMP.size : at + PAGE] = self.bodies[turn % 256]

    def run(self) -> None:
        while True:
            with self.lock:
                for _ in range(BURST):
                    turn, page = divmod(self.count, self.pages)
                    self._write(page, turn + 1)
                    self.count += 1

    def state(self) -> dict[str, Any]:
        with self.lock:
            turn, reached = divmod(self.count, self.pages)
            wrong = 0
            for page in range(self.pages):
                expected = turn + 1 if page < reached else turn
                at = page * PAGE
                body = self.memory[at + STAMP.size : at + PAGE]
                if STAMP.unpack_from(self.memory, at) != (expected, page) or body != self.bodies[expected % 256]:
                    wrong += 1
            return {"pages": self.pages, "counts": [self.count], "wrong": wrong}


def main() -> None:
    hog = Hog(pages_asked())
    serve(hog.state, hog.start)


if __name__ == "__main__":
    main()
