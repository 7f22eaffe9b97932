"""Replay: a recorded migration on the screen of a live one, with a clock that stops, steps, jumps and runs slower."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar, Final

from textual.binding import Binding, BindingType

from tuimig.core.jobs import Job
from tuimig.core.model import Planned
from tuimig.core.player import Player
from tuimig.core.recording import Recording
from tuimig.run import Run
from tuimig.screens.migration import Migration
from tuimig.widgets.fault_log import FaultTable
from tuimig.words import duration, safe

FRAME_S: Final = 0.1
SCRUBS: Final = 50  # steps of the arrow keys from one end to the other


class Replay(Migration):
    """Owns the player. A jump backwards begins a new Run, which then has all up to there."""

    heading = "replay"
    about = """
A recorded migration. It is drawn as a live one is, and touches no process. Space plays and pauses; . and , go on and
back by one event, ] and [ by a phase; + and - change the speed; left and right move by a fiftieth, home and end to the
ends. E explains the moment at which it stands, s shows the summary."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "play", "Play", id="replay.play"),
        Binding("full_stop", "step(1)", "Event", key_display=".", id="replay.step"),
        Binding("comma", "step(-1)", "Event back", show=False, id="replay.step-back"),
        Binding("right_square_bracket", "phase(1)", "Phase", key_display="]", id="replay.phase"),
        Binding("left_square_bracket", "phase(-1)", "Phase back", show=False, key_display="[", id="replay.phase-back"),
        Binding("plus,equals_sign", "speed(1)", "Faster", key_display="+", id="replay.faster"),
        Binding("minus", "speed(-1)", "Slower", key_display="-", id="replay.slower"),
        Binding("right", "scrub(1)", "On", show=False, priority=True, id="replay.on"),
        Binding("left", "scrub(-1)", "Back", show=False, priority=True, id="replay.back"),
        Binding("home", "jump(0)", "Start", show=False, priority=True, id="replay.start"),
        Binding("end", "jump(1)", "End", show=False, priority=True, id="replay.end"),
    ]

    def __init__(self, recording: Recording, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.player = Player(recording, clock)
        planned = next((t.record for t in recording.records if isinstance(t.record, Planned)), None)
        self._job = Job(planned.verb, planned.pid) if planned else Job("clone")
        self._partial = "" if recording.complete else "; the recording has no end"
        self._where_said = ""
        super().__init__(self._fresh())

    def _fresh(self) -> Run:
        return Run(self._job, self.player, self._now)

    def _now(self) -> float:
        """Seconds on the clock of the recorded process, where the replay stands."""
        return (self.player.recording.header.started_ns + self.player.position_us * 1000) / 1e9

    def on_mount(self) -> None:
        self.set_interval(FRAME_S, self.frame)
        self.frame()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action not in ("cancel", "pause", "go", "record", "reconnect")  # of a live one

    def title_text(self) -> str:
        name = safe(self.run_shown.command).split(" ", 1)[0].rsplit("/", 1)[-1]
        return f"replay  {self._job.verb} of {self._job.pid} {name}{self.attempt_words()}"

    def _read_names(self) -> None:
        """The threads of a recording are not those that have the same ids today."""

    def frame(self) -> None:
        """What came since the last one."""
        if self.player.goes_back:
            self.run_shown = self._fresh()
            table = self.query_one(FaultTable)
            table.region_name = self.run_shown.region_name
            table.again(self.run_shown.faults)
            self._version = -1
        self.run_shown.poll()
        if (where := self._where()) != self._where_said:
            self._where_said = where
            self.say(where)

    def _tick(self) -> None:
        if self.is_active and self.run_shown.version != self._version:
            self._draw()

    def _draw(self) -> None:
        self._told = True  # the end opens no summary by itself
        super()._draw()
        self.say(self._where())

    def _where(self) -> str:
        player = self.player
        state = "at the end" if player.at_end else "paused" if player.paused else "plays"
        speed = f"{player.speed:g} x"
        place = f"{duration(player.position_us)} of {duration(player.duration_us)}"
        failed = f"; it failed: {safe(self.run_shown.error)}" if self.run_shown.error else ""
        return f"{state} at {place}, {speed}{failed}{self._partial if player.at_end else ''}"

    # ------------------------------------------------------------ keys

    def _moved(self) -> None:
        self.frame()
        self._draw()

    def action_play(self) -> None:
        if self.player.paused or self.player.at_end:
            self.player.play()
        else:
            self.player.pause()
        self._moved()

    def action_step(self, count: int) -> None:
        self.player.step(count)
        self._moved()

    def action_phase(self, count: int) -> None:
        self.player.step_phase(count)
        self._moved()

    def action_speed(self, steps: int) -> None:
        self.player.faster(steps)
        self._moved()

    def action_scrub(self, count: int) -> None:
        self.player.jump(self.player.position_us + count * max(self.player.duration_us // SCRUBS, 1))
        self._moved()

    def action_jump(self, end: int) -> None:
        self.player.jump(self.player.duration_us * end)
        self._moved()
