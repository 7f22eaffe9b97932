"""The migration and its summary, drawn from recordings of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stage import SMALL, Recorded, Stage, console, drive, recording, screen_text, words
from textual.pilot import Pilot
from textual.widgets import Input

from tuimig.core.board import Batch
from tuimig.core.client import Update
from tuimig.core.errors import (
    Cancelled,
    CaptureLost,
    HandOverFailed,
    Obstacle,
    TargetGone,
    TuimigError,
    Unsupported,
)
from tuimig.core.model import Connection, Fault, FaultKind, Faults, Handover
from tuimig.core.recording import load
from tuimig.core.summary import summarize
from tuimig.run import KEPT, FaultLog, Rate
from tuimig.screens.check import Check
from tuimig.screens.confirm import Confirm
from tuimig.screens.failed import Failed
from tuimig.screens.migration import Migration
from tuimig.screens.processes import Processes
from tuimig.screens.snapshot import Snapshot
from tuimig.screens.summary import Summary
from tuimig.widgets.fault_log import FaultTable
from tuimig.widgets.table import Table
from tuimig.words import count


class Held(Recorded):
    """Plays all of its updates at the first poll but the last `held` ones, which `release` lets come."""

    def __init__(self, updates: list[Update], held: int) -> None:
        super().__init__(updates)
        self._held = held

    def poll(self) -> Update:
        return super().poll() if len(self.updates) > self._held else Update()

    def release(self) -> None:
        self._held = 0


def launched(name: str, held: int) -> tuple[Stage, Any, Held]:
    stage = Stage()
    feed = Held(recording(name), held)
    stage.feeds = [feed]
    return stage, console(stage, pid=4711), feed


async def launch(pilot: Pilot[Any], app: Any, feed: Held) -> None:
    await pilot.press("L", "f5", "enter")
    for _ in range(len(feed.updates) + 2):
        app._poll()
    if isinstance(app.screen, Migration):
        app.screen._draw()
    await pilot.pause()


def middle_of(name: str) -> int:
    """How many updates come after the capture has begun in earnest."""
    updates = recording(name)
    at = next(i for i, u in enumerate(updates) if u.state and u.state.progress.wp_faults > 3)
    return len(updates) - at - 1


def test_a_lost_connection_is_tried_at_a_key() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("n")
        assert feed.reconnects == 0  # nothing is lost
        feed.updates.insert(0, Update((Connection("lost", "ssh://heron", 41.0, "no sign of life"),)))
        app._poll()
        app.screen._draw()
        await pilot.pause()
        assert "given up in 41 s" in words(app)
        assert "n Reconnect" in words(app)
        await pilot.press("n")
        assert feed.reconnects == 1
        feed.updates.insert(0, Update((Connection("connected", "ssh://heron"),)))
        app._poll()
        app.screen._draw()
        await pilot.pause()
        assert "Reconnect" not in words(app)

    drive(app, act)


def test_a_capture_as_it_goes() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        text = screen_text(app)
        run = app.run_now
        assert "clone of 4711 redis-server  running" in text
        assert "▶capture" in text
        assert "✓freeze" in text
        assert f"{count(run.progress.wp_faults)} write faults" in text
        assert "fault p50" in text
        assert "frozen" in text
        assert "f" in text.splitlines()[2]
        last = run.faults.last(1)[0]
        assert f"{last.address:x}" in text

    drive(app, act)


def broken(error: TuimigError) -> tuple[Stage, Any, Held]:
    """A clone that has come to its middle, and fails there."""
    stage, app, feed = launched("clone", middle_of("clone"))
    feed.updates = [*feed.updates[: -middle_of("clone")], Update(error=error)]
    feed.release()
    return stage, app, feed


def test_the_summary_of_a_failure() -> None:
    stage, app, feed = broken(CaptureLost("a page was lost", subject="process 4711", cure="Use --guard on"))
    stage.feeds.append(Recorded([]))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        assert "a page was lost" in words(app)
        await pilot.press("s")
        assert isinstance(app.screen, Failed)
        text = words(app)
        for said in (
            "clone of 4711 failed",
            "failed process 4711: a page was lost",
            "what to do Use --guard on",
            "the source process 4711 runs on as before",
            "in phase capture",
            "freeze took 11.3 ms",
            "hottest regions",
        ):
            assert said in text, said
        assert "JSON" not in text
        await pilot.press("k", "j", "o")
        assert isinstance(app.screen, Failed)
        await pilot.press("r")
        assert isinstance(app.screen, Migration)
        assert len(stage.jobs) == 2

    drive(app, act)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Cancelled("cancelled; the source runs on as before"), "runs on as before"),
        (TargetGone("the process ended"), "process 4711 is gone"),
        (HandOverFailed("the move failed after its hand-over"), "process 4711 is stopped and keeps all of its memory"),
        (
            Unsupported("no", [Obstacle("tcp", "descriptor 7", "established", "Close it")]),
            "in the way tcp (descriptor 7)",
        ),
    ],
)
def test_what_became_of_the_source(error: TuimigError, said: str) -> None:
    _, app, feed = broken(error)

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        while isinstance(app.screen, Check):
            await pilot.press("escape")
        await pilot.press("s")
        assert said in words(app)

    drive(app, act)


@pytest.mark.parametrize("over", [False, True], ids=["running", "over"])
def test_a_window_that_is_made_narrower(over: bool) -> None:
    """It is drawn as one that was narrow from the beginning."""
    made = []
    for narrowed in (True, False):
        if over:
            _, app, feed = broken(CaptureLost("a page was lost"))
        else:
            _, app, feed = launched("clone", middle_of("clone"))

        async def act(pilot: Pilot[Any], app: Any = app, feed: Held = feed, narrowed: bool = narrowed) -> None:
            await launch(pilot, app, feed)
            if narrowed:
                await pilot.resize_terminal(*SMALL)
            for _ in range(5):
                await pilot.pause(0.1)  # the last row comes into view again where a line was added
            lines = screen_text(app).splitlines()
            made.append([line for line in lines if "capture" not in line])  # whose time goes on

        drive(app, act, (140, 40) if narrowed else SMALL)
    assert made[0] == made[1]


@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
def test_a_recording_is_kept_at_a_key(place: Path, when: str) -> None:
    """It replays to the totals of the live run; a file that is there is not written over."""
    _, app, feed = launched("clone", middle_of("clone"))
    file = place / "kept.rec"

    async def record(pilot: Pilot[Any], to: Path) -> None:
        await pilot.press("R")
        app.screen.query_one(Input).value = str(to)
        await pilot.press("enter")

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        if when == "meanwhile":
            await record(pilot, file)
            assert not file.exists()
        feed.release()
        while not app.run_now.over:
            app._poll()
        app.screen._draw() if isinstance(app.screen, Migration) else None
        await pilot.pause()
        if when == "afterwards":
            await record(pilot, file)
        summary, report = summarize(load(file)), app.run_now.report
        assert summary.report == report
        assert summary.command == app.run_now.command
        assert [span.name for span in summary.phases] == [stage.name for stage in app.run_now.stages]
        await record(pilot, file)
        assert "cannot write a recording there" in screen_text(app)
        assert summarize(load(file)).report == report

    drive(app, act)


def test_done_leads_to_the_summary(place: Path) -> None:
    stage, app, feed = launched("clone", 0)

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        app.screen._draw() if isinstance(app.screen, Migration) else None
        await pilot.pause()
        assert isinstance(app.screen, Summary)
        report = app.run_now.report
        text = screen_text(app)
        assert f"process {report.new_pid}" in text
        assert "frozen, by its parts" in text
        assert stage.learnt == [report]
        await pilot.press("y")
        assert "Copied: tuimig clone 4711" in screen_text(app)
        await pilot.press("j")
        app.screen.query_one(Input).value = str(place / "report.json")
        await pilot.press("enter")
        kept = json.loads(stage.saved[place / "report.json"])
        assert kept["frozen_us"] == report.frozen_us
        await pilot.press("k")
        assert isinstance(app.screen, Confirm)
        await pilot.press("enter")
        assert stage.ended == []
        await pilot.press("k", "right", "enter")
        assert stage.ended == [report]
        await pilot.press("k")
        assert "has ended" in screen_text(app)
        stage.feeds = [Recorded([])]
        await pilot.press("r")
        assert isinstance(app.screen, Migration)
        assert stage.jobs[1] == stage.jobs[0]

    drive(app, act)


def test_cancel_asks_first() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("x")
        assert isinstance(app.screen, Confirm)
        assert "runs on as before" in words(app)
        await pilot.press("enter")
        assert not feed.cancelled
        await pilot.press("x", "escape")
        assert not feed.cancelled
        await pilot.press("x", "right", "enter")
        assert feed.cancelled
        assert "cancelling" in screen_text(app)

    drive(app, act)


def test_a_failure_is_said_and_the_console_stays() -> None:
    _, app, feed = launched("failed", 0)

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        if isinstance(app.screen, Migration):
            app.screen._draw()
        await pilot.pause()
        assert isinstance(app.screen, Check)  # what was in the way, whole, with its cure
        assert "--tcp close" in words(app)
        await pilot.press("escape")
        text = screen_text(app)
        assert "failed" in text.splitlines()[0]
        assert "cannot be migrated" in text
        await pilot.press("escape", "escape")
        assert isinstance(app.screen, Processes)

    drive(app, act)


def test_pause_and_follow() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        table = app.screen.query_one(FaultTable)
        await pilot.press("p")
        assert "paused" in screen_text(app)
        before = table.current
        app.run_now.faults.add(Faults.of([FAULT]).records, 0)
        app.screen._draw()
        assert table.current == before
        await pilot.press("p")
        app.screen._draw()
        assert table.current == FAULT
        await pilot.press("up")
        assert not table.follows
        assert "f follows the newest again" in screen_text(app)
        app.run_now.faults.add(Faults.of([FAULT, FAULT]).records, 0)
        app.screen._draw()
        standing = table.cursor
        await pilot.press("f")
        app.screen._draw()
        assert table.follows
        assert table.current == FAULT
        assert standing >= 0

    drive(app, act)


def test_filter_by_thread_kind_and_region() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        table = app.screen.query_one(FaultTable)
        app.run_now.faults.add(Faults.of([FAULT]).records, 0)
        await pilot.press("slash", *"demand", "enter")
        assert [f.kind for f in table._faults] == [FaultKind.MISSING]
        await pilot.press("slash", *["backspace"] * 6, *"!demand", "enter")
        assert table._faults
        assert all(f.kind is FaultKind.WP for f in table._faults)
        await pilot.press("slash", *["backspace"] * 7, *"777", "enter")
        assert all("777" in f"{f.tid} {f.address:x}" for f in table._faults)

    drive(app, act)


def test_progress_by_region() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("b")
        table = app.screen.query_one("#by-region", Table)
        assert table.display
        assert len(table.keys) == len(app.run_now.regions()) > 0
        largest = app.run_now.regions()[0]
        assert f"{largest.start:x}" in screen_text(app)
        await pilot.press("b")
        assert not table.display

    drive(app, act)


def test_both_tables_on_a_wide_terminal() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        assert app.screen.query_one("#by-region", Table).display
        assert app.screen.query_one(FaultTable).display

    drive(app, act, (120, 40))


def test_going_elsewhere_and_back() -> None:
    stage, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("escape", "escape")
        assert isinstance(app.screen, Processes)
        assert "clone of 4711 runs (m)" in screen_text(app)
        await pilot.press("enter", "L")
        assert "m shows it" in screen_text(app)
        await pilot.press("m")
        assert isinstance(app.screen, Migration)
        assert len(stage.jobs) == 1

    drive(app, act)


def test_leaving_asks_while_it_runs() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("q")
        assert isinstance(app.screen, Confirm)
        assert "reports" in screen_text(app)
        await pilot.press("enter")
        assert app.is_running
        await pilot.press("q", "right", "right", "enter")
        await pilot.pause()
        assert feed.background is not None
        assert not feed.cancelled

    drive(app, act)


def test_what_is_handed_over_is_not_cancelled() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        app.screen.run_shown.handover = Handover("stopped", "told")
        await pilot.press("x")
        assert isinstance(app.screen, Migration)
        assert "the move goes on to its end" in words(app)
        await pilot.press("q")
        assert "Cancel it and quit" not in screen_text(app)
        await pilot.press("right", "enter")
        await pilot.pause()
        assert feed.background is not None
        assert not feed.cancelled

    drive(app, act)


def test_leaving_and_cancelling() -> None:
    _, app, feed = launched("clone", middle_of("clone"))

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        await pilot.press("ctrl+c", "right", "enter")
        await pilot.pause()
        assert feed.cancelled

    drive(app, act)
    assert feed.closed


def test_a_snapshot_leads_to_its_page() -> None:
    stage, app, feed = launched("snapshot", 0)

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        if isinstance(app.screen, Migration):
            app.screen._draw()
            await pilot.pause()
        assert isinstance(app.screen, Summary)
        stage.trouble = None
        stage.inspect = _no_snapshot  # type: ignore[method-assign]
        await pilot.press("o")
        assert isinstance(app.screen, Snapshot)
        assert "no snapshot there" in screen_text(app)

    drive(app, act)


def _no_snapshot(directory: Path) -> Any:
    from tuimig.core.errors import SnapshotDamaged

    raise SnapshotDamaged("there is no snapshot there", subject=str(directory))


FAULT = Fault(10**15, 777, 0x7FFFD0001000, 3, FaultKind.MISSING, 21_000, 4)


def test_the_log_keeps_the_newest_and_counts_all() -> None:
    log = FaultLog()
    one = Faults.of([FAULT]).records
    for _ in range(5):
        log.add(one * (KEPT // 4), 7)
    assert log.total == 5 * (KEPT // 4)
    assert log.missed == 35
    assert KEPT <= len(log) < KEPT + KEPT // 4
    assert log.last(3) == [FAULT] * 3
    assert log.last(2, leave=len(log)) == []
    assert log.last(5, wanted=lambda fault: fault.tid == 1) == []


def test_a_rate_is_of_its_own_time() -> None:
    rate = Rate()
    for step in range(9):
        rate.take(step * 100.0, step * 0.25)
    assert list(rate.samples) == [400.0] * 8


def test_missed_records_are_shown_as_not_logged() -> None:
    stage = Stage()
    updates = recording("clone")
    at = next(i for i, u in enumerate(updates) if u.state and u.state.progress.wp_faults > 3)
    updates[at] = Update(state=updates[at].state, faults=Batch(updates[at].faults.records, 1234))
    feed = Held(updates, len(updates) - at - 1)
    stage.feeds = [feed]
    app = console(stage, pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        await launch(pilot, app, feed)
        assert "1,234 not logged" in screen_text(app)

    drive(app, act)
