"""A canvas seen from outside, without touching what is not there: so its copy can be watched while it is filled.

Reading a page that a copy does not have yet would fetch it. `/proc/PID/pagemap` says which pages are there, and only
those are read.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from typing import Final

from tuimig.core.model import Report
from tuimig.demos.driving import Stepping, ask
from tuimig.demos.serving import PAGE, STAMP

THERE: Final = 3 << 62  # pagemap: present or swapped
SHADES: Final = " .:-=+*#%@"
HOLE: Final = "?"
WIDTH: Final = 48  # characters; half as many lines, since a character is twice as high as wide

Picture = list[list[int | None]]  # rows of shades, 0 to 255; None: the page is not there


def seen(pid: int, address: int, side: int, columns: int, rows: int) -> Picture:
    """The canvas of `side` x `side` tiles at `address` in process `pid`, thinned out to `columns` x `rows`."""
    with contextlib.ExitStack() as stack:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, pagemap)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, memory)
        entries = os.pread(pagemap, side * side * 8, address // PAGE * 8)
        there = [entry & THERE for (entry,) in struct.iter_unpack("=Q", entries)]
        picture: Picture = []
        for row in range(rows):
            tiles = [row * side // rows * side + column * side // columns for column in range(columns)]
            picture.append(
                [os.pread(memory, 1, address + tile * PAGE + STAMP.size)[0] if there[tile] else None for tile in tiles]
            )
        return picture


def text(picture: Picture) -> list[str]:
    """The same in characters, one line a row."""
    return ["".join(HOLE if s is None else SHADES[s * len(SHADES) // 256] for s in row) for row in picture]


def beside(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [f"{one:<{WIDTH}}   {other}".rstrip() for one, other in zip(left, right, strict=True)]


class Canvas(Stepping):
    """The canvas as the demo runs it."""

    def __init__(self, memory: int) -> None:
        super().__init__("canvas", memory)
        self._place = ask(self.port)

    def picture(self, pid: int, columns: int = WIDTH, rows: int = WIDTH // 2) -> Picture:
        """The picture in the source or in its copy, as far as it is there."""
        return seen(pid, self._place.address, self._place.side, columns, rows)

    def check(self, report: Report) -> list[str]:
        assert report.new_pid is not None
        pictures = [text(self.picture(pid)) for pid in (self.pid, report.new_pid)]
        return [*super().check(report), "", *beside(["source", *pictures[0]], ["copy", *pictures[1]])]
