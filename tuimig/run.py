"""One migration as it has come so far: what its feed told, put together for the screens that draw it.

Knows nothing of Textual. A live session and a recording fill it in the same way. Fault records stay as the engine wrote
them until somebody looks at them: at 50,000 a second that is what keeps the console light.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuimig.core.client import Feed, Update
from tuimig.core.errors import TuimigError
from tuimig.core.jobs import Job, Waiting
from tuimig.core.model import (
    PAGE,
    RECORD,
    Connection,
    Detail,
    Fault,
    Frozen,
    Handover,
    Note,
    Phase,
    Plan,
    Planned,
    Progress,
    Report,
    Round,
    Treatment,
    decode_faults,
)
from tuimig.core.player import Player
from tuimig.core.rates import held
from tuimig.core.strip import Span, layout, used
from tuimig.tape import Tape

KEPT: Final = 200_000  # fault records that can be scrolled through
SAMPLES: Final = 240  # of a rate, one a step
STEP_S: Final = 0.25
SOURCE_PHASES: Final = ("look", "attach", "freeze", "capture")
PHASES: Final[dict[str, tuple[str, ...]]] = {
    "snapshot": (*SOURCE_PHASES, "commit"),
    "clone": (*SOURCE_PHASES, "restore", "fill"),
    "remote": ("look", "connect", "attach", "freeze", "capture", "fill"),
    "restore": ("look", "restore", "fill"),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A phase of the run: since when (monotonic ns), and how long it took; None: not yet over."""

    name: str
    since_ns: int
    took_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RegionProgress:
    """Pages of one region that are captured after T0, and its write faults."""

    start: int
    name: str
    pages: int
    done: int
    faults: int


class FaultLog:
    """The last fault records, in order of time, still packed."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self.total = 0  # ever seen
        self.missed = 0  # came, and were overwritten before we looked

    def __len__(self) -> int:
        return self._held

    def add(self, records: bytes, missed: int) -> None:
        self.missed += missed
        if not records:
            return
        self._chunks.append(records)
        self._held += len(records) // RECORD.size
        self.total += len(records) // RECORD.size
        while self._held - len(self._chunks[0]) // RECORD.size >= KEPT:
            self._held -= len(self._chunks.popleft()) // RECORD.size

    def last(
        self, count: int, *, leave: int = 0, wanted: Callable[[Fault], bool] | None = None, most: int = KEPT
    ) -> list[Fault]:
        """The newest `count`, oldest first, without the newest `leave`; with `wanted` only those it takes of the newest
        `most`."""
        found: list[Fault] = []
        for fault in itertools.islice(self._backwards(), leave, leave + most):
            if wanted is not None and not wanted(fault):
                continue
            found.append(fault)
            if len(found) == count:
                break
        return found[::-1]

    def _backwards(self) -> Iterator[Fault]:
        for chunk in reversed(self._chunks):
            view = memoryview(chunk)
            for at in range(len(chunk) - RECORD.size, -1, -RECORD.size):
                yield from decode_faults(view[at : at + RECORD.size])


class Rate:
    """Samples of a growing counter, as growth a second."""

    def __init__(self) -> None:
        self.samples: deque[float] = deque(maxlen=SAMPLES)
        self._value = 0.0
        self._at: float | None = None

    def take(self, value: float, now: float) -> None:
        if self._at is None:
            self._value, self._at = value, now
        elif now - self._at >= STEP_S:
            self.samples.append(max(0.0, value - self._value) / (now - self._at))
            self._value, self._at = value, now

    @property
    def now(self) -> float:
        return self.samples[-1] if self.samples else 0.0


class Run:
    """One migration. `poll` brings it up to date; everything else is there to be read."""

    def __init__(self, job: Job, feed: Feed, clock: Callable[[], float] = time.monotonic) -> None:
        self.job = job
        self.feed = feed
        self._clock = clock
        self.command = ""
        self.plan = Plan(())
        self.spans: tuple[Span, ...] = ()
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self.rounds: list[Round] = []
        self.attempts = 1
        self.frozen: Frozen | None = None
        self.connection: Connection | None = None
        self.handover: Handover | None = None
        self.progress = Progress("look")
        self.remote: Progress | None = None  # the destination's
        self.details: dict[str, Detail] = {}
        self.faults = FaultLog()
        self.fault_cells: set[int] = set()  # cells of the strip in which a fault was served
        self.by_thread: Counter[int] = Counter()
        self.fault_rate = Rate()
        self.byte_rate = Rate()
        self.report: Report | None = None
        self.error: TuimigError | None = None
        self.cancelled = False
        self.copy_ended = False  # by the person
        self.tape = None if isinstance(feed, Player) else Tape()
        self.record_to: Path | None = None  # where the tape goes when it is over
        self.waiting = ""  # step mode: the phase that comes at a key
        self.version = 0  # grows with every change
        self._starts: list[int] = []

    @property
    def recorded(self) -> bool:
        """It is played from a file, and nothing of it need be there any more."""
        return isinstance(self.feed, Player)

    def now_ns(self) -> int:
        """On the clock of the phases."""
        return int(self._clock() * 1e9)

    @property
    def over(self) -> bool:
        return self.report is not None or self.error is not None

    @property
    def phases(self) -> tuple[str, ...]:
        phases = PHASES["remote"] if self.job.remote else PHASES.get(self.job.verb, SOURCE_PHASES)
        if self.job.options.precopy != "off" and "attach" in phases:
            at = phases.index("attach") + 1
            phases = (*phases[:at], "precopy", *phases[at:])
        return tuple(dict.fromkeys((*phases, *(stage.name for stage in self.stages))))

    @property
    def phase(self) -> str:
        return self.stages[-1].name if self.stages else "look"

    @property
    def handed_over(self) -> bool:
        """A move whose source stays stopped, whatever happens: it cannot be cancelled any more."""
        return self.handover is not None and self.handover.source in ("stopped", "ended")

    def cancel(self) -> None:
        self.cancelled = True
        self.feed.cancel()

    def go(self) -> None:
        """Step mode: on to the phase that waits."""
        if self.waiting:
            self.waiting = ""
            self.feed.go()

    @property
    def lost(self) -> Connection | None:
        """The connection to the destination where it is lost, and tried again."""
        line = self.connection
        return line if line is not None and line.state == "lost" and not self.over else None

    def poll(self) -> bool:
        """Whether anything is new."""
        update = self.feed.poll()
        if not (update.events or update.state or update.faults.records or update.over):
            return False
        self._apply(update)
        self.version += 1
        return True

    def regions(self) -> list[RegionProgress]:
        """Those with pages to capture after T0, the largest first."""
        detail = self.details.get("source")
        if detail is None:
            return []
        names = {d.region.start: d.region.name for d in self.plan.decisions}
        found = [
            RegionProgress(start, names.get(start, "anon"), pages, done, faults)
            for start, pages, done, faults in zip(
                detail.starts, detail.region_pages, detail.region_done, detail.region_faults, strict=True
            )
            if pages
        ]
        return sorted(found, key=lambda region: (-region.pages, region.start))

    def region_name(self, fault: Fault) -> str:
        at = bisect_right(self._starts, fault.address) - 1
        if at >= 0 and fault.address < self.spans[at].end:
            return self.plan.decisions[self.spans[at].region].region.name
        return ""

    def totals(self) -> tuple[int, int]:
        """Pages done and in all. Before T0 the whole is what the look found."""
        done, total = self.progress.pages_done, self.progress.pages_total
        if not total and self.phase == "precopy":
            total = max(done, held(self.plan, Treatment.PROTECTED) // PAGE)
        return done, total

    def seconds_left(self) -> float | None:
        """Of the phase that goes on, from the rate so far; None where that says nothing."""
        done, total = self.totals()
        rate, left = self.byte_rate.now, total - done
        return left * PAGE / rate if rate > 0 and left > 0 else None

    # ------------------------------------------------------------ within

    def _apply(self, update: Update) -> None:
        if self.tape is not None:
            self.tape.take(update)
        for event in update.events:
            match event:
                case Phase():
                    self._enter(event)
                case Waiting(phase=phase):
                    self.waiting = phase
                    self._close_stage(self.now_ns())  # the time at a stop is nobody's
                case Note():
                    self.notes.append(event.text)
                case Planned():
                    self.command, self.plan = event.command, event.plan
                    self.spans = layout(event.plan.decisions)
                    self._starts = [span.start for span in self.spans]
                case Round():
                    self.rounds.append(event)
                case Frozen():
                    self.frozen = event
                case Connection():
                    self.connection = event
                case Handover():
                    self.handover = event
        if update.state is not None:
            if update.state.progress.phase != self.progress.phase:
                self.byte_rate = Rate()
                self.fault_rate = Rate()
            self.progress = update.state.progress
            self.remote = update.state.remote
            self.details.update(update.state.details)
            now = self._clock()
            self.fault_rate.take(self.progress.wp_faults + self.progress.demand_faults, now)
            self.byte_rate.take(self.progress.pages_done * PAGE, now)
        self._log(update)
        self.report, self.error = update.report, update.error
        if self.over:
            self._close_stage(self.now_ns())

    def _enter(self, event: Phase) -> None:
        self._close_stage(event.time_ns)
        if event.name == "attach" and any(stage.name == "attach" for stage in self.stages):
            self.attempts += 1
            self.frozen = None
            self.rounds.clear()
            self.fault_cells.clear()
        self.stages.append(Stage(event.name, event.time_ns))

    def _close_stage(self, now_ns: int) -> None:
        last = self.stages[-1] if self.stages else None
        if last is not None and last.took_ns is None:
            self.stages[-1] = Stage(last.name, last.since_ns, max(0, now_ns - last.since_ns))

    def _log(self, update: Update) -> None:
        records = update.faults.records
        self.faults.add(records, update.faults.missed)
        if not records:
            return
        words = memoryview(records).cast("i")
        self.by_thread.update(words[5 :: RECORD.size // 4].tolist())
        if len(self.fault_cells) < used(self.spans):
            # One address a page would do; a sample of a great batch marks the same cells.
            addresses = memoryview(records).cast("Q")[1 :: RECORD.size // 8].tolist()
            for address in addresses[:: max(1, len(addresses) // 2000)]:
                self._mark(address)

    def _mark(self, address: int) -> None:
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self.spans[at].end:
            self.fault_cells.add(self.spans[at].cell)
