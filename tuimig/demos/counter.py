"""counter: threads that count, each into pages of its own. `python -m tuimig.demos.counter MEGABYTES`.

Each worker owns an array of pages and a counter; a step writes the counter into the next page. So the array is whole
exactly if every page holds the count of the last time it was visited.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from tuimig.demos.serving import memory, pages_asked, serve, stamp, wrong_pages

WORKERS = 3
PAUSE_S = 0.002
STEPS = 20  # a burst, then a pause: an honest load that leaves the machine usable


class Worker(threading.Thread):
    """Owns `memory` (pages) and `count` (steps so far); the lock makes a step and a check exclude each other."""

    def __init__(self, pages: int) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.memory = memory(pages)
        self.count = 0
        self.lock = threading.Lock()
        for page in range(pages):
            stamp(self.memory, page, 0)

    def run(self) -> None:
        while True:
            with self.lock:
                for _ in range(STEPS):
                    self.count += 1
                    stamp(self.memory, self.count % self.pages, self.count)
            time.sleep(PAUSE_S)

    def state(self) -> tuple[int, int]:
        """The count, and how many pages do not hold what that count says they hold."""
        with self.lock:
            return self.count, wrong_pages(self.memory, self.pages, self.count)


def main() -> None:
    pages = max(pages_asked() // WORKERS, 1)
    workers = [Worker(pages) for _ in range(WORKERS)]

    def begin() -> None:
        for worker in workers:
            worker.start()

    def state() -> dict[str, Any]:
        states = [worker.state() for worker in workers]
        counts = [count for count, _ in states]
        return {"pages": pages * WORKERS, "counts": counts, "wrong": sum(wrong for _, wrong in states)}

    serve(state, begin)


if __name__ == "__main__":
    main()
