"""What a recording comes to: totals, phases, faults over address and time. Pure; for replays and reports."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tuimig.core.model import (
    PAGE,
    RECORD,
    Decision,
    Detail,
    FaultKind,
    Faults,
    Frozen,
    Histogram,
    Note,
    Phase,
    Planned,
    Progress,
    Report,
)
from tuimig.core.record import LeftOut, Outcome
from tuimig.core.recording import Recording
from tuimig.core.strip import layout

COLUMNS: Final = 120  # of the heat: steps of time
SIDES: Final = {FaultKind.WP: "source", FaultKind.MISSING: "copy"}


@dataclass(frozen=True, slots=True)
class Span:
    """A phase, microseconds from the start of the first one."""

    name: str
    begin_us: int
    end_us: int

    @property
    def duration_us(self) -> int:
        return self.end_us - self.begin_us


@dataclass(frozen=True, slots=True)
class Heat:
    """`counts[kind][(column, cell)]`: faults recorded at that time and in that cell of `strip.layout(regions)`.

    Only regions with faults are in it.
    """

    regions: tuple[Decision, ...]
    begin_us: int
    end_us: int
    counts: dict[FaultKind, Counter[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Summary:
    report: Report
    complete: bool
    command: str
    plan: tuple[Decision, ...]
    phases: tuple[Span, ...]
    notes: tuple[str, ...]
    histograms: dict[str, Histogram]  # by side, exact
    heat: Heat
    region_faults: dict[int, int]  # by the region's index in `plan`; of the recorded faults
    recorded_faults: int
    left_out: int
    progress: tuple[tuple[int, Progress], ...] = field(repr=False, default=())  # with their times


def summarize(recording: Recording) -> Summary:
    planned: Planned | None = None
    phases: list[tuple[str, int]] = []
    notes: list[str] = []
    histograms: dict[str, Histogram] = {}
    progress: list[tuple[int, Progress]] = []
    frozen: Frozen | None = None
    left_out = 0
    batches: list[bytes] = []
    zero = next((timed.time_us for timed in recording.records if isinstance(timed.record, Phase)), 0)
    end = 0
    for timed in recording.records:
        if not isinstance(timed.record, Outcome):
            end = timed.time_us - zero
        match timed.record:
            case Planned() as event:
                planned = event
            case Phase() as phase:
                phases.append((phase.name, timed.time_us - zero))
            case Note() as note:
                notes.append(note.text)
            case Detail() as detail:
                histograms[detail.side] = detail.histogram
            case Progress() as counters:
                progress.append((timed.time_us - zero, counters))
            case Frozen() as event:
                frozen = event
            case Faults(records=records):
                batches.append(records)
            case LeftOut(faults=count):
                left_out += count
    ends = [*(begin for _, begin in phases[1:]), end][: len(phases)]
    spans = tuple(Span(name, begin, end) for (name, begin), end in zip(phases, ends, strict=True))
    decisions = planned.plan.decisions if planned else ()
    records = b"".join(batches)
    by_region = _by_region(records, decisions)
    with_faults = [decisions[index] for index in sorted(by_region)]
    report = recording.report or _partial(planned, spans, frozen, [counters for _, counters in progress])
    return Summary(
        report=report,
        complete=recording.complete,
        command=planned.command if planned else "",
        plan=decisions,
        phases=spans,
        notes=tuple(notes),
        histograms=histograms,
        heat=_heat(records, with_faults, recording.header.started_ns + zero * 1000),
        region_faults=by_region,
        recorded_faults=len(records) // RECORD.size,
        left_out=left_out,
        progress=tuple(progress),
    )


def _partial(
    planned: Planned | None, phases: Sequence[Span], frozen: Frozen | None, progress: Sequence[Progress]
) -> Report:
    """What is known where the recording ends before the migration did."""
    last = {counters.phase: counters for counters in progress}
    source, copy = last.get("capture", Progress("")), last.get("fill", Progress(""))
    reached = phases[-1].name if phases else "look"
    empty = Report(
        verb=planned.verb if planned else "",
        pid=planned.pid if planned else 0,
        regions=len(planned.plan.decisions) if planned else 0,
        bytes=source.pages_total * PAGE,
        total_us=phases[-1].end_us - phases[0].begin_us if phases else 0,
        wp_faults=source.wp_faults,
        demand_faults=copy.demand_faults,
        swept_pages=source.swept_pages,
        zero_pages=source.zero_pages,
        guard_stops=source.guard_stops,
        warnings=(f"it has no end: what is here stops in the phase {reached}",),
    )
    return replace(empty, frozen_us=frozen.frozen_us, frozen=frozen.parts) if frozen else empty


def _heat(records: bytes, decisions: Sequence[Decision], zero_ns: int) -> Heat:
    counts: dict[FaultKind, Counter[tuple[int, int]]] = {kind: Counter() for kind in FaultKind}
    spans = layout(decisions)
    starts = [span.start for span in spans]
    faults = list(RECORD.iter_unpack(records))
    times = [max(0, time_ns - zero_ns) // 1000 for time_ns, *_ in faults]
    begin, end = (min(times), max(times) + 1) if times else (0, 1)
    for fault, time_us in zip(faults, times, strict=True):
        index = bisect.bisect_right(starts, fault[1]) - 1
        if index >= 0 and fault[1] < spans[index].end:
            column = (time_us - begin) * COLUMNS // (end - begin)
            counts[FaultKind(fault[6])][column, spans[index].cell] += 1
    return Heat(tuple(decisions), begin, end, counts)


def _by_region(records: bytes, decisions: Sequence[Decision]) -> dict[int, int]:
    starts = [decision.region.start for decision in decisions]
    found: Counter[int] = Counter()
    for _, address, *_ in RECORD.iter_unpack(records):
        index = bisect.bisect_right(starts, address) - 1
        if index >= 0 and address < decisions[index].region.end:
            found[index] += 1
    return dict(found)
