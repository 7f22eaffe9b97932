"""The drawings of the HTML page: plain SVG as text. Every name that comes from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from tuimig.core.model import Decision, FaultKind, Histogram, Progress
from tuimig.core.strip import CELLS, layout
from tuimig.core.summary import COLUMNS, SIDES, Heat, Span
from tuimig.replay import bucket
from tuimig.words import duration

WIDTH: Final = 1000
LEFT: Final = 150  # for labels
RIGHT: Final = 60
PLOT: Final = WIDTH - LEFT - RIGHT
ROW: Final = 22
CLASSES: Final = {"source": "wp", "copy": "missing"}
LABEL_CELLS: Final = 8  # a region with fewer cells of the heat has no label


def svg(height: float, parts: Iterable[str], what: str) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(what)}">\n{body}\n</svg>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "", opacity: float = 1) -> str:
    seen = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}"{seen}>'
        f"{inside}</rect>"
    )


def axis(begin_us: float, end_us: float, y: float, height: float) -> list[str]:
    """Ticks at round times, downwards from `y`."""
    parts = []
    step = _round_step((end_us - begin_us) / 6)
    tick = math.ceil(begin_us / step) * step
    while tick <= end_us:
        x = LEFT + PLOT * (tick - begin_us) / max(end_us - begin_us, 1)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + height:.1f}"/>')
        parts.append(text(x, y + height + 14, duration(tick) if tick else "0", "middle"))
        tick += step
    return parts


def _round_step(about: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(max(about, 1)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= about)


def phases(spans: Sequence[Span]) -> str:
    """One row a phase."""
    end = max((span.end_us for span in spans), default=1) or 1
    parts = axis(0, end, 0, ROW * len(spans))
    for row, span in enumerate(spans):
        x, width = LEFT + PLOT * span.begin_us / end, PLOT * span.duration_us / end
        kind = "phase freeze" if span.name == "freeze" else "phase"
        y = row * ROW
        parts.append(text(LEFT - 8, y + 15, span.name, "end", "label"))
        parts.append(rect(x, y + 4, width, ROW - 8, kind, f"{span.name}: {duration(span.duration_us)}"))
        inside = x + width + 60 > WIDTH
        parts.append(text(x - 4 if inside else x + width + 4, y + 15, duration(span.duration_us), _end(inside)))
    return svg(ROW * len(spans) + 20, parts, "phases over time")


def _end(inside: bool) -> str:
    return "end" if inside else "start"


def bars(values: Mapping[str, float], kind: str, unit: str, what: str) -> str:
    """A bar for each value, longest as wide as the plot."""
    most = max(values.values(), default=0) or 1
    parts = []
    for row, (name, value) in enumerate(values.items()):
        y, width = row * ROW, (PLOT - 40) * value / most
        shown = duration(value) if unit == "us" else f"{value:.0f}"
        parts.append(text(LEFT - 8, y + 15, name, "end", "label"))
        parts.append(rect(LEFT, y + 4, width, ROW - 8, kind, f"{name}: {shown}"))
        parts.append(text(LEFT + width + 5, y + 15, shown))
    return svg(max(ROW * len(values), 1), parts, what)


def histogram(shown: Histogram, side: str) -> str:
    """Power-of-two buckets from the first to the last that holds something."""
    held = [power for power, count in enumerate(shown.buckets) if count]
    if not held:
        return '<p class="soft">none</p>'
    values = {f"below {bucket(power)}": float(shown.buckets[power]) for power in range(held[0], held[-1] + 1)}
    return bars(values, CLASSES[side], "", f"service time of faults of the {side}")


def progress(points: Sequence[tuple[int, Progress]], spans: Sequence[Span]) -> str:
    """Per cent of the pages over time: of the source while it is captured, of the copy while it is filled."""
    top, height = 10, 140
    end_us = max((span.end_us for span in spans), default=1) or 1
    begins = {span.name: span.begin_us for span in spans}  # the last attempt's
    parts = axis(0, end_us, top, height)

    def place(time_us: float, part: float) -> str:
        return f"{LEFT + PLOT * time_us / end_us:.1f},{top + height - height * min(1, part):.1f}"

    for percent in (0, 50, 100):
        y = top + height - height * percent / 100
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{percent} %", "end"))
    for phase, kind in (("capture", "wp"), ("fill", "missing")):
        begin = begins.get(phase, end_us)
        line = [
            place(time_us, p.pages_done / p.pages_total)
            for time_us, p in points
            if p.phase == phase and p.pages_total and time_us >= begin
        ]
        if line:
            line.insert(0, place(begin, 0))
            parts.append(f'<polyline class="line {kind}" points="{" ".join(line)}"/>')
            x, _, last = line[-1].partition(",")
            parts.append(f'<circle class="{kind}" cx="{x}" cy="{last}" r="3"/>')
    return svg(top + height + 20, parts, "pages over time")


def heat(shown: Heat, kind: FaultKind) -> str:
    """Time to the right, addresses downwards; the darker, the more faults."""
    counts = shown.counts[kind]
    if not counts:
        return ""
    height, size = 320.0, 320.0 / CELLS
    parts = [rect(LEFT, 0, PLOT, height, "ground")]
    parts += axis(shown.begin_us, shown.end_us, 0, height)
    parts += _region_labels(shown.regions, size)
    most = math.log1p(max(counts.values()))
    for (column, cell), count in sorted(counts.items()):
        x, width = LEFT + PLOT * column / COLUMNS, PLOT / COLUMNS
        dark = 0.35 + 0.65 * math.log1p(count) / most
        parts.append(rect(x, cell * size, width, max(size, 2), CLASSES[SIDES[kind]], f"{count} faults", dark))
    return svg(height + 20, parts, f"faults of the {SIDES[kind]} over address and time")


def _region_labels(decisions: Sequence[Decision], size: float) -> list[str]:
    """Lines between the large regions, and their names."""
    cells: dict[int, list[int]] = {}
    for span in layout(decisions):
        cells.setdefault(span.region, []).append(span.cell)
    parts = []
    for index, inside in cells.items():
        if len(inside) >= LABEL_CELLS:
            y = min(inside) * size
            region = decisions[index].region
            name = region.path.rpartition("/")[2] or f"{region.start:x}"
            parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(LEFT - 8, y + len(inside) * size / 2 + 4, name[-20:], "end"))
    return parts
