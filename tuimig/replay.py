"""Two recordings side by side: `tuimig replay A B`. Pure: rows of a name, the figure of each, and their ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tuimig.core.model import Histogram
from tuimig.core.summary import Summary
from tuimig.words import duration


@dataclass(frozen=True, slots=True)
class Row:
    """`unit`: us, bytes, pages or nothing (a count). None: not part of that recording."""

    group: str
    name: str
    unit: str
    first: float | None
    second: float | None

    @property
    def ratio(self) -> float | None:
        """The second by the first."""
        return self.second / self.first if self.first and self.second is not None else None


def compared(first: Summary, second: Summary) -> tuple[Row, ...]:
    parts = (_totals, _phases, _frozen, _histograms)
    return tuple(row for part in parts for row in part(first, second))


def _totals(first: Summary, second: Summary) -> Iterator[Row]:
    a, b = first.report, second.report
    for name, unit in (
        ("total_us", "us"),
        ("downtime_us", "us"),
        ("fill_us", "us"),
        ("bytes", "bytes"),
        ("eager_bytes", "bytes"),
        ("regions", ""),
        ("swept_pages", "pages"),
        ("zero_pages", "pages"),
        ("wp_faults", ""),
        ("demand_faults", ""),
        ("guard_stops", ""),
        ("attempts", ""),
    ):
        yield Row("totals", name, unit, getattr(a, name), getattr(b, name))
    for name in ("p50", "p99", "max"):
        yield Row("fault service", name, "us", getattr(a.fault_us, name), getattr(b.fault_us, name))


def _phases(first: Summary, second: Summary) -> Iterator[Row]:
    """A phase that came more than once counts with the sum."""
    times: list[dict[str, float]] = [{}, {}]
    for found, summary in zip(times, (first, second), strict=True):
        for span in summary.phases:
            found[span.name] = found.get(span.name, 0.0) + span.duration_us
    for name in dict.fromkeys([*times[0], *times[1]]):
        yield Row("phase", name, "us", times[0].get(name), times[1].get(name))


def _frozen(first: Summary, second: Summary) -> Iterator[Row]:
    a, b = first.report, second.report
    yield Row("frozen", "in all", "us", a.frozen_us, b.frozen_us)
    for name in dict.fromkeys([*a.frozen, *b.frozen]):
        yield Row("frozen", name, "us", a.frozen.get(name), b.frozen.get(name))


def _histograms(first: Summary, second: Summary) -> Iterator[Row]:
    for side in ("source", "copy"):
        a, b = (summary.histograms.get(side, Histogram()).buckets for summary in (first, second))
        for power in range(max(len(a), len(b))):
            counts = [buckets[power] if power < len(buckets) else 0 for buckets in (a, b)]
            if any(counts):
                yield Row(f"faults of the {side}", f"below {bucket(power)}", "", counts[0], counts[1])


def bucket(power: int) -> str:
    """The upper end of a histogram's bucket."""
    nanoseconds = 1 << (power + 1)
    return f"{nanoseconds} ns" if nanoseconds < 1000 else duration(nanoseconds / 1000)
