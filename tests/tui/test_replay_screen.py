"""Replay and explain in the console, driven by keys, on the recordings in examples/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import recordings
from stage import Recorded, Stage, console, drive, screen_text, words
from textual.pilot import Pilot
from textual.widgets import Input

from tuimig.app import Console
from tuimig.core.client import Update
from tuimig.core.jobs import Job, Waiting
from tuimig.core.model import Phase
from tuimig.core.recording import Recording, load
from tuimig.screens.explain import Explain
from tuimig.screens.processes import Processes
from tuimig.screens.replay import Replay
from tuimig.screens.summary import Summary
from tuimig.settings import Settings
from tuimig.widgets.choice import Switch
from tuimig.words import count

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Stepped(Recorded):
    """Waits before the freeze for ever."""

    def __init__(self) -> None:
        super().__init__([Update((Phase("look", 1), Phase("attach", 2), Waiting("freeze")))])
        self.gone = 0

    def go(self) -> None:
        self.gone += 1


def replaying(recording: Recording) -> Any:
    return Console(Stage(), Settings(refresh_s=60.0), recording=recording, threads=False)


@pytest.fixture
def churn() -> Recording:
    return load(EXAMPLES / "churn.rec")


def test_it_begins_paused_and_steps(churn: Recording) -> None:
    app = replaying(churn)

    async def act(pilot: Pilot[Any]) -> None:
        replay = app.screen
        assert isinstance(replay, Replay)
        assert "replay clone of" in words(app)
        assert "paused at 0 us of" in words(app)
        await pilot.press("right_square_bracket", "right_square_bracket", "right_square_bracket")
        assert replay.player.phase == "freeze"
        assert "▶freeze" in screen_text(app)
        await pilot.press("left_square_bracket")
        assert replay.player.phase == "attach"
        before = replay.player.position_us
        await pilot.press("full_stop")
        assert replay.player.position_us > before
        await pilot.press("comma", "comma")
        assert replay.player.position_us <= before

    drive(app, act)


def test_the_end_has_the_totals_and_back_forgets_them(churn: Recording) -> None:
    app = replaying(churn)
    report = churn.report
    assert report is not None

    async def act(pilot: Pilot[Any]) -> None:
        replay = app.screen
        await pilot.press("end")
        text = words(app)
        assert "at the end" in text
        assert f"{count(report.demand_faults)} demand faults" in text
        assert "attempt 2" in text
        assert replay.run_shown.report == report
        assert isinstance(app.screen, Replay)  # no summary by itself
        await pilot.press("s")
        assert isinstance(app.screen, Summary)
        assert "guarded" in screen_text(app)
        assert app.screen.check_action("end", ()) is False
        assert app.screen.check_action("again", ()) is False
        await pilot.press("escape", "home")
        assert replay.run_shown.report is None
        assert replay.run_shown.stages == []
        assert replay.run_shown.faults.total == 0
        await pilot.press("end")
        assert replay.run_shown.report == report
        await pilot.press("escape")
        assert isinstance(app.screen, Processes)

    drive(app, act, (120, 40))


def test_it_plays_at_its_speed(tmp_path: Path) -> None:
    clock = recordings.Clock(1)
    recording = load(recordings.write(tmp_path / "a.rec"))
    app = replaying(recording)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("escape")
        app.push_screen(Replay(recording, clock))
        await pilot.pause()
        replay = app.screen
        await pilot.press("minus", "minus", "space")
        assert "plays at 0 us of 100 ms, 0.1 x" in words(app)
        clock.after(90)
        replay.frame()
        assert replay.player.position_us == 9000
        assert replay.player.phase == "freeze"
        await pilot.press("space")
        clock.after(1000)
        assert replay.player.position_us == 9000
        await pilot.press("plus", "right", "left")
        assert replay.player.position_us == 9000
        assert "paused at 9 ms" in words(app)

    drive(app, act)


def test_explain_follows_the_moment(tmp_path: Path) -> None:
    app = replaying(load(recordings.write(tmp_path / "a.rec")))

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("E")
        assert isinstance(app.screen, Explain)
        assert "Looking, while it runs" in words(app)
        await pilot.press("E", "end", "E")
        text = words(app)
        assert "Both run" in text
        assert "stood still for 3.1 ms" in text
        assert "It took 2 attempts" in text
        await pilot.press("escape", "left_square_bracket", "full_stop", "E")
        assert "Pages on demand" in words(app)
        assert "ioctl(UFFDIO_COPY)" in words(app)

    drive(app, act, (120, 40))


def test_explain_on_any_screen() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("E")
        assert "Nothing is stopped yet." in words(app)
        await pilot.press("escape")
        assert isinstance(app.screen, Processes)

    drive(app, act)


def test_a_recording_without_an_end_says_so(tmp_path: Path) -> None:
    app = replaying(load(recordings.write(tmp_path / "a.rec", end=False)))

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("end")
        assert "at the end at" in words(app)
        assert "the recording has no end" in words(app)

    drive(app, act)


def test_launch_can_record_and_step() -> None:
    stage = Stage()
    app = console(stage, pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        app.screen.query_one("#record", Input).value = "/tmp/a.rec"
        app.screen.query_one("#step", Switch).focus()
        await pilot.press("space")
        job = app.screen.job()
        assert (job.record, job.step) == ("/tmp/a.rec", True)

    drive(app, act)


def test_a_stop_is_told_and_left_by_space() -> None:
    stage = Stage()
    feed = Stepped()
    stage.feeds = [feed]
    app = console(stage)

    async def act(pilot: Pilot[Any]) -> None:
        app.launch(Job("clone", 4711, step=True))
        await pilot.pause()
        app._poll()
        app.screen._draw()
        await pilot.pause()
        assert "Stopped before freeze; the source runs" in words(app)
        assert "✓attach" in screen_text(app)  # the time at the stop does not count as its own
        await pilot.press("E")
        assert "Next, at a key: The freeze: T0" in words(app)
        await pilot.press("escape", "space")
        assert feed.gone == 1
        assert "Stopped before" not in words(app)

    drive(app, act)
