"""The address space as a strip of cells: which addresses each cell stands for. Pure.

Regions with content follow one another in address order, the gaps between them left out. A region's share grows with
the logarithm of its content: a heap of gigabytes does not hide the libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tuimig.core.model import PAGE, Decision, Treatment

CELLS: Final = 240  # divides well by the usual widths of a terminal


@dataclass(frozen=True, slots=True)
class Span:
    """Addresses `start` to `end` belong to cell number `cell`; `region` is the index of their decision."""

    start: int
    end: int
    cell: int
    region: int


def layout(decisions: Sequence[Decision], cells: int = CELLS) -> tuple[Span, ...]:
    """The spans of all regions that have a treatment, in address order."""
    shown = [(index, d.region) for index, d in enumerate(decisions) if d.treatment is not Treatment.NONE]
    if not shown:
        return ()
    if len(shown) >= cells:
        return tuple(
            Span(region.start, region.end, place * cells // len(shown), index)
            for place, (index, region) in enumerate(shown)
        )
    weights = [math.log2(1 + (region.rss + region.swap) / PAGE) for _, region in shown]
    spans: list[Span] = []
    cell = 0
    most = [max(1, region.size // PAGE) for _, region in shown]
    for (index, region), width in zip(shown, _widths(weights, most, cells), strict=True):
        pages = region.size // PAGE
        edges = [region.start + pages * part // width * PAGE for part in range(width)] + [region.end]
        spans += [Span(edges[part], edges[part + 1], cell + part, index) for part in range(width)]
        cell += width
    return tuple(spans)


def used(spans: Sequence[Span]) -> int:
    """Cells that the spans fill: all of them but where there is little memory."""
    return max((span.cell for span in spans), default=-1) + 1


def _widths(weights: Sequence[float], most: Sequence[int], cells: int) -> list[int]:
    """Whole numbers from 1 to `most`, in proportion to the weights, `cells` in all where `most` allows."""
    widths = [1] * len(weights)
    while (spare := cells - sum(widths)) > 0:
        open_ones = [i for i, width in enumerate(widths) if width < most[i] and weights[i] > 0]
        if not open_ones:
            break
        total = sum(weights[i] for i in open_ones)
        given = False
        for i in open_ones:
            more = min(most[i] - widths[i], math.floor(spare * weights[i] / total))
            widths[i] += more
            given |= more > 0
        if not given:  # less than one each is left: to the heaviest
            for i in sorted(open_ones, key=lambda i: -weights[i])[:spare]:
                widths[i] += 1
    return widths
