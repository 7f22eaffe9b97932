"""Small pictures of a running migration: phases, a bar, sparklines, a histogram. Each repaints what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import RenderResult
from textual.geometry import Region
from textual.widget import Widget

from tuimig.core.model import Histogram
from tuimig.widgets.region_map import BARS, runs


class LineWidget(Widget):
    """Lines of text, drawn again only where they differ from what stands there."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: list[Text] = []

    def show(self, lines: Sequence[Text]) -> None:
        before, self._lines = self._lines, list(lines)
        if len(before) != len(lines):
            self.refresh()
            return
        width = self.size.width
        for y, (old, new) in enumerate(zip(before, lines, strict=True)):
            if old.plain == new.plain and old.spans == new.spans:
                continue
            a, b = old.plain.ljust(width), new.plain.ljust(width)
            if old.spans != new.spans or len(a) != len(b):
                self.refresh(Region(0, y, width, 1))
                continue
            for start, end in runs([x != z for x, z in zip(a, b, strict=True)]):
                self.refresh(Region(start, y, end - start, 1))

    def render(self) -> RenderResult:
        """A line that is too long ends at the edge: what would go on below it would push the others down."""
        shown = [line.copy() for line in self._lines]
        for line in shown:
            line.truncate(self.size.width)
        return Text("\n", no_wrap=True, end="").join(shown)


MARKS = {"done": "✓", "now": "▶", "next": " "}


class PhaseBar(LineWidget):
    """The phases in a row: done ones with their times, the present one marked by an arrow."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"phasebar--done", "phasebar--now", "phasebar--next"}
    DEFAULT_CSS = """
    PhaseBar {
        height: 1; padding: 0 1; background: $surface;
        & > .phasebar--done { color: $text-success; }
        & > .phasebar--now { color: $text-warning; text-style: bold; }
        & > .phasebar--next { color: $text-muted; }
    }
    """

    def show_phases(self, phases: Sequence[tuple[str, str, str]]) -> None:
        """(name, done | now | next, time taken)."""
        line = Text(no_wrap=True, end="")
        for name, state, took in fitting(phases, self.size.width):
            style = self.get_component_rich_style(f"phasebar--{state}", partial=True)
            line.append(f"{MARKS[state]}{name}", style)
            line.append(f" {took} " if took else " ", style if state == "now" else "")
        self.show([line])


def fitting(phases: Sequence[tuple[str, str, str]], width: int) -> list[tuple[str, str, str]]:
    """The phases with as many of their times as there is room for, the oldest left out first."""
    shown = [(name, state, took.replace(" ", "")) for name, state, took in phases]
    while sum(len(name) + len(took) + 2 + bool(took) for name, _, took in shown) > width:
        known = [index for index, (_, state, took) in enumerate(shown) if took and state == "done"]
        if not known:
            break
        shown[known[0]] = (*shown[known[0]][:2], "")
    return shown


class Bar(LineWidget):
    """How far it is: a bar that is determinate only, with words after it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"bar--done", "bar--left"}
    DEFAULT_CSS = """
    Bar {
        height: 1; padding: 0 1;
        & > .bar--done { color: $text-success; }
        & > .bar--left { color: $text-muted; }
    }
    """

    def show_bar(self, part: float, words: str) -> None:
        width = max(4, self.size.width - len(words) - 1)
        full = min(width, int(part * width))
        line = Text(no_wrap=True, end="")
        line.append("█" * full, self.get_component_rich_style("bar--done", partial=True))
        line.append("░" * (width - full), self.get_component_rich_style("bar--left", partial=True))
        line.append(f" {words}")
        self.show([line])


def spark(samples: Sequence[float], width: int) -> str:
    """The last samples as bars, the highest one full."""
    shown = list(samples)[-width:]
    most = max(shown, default=0.0)
    if most <= 0:
        return " " * width
    return "".join(BARS[max(1, round(v / most * 8)) if v > 0 else 0] for v in shown).rjust(width)


def histogram_line(histogram: Histogram, width: int) -> tuple[str, str]:
    """Bars by power of two and the axis below, from the first bucket with something in it to the last."""
    held = [i for i, n in enumerate(histogram.buckets) if n]
    if not held:
        return "", ""
    first, last = max(0, min(held) - 1), max(held) + 1
    most = max(histogram.buckets)
    wide = max(1, min(4, width // (last - first + 1)))
    bars, axis = "", ""
    for i in range(first, last + 1):
        inside = histogram.buckets[i] if i < len(histogram.buckets) else 0
        level = max(1, round(inside / most * 8)) if inside else 0
        bars += BARS[level] * wide
        if wide > 3 or (wide > 1 and (i - first) % 2 == 0):
            axis += tick(1 << i).ljust(wide if wide > 3 else 2 * wide)
    return bars[:width], axis[:width]


def tick(nanoseconds: int) -> str:
    """A bucket's lower edge in microseconds, three characters: `131`, `1k`."""
    us = nanoseconds // 1000
    return "<1" if us < 1 else str(us) if us < 1000 else f"{us // 1000}k"
