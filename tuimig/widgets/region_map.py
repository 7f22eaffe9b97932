"""The address space as a strip: one line of letters, one of bars. Each column stands for a span of addresses.

Letters say what they say without colour: E eager, W protected, . nothing there; while a migration runs how far the span
is, and f where a fault was served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class MapCell:
    """One cell. `letter` and `level` (0 to 8, the bar under it) are shown; `kind` is a component class of the map."""

    letter: str = "."
    level: int = 0
    kind: str = "none"
    marked: bool = False  # belongs to the region under the cursor


KINDS = ("none", "eager", "protected", "done", "zero", "fault", "part", "hot")
BLANK = MapCell()


class RegionMap(Widget):
    """`show` takes cells; they are spread over the width, several to a column where there are more."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {*(f"regionmap--{kind}" for kind in KINDS), "regionmap--marked"}
    DEFAULT_CSS = """
    RegionMap {
        height: 2;
        & > .regionmap--none { color: $text-muted; }
        & > .regionmap--eager { color: $text-warning; }
        & > .regionmap--protected { color: $text-primary; }
        & > .regionmap--part { color: $text-secondary; }
        & > .regionmap--done { color: $text-success; }
        & > .regionmap--zero { color: $text-muted; }
        & > .regionmap--fault { color: $text-error; text-style: bold; }
        & > .regionmap--hot { color: $text-error; }
        & > .regionmap--marked { text-style: bold reverse; }
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._cells: Sequence[MapCell] = ()
        self._drawn: list[MapCell] = []

    def show(self, cells: Sequence[MapCell]) -> None:
        """Only columns that look different are drawn again."""
        self._cells = cells
        now = self._columns()
        if len(now) != len(self._drawn):
            self.refresh()
            return
        for start, end in runs([old != new for old, new in zip(self._drawn, now, strict=True)]):
            self.refresh(Region(start, 0, end - start, 2))

    def _columns(self) -> list[MapCell]:
        width, count = self.size.width, len(self._cells)
        if not count or not width:
            return [BLANK] * width
        return [
            merged(
                self._cells[column * count // width : max((column + 1) * count // width, column * count // width + 1)]
            )
            for column in range(width)
        ]

    def render_line(self, y: int) -> Strip:
        self._drawn = self._columns() if y == 0 or len(self._drawn) != self.size.width else self._drawn
        segments = []
        for cell in self._drawn:
            style = self.get_component_rich_style(f"regionmap--{cell.kind if y == 0 else bar_kind(cell)}")
            if cell.marked and y == 0:
                style += self.get_component_rich_style("regionmap--marked", partial=True)
            segments.append(Segment(cell.letter if y == 0 else BARS[cell.level], style))
        return Strip(segments, self.size.width).simplify()


def bar_kind(cell: MapCell) -> str:
    return "hot" if cell.kind in ("eager", "protected") else cell.kind


def merged(cells: Sequence[MapCell]) -> MapCell:
    """Several cells in one column: the one that says most, as high as the highest."""
    if len(cells) == 1:
        return cells[0]
    first = max(cells, key=lambda cell: (cell.letter == "f", cell.letter != ".", cell.level))
    level = max(cell.level for cell in cells)
    return MapCell(first.letter, level, first.kind, any(cell.marked for cell in cells))


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of each stretch that is true; stretches two apart are joined, a jump costs more than they do."""
    found: list[tuple[int, int]] = []
    for at, flag in enumerate(flags):
        if not flag:
            continue
        if found and at - found[-1][1] <= 2:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found
