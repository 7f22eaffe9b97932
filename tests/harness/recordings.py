"""Recordings made of events, for tests that need no privilege: a clone of a process with two regions."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from tuimig.core.model import (
    Decision,
    Detail,
    Event,
    Fault,
    FaultKind,
    Faults,
    FaultTimes,
    Frozen,
    Histogram,
    Kind,
    Note,
    Phase,
    Plan,
    Planned,
    Progress,
    Region,
    Report,
    Treatment,
)
from tuimig.core.record import FileSink, Recorder

HEAP, STACK = 0x5000_0000_0000, 0x7FFF_0000_0000
MS = 1_000_000
SECRET = "hunter2"


class Clock:
    """Monotonic nanoseconds that go where the test says."""

    def __init__(self, now: int = 10**12) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def after(self, milliseconds: float) -> int:
        self.now += int(milliseconds * MS)
        return self.now


def region(start: int, pages: int, kind: Kind, path: str) -> Region:
    return Region(start, start + pages * 4096, "rw-p", 0, "00:1f", 77, path, kind, rss=pages * 4096)


def plan() -> Plan:
    heap = region(HEAP, 1024, Kind.HEAP, "[heap]")
    data = region(HEAP + (1 << 30), 4, Kind.FILE, f"/opt/{SECRET}/app")
    stack = region(STACK, 32, Kind.STACK, "[stack]")
    return Plan(
        (
            Decision(heap, Treatment.PROTECTED, "default", "private memory, captured while the process runs"),
            Decision(data, Treatment.EAGER, f"--eager /opt/{SECRET}/*", f"matches /opt/{SECRET}/*"),
            Decision(stack, Treatment.EAGER, "eager-below (default)", "smaller than 1MiB"),
        )
    )


def fault(time_ns: int, page: int, kind: FaultKind = FaultKind.WP) -> Fault:
    return Fault(time_ns, 4711, HEAP + page * 4096, 0, kind, 19_000 + page, 1)


def report() -> Report:
    return Report(
        verb="clone",
        pid=4711,
        regions=3,
        bytes=1060 * 4096,
        total_us=90_000,
        frozen_us=3100,
        frozen={"stop": 100, "eager": 1000, "arm": 2000},
        wp_faults=30,
        demand_faults=3,
        fault_us=FaultTimes(19.0, 40.5, 51.0),
        swept_pages=994,
        attempts=2,
        guard="guarded",
        guard_stops=7,
        new_pid=4720,
        downtime_us=50_000,
        fill_us=20_000,
        warnings=(f"descriptor 2: /var/log/{SECRET} is written by the copy and by its source alike",),
    )


def events(clock: Clock) -> Iterable[Event]:
    """A clone that needed two attempts. The clock moves as the events come."""
    histogram = Histogram((0,) * 14 + (20, 10) + (0,) * 16, 51_000)
    yield Phase("look", clock.after(1))
    yield Planned("clone", 4711, f"/opt/{SECRET}/app --password {SECRET}", plan())
    for attempt in (1, 2):
        yield Phase("attach", clock.after(5))
        yield Phase("freeze", clock.after(2))
        yield Frozen(3000 + 50 * attempt, {"stop": 100, "eager": 1000, "arm": 2000})
        yield Phase("capture", clock.after(4))
        for tick in range(3):
            start = clock.after(10)
            yield Faults.of(fault(start - n * 1000, tick * 10 + n) for n in range(9, -1, -1))
            yield Progress("capture", 1060, 36 + 340 * (tick + 1), wp_faults=10 * (tick + 1))
            yield Detail("source", histogram, ((10, tick, 0),) * 240, (HEAP,), (1024,), (tick,), (tick,))
        if attempt == 1:
            yield Note(f"a page of /opt/{SECRET}/app was lost; trying again, under system call stops")
    yield Phase("restore", clock.after(3))
    yield Phase("fill", clock.after(8))
    now = clock.after(1)
    yield Faults.of(fault(now, n, FaultKind.MISSING) for n in range(3))
    yield Progress("fill", 1060, 1060, demand_faults=3)
    yield Detail("copy", Histogram((0,) * 15 + (3,), 40_000), ((10, 10, 0),) * 240)


def write(path: Path, *, redact: bool = False, end: bool = True) -> Path:
    clock = Clock()
    with FileSink(path) as sink:
        recorder = Recorder(sink, redact=redact, clock=clock)
        for event in events(clock):
            recorder(event)
        clock.after(5)
        if end:
            recorder.report(report())
    return path


def text_of(path: Path) -> bytes:
    """Everything in the file, inflated."""
    import zlib

    from tuimig.core.record import CHUNK

    data = io.BytesIO(path.read_bytes())
    out = data.readline()
    while head := data.read(CHUNK.size):
        out += zlib.decompress(data.read(CHUNK.unpack(head)[0]))
    return out
