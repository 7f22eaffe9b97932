"""canvas: draws a picture into memory, one page after the other. `python -m tuimig.demos.canvas MEGABYTES`.

A page is one tile of one shade; the tiles make a square of rings that move outwards from frame to frame. Seen from
outside (`tuimig/demos/picture.py`), pages that a copy does not have yet are holes in its picture.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from typing import Any

from tuimig.demos.serving import PAGE, STAMP, memory, pages_asked, serve

PAUSE_S = 0.001
TILES = 16  # drawn between two pauses
BODY = PAGE - STAMP.size
WIDTH_OF_RING = 2.2
FASTER = 24  # shades by which a frame is ahead of the one before


class Canvas(threading.Thread):
    """A square of `side` x `side` tiles in row order. `count` is tiles drawn so far."""

    def __init__(self, pages: int) -> None:
        super().__init__(daemon=True)
        self.side = max(math.isqrt(pages), 2)
        self.pages = self.side * self.side
        self.memory = memory(self.pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.count = 0
        self.lock = threading.Lock()
        self.bodies = [bytes([shade]) * BODY for shade in range(256)]
        middle = (self.side - 1) / 2
        scale = WIDTH_OF_RING * 256 * 4 / self.side
        self.rings = [
            int(math.hypot(page % self.side - middle, page // self.side - middle) * scale) for page in range(self.pages)
        ]
        for page in range(self.pages):
            self._draw(page, 0)

    def _shade(self, page: int, frame: int) -> int:
        """Light and dark rings without a jump between them."""
        place = (self.rings[page] - frame * FASTER) % 512
        return place if place < 256 else 511 - place

    def _draw(self, page: int, frame: int) -> None:
        at = page * PAGE
        STAMP.pack_into(self.memory, at, frame, page)
        self.memory[at + STAMP.size : at + PAGE] = self.bodies[self._shade(page, frame)]

    def run(self) -> None:
        while True:
            with self.lock:
                for _ in range(TILES):
                    frame, page = divmod(self.count, self.pages)
                    self._draw(page, frame + 1)
                    self.count += 1
            time.sleep(PAUSE_S)

    def state(self) -> dict[str, Any]:
        with self.lock:
            frame, reached = divmod(self.count, self.pages)
            wrong = 0
            for page in range(self.pages):
                expected = frame + 1 if page < reached else frame
                at = page * PAGE
                body = self.memory[at + STAMP.size : at + PAGE]
                right = self.bodies[self._shade(page, expected)]
                if STAMP.unpack_from(self.memory, at) != (expected, page) or body != right:
                    wrong += 1
            place = {"address": self.address, "side": self.side}
            return {"pages": self.pages, "counts": [self.count], "wrong": wrong, **place}


def main() -> None:
    canvas = Canvas(pages_asked())
    serve(canvas.state, canvas.start)


if __name__ == "__main__":
    main()
