"""Plays a recording to the screens that draw live sessions: it is a Feed, with a clock that can be stopped, stepped,
sped up and set.

`poll` hands over what came between the last position and this one. After a jump backwards `restart` is set in the
update: the screen forgets what it has drawn, and the update holds all that was told up to the new position.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tuimig.core.board import RECORDS, Batch
from tuimig.core.client import Update
from tuimig.core.jobs import State, error_of
from tuimig.core.model import RECORD, Detail, Faults, Phase, Progress, Report
from tuimig.core.record import Header, LeftOut, Outcome
from tuimig.core.recording import Recording, Timed

SPEEDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # times real time; a clone takes a fraction of a second
MOST_FAULTS: Final = RECORDS  # as many as a live board holds
Clock = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Mark:
    """A phase begins here."""

    name: str
    time_us: int


class Player:
    """One recording and a position in it, microseconds from its start. It begins at the start, paused."""

    def __init__(self, recording: Recording, clock: Clock = time.monotonic_ns) -> None:
        self.recording = recording
        self.paused = True
        self._clock = clock
        self._records = recording.records
        self._times = [timed.time_us for timed in self._records]
        self._speed = SPEEDS.index(1.0)
        self._since_ns = clock()
        self._position = 0.0
        self._told = 0  # records that have been handed over
        self._restart = True
        self._state = State(Progress("look"), {})
        self.marks = tuple(Mark(t.record.name, t.time_us) for t in self._records if isinstance(t.record, Phase))

    # ------------------------------------------------------------ where it is

    @property
    def duration_us(self) -> int:
        return self.recording.duration_us

    @property
    def position_us(self) -> int:
        self._advance()
        return int(self._position)

    @property
    def at_end(self) -> bool:
        return self.position_us >= self.duration_us

    @property
    def goes_back(self) -> bool:
        """Whether the next update begins anew: at the start, and after a jump backwards."""
        return self._restart

    @property
    def speed(self) -> float:
        return SPEEDS[self._speed]

    @property
    def phase(self) -> str:
        """The phase at the position; nothing before the first."""
        passed = [mark.name for mark in self.marks if mark.time_us <= self.position_us]
        return passed[-1] if passed else ""

    # ------------------------------------------------------------ what a person does

    def play(self) -> None:
        """Go on; from the start where it had come to the end."""
        if self.at_end:
            self.jump(0)
        self._advance()
        self.paused = False

    def pause(self) -> None:
        self._advance()
        self.paused = True

    def faster(self, steps: int = 1) -> None:
        """Slower with a negative number."""
        self._advance()
        self._speed = min(max(self._speed + steps, 0), len(SPEEDS) - 1)

    def jump(self, position_us: int) -> None:
        """To any position; what lies outside is the nearest end."""
        self._advance()
        wanted = min(max(position_us, 0), self.duration_us)
        if wanted < self._position:
            self._restart, self._told = True, 0
            self._state = State(Progress("look"), {})
        self._position = float(wanted)

    def step(self, count: int = 1) -> None:
        """Stop, and go on by so many records; back with a negative number."""
        self.pause()
        here = bisect.bisect_right(self._times, self.position_us)
        target = min(max(here + count, 0), len(self._times))
        self.jump(self._times[target - 1] if target else 0)

    def step_phase(self, count: int = 1) -> None:
        """Stop, and go to where the next phase (or the one before) begins; the end counts as one."""
        self.pause()
        places = sorted({0, *(mark.time_us for mark in self.marks), self.duration_us})
        if count > 0:
            index = bisect.bisect_right(places, self.position_us) + count - 1
        else:
            index = bisect.bisect_left(places, self.position_us) + count
        self.jump(places[min(max(index, 0), len(places) - 1)])

    # ------------------------------------------------------------ the feed

    def poll(self) -> Update:
        end = bisect.bisect_right(self._times, self.position_us)
        fresh = self._records[self._told : end]
        self._told = max(self._told, end)
        update = replace(self._update(fresh), restart=self._restart)
        self._restart = False
        return update

    def cancel(self) -> None:
        """There is nothing to cancel: it is stopped."""
        self.pause()

    def go(self) -> None:
        self.play()

    def reconnect(self) -> None:
        """A recording has no connection to lose."""

    def to_background(self, report: Path) -> bool:
        self.pause()
        return False

    def close(self) -> None:
        self.pause()

    # ------------------------------------------------------------ within

    def _advance(self) -> None:
        now = self._clock()
        if not self.paused:
            moved = (now - self._since_ns) / 1000 * self.speed
            self._position = min(self._position + moved, float(self.duration_us))
        self._since_ns = now

    def _update(self, fresh: tuple[Timed, ...]) -> Update:
        events: list[Any] = []  # what a live session sends as it comes
        faults, missed, changed = bytearray(), 0, False
        update = Update()
        for timed in fresh:
            match timed.record:
                case Progress() as progress:
                    self._state, changed = replace(self._state, progress=progress), True
                case Detail() as detail:
                    details = {**self._state.details, detail.side: detail}
                    self._state, changed = replace(self._state, details=details), True
                case Faults(records=records):
                    faults += records
                case LeftOut(faults=count):
                    missed += count
                case Outcome() as outcome:
                    update = _outcome(outcome)
                case Header():
                    pass
                case event:
                    events.append(event)
        over = len(faults) // RECORD.size - MOST_FAULTS
        if over > 0:
            del faults[: over * RECORD.size]
            missed += over
        return replace(
            update,
            events=tuple(events),
            state=self._state if changed or self._restart else None,
            faults=Batch(bytes(faults), missed),
        )


def _outcome(outcome: Outcome) -> Update:
    if outcome.failure is not None:
        return Update(error=error_of(outcome.failure))
    assert isinstance(outcome.report, Report)
    return Update(report=outcome.report)
