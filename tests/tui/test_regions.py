"""The regions screen: each key changes what it says, and the consequences follow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stage import HEAT, MIB, Recorded, Stage, console, drive, region, screen_text
from textual.pilot import Pilot
from textual.widgets import Input

from tuimig.core.client import Update
from tuimig.core.errors import EngineError
from tuimig.core.model import Treatment
from tuimig.core.policy import load
from tuimig.screens.launch import Launch
from tuimig.screens.regions import Regions
from tuimig.widgets.region_map import RegionMap
from tuimig.widgets.table import Table

LARGE_ANON = 0x7FFFD0000000
HEAP = 0x555555800000
EAGER, PROTECTED, NONE = Treatment.EAGER, Treatment.PROTECTED, Treatment.NONE


def treatments(app: Any) -> dict[int, Treatment]:
    return {d.region.start: d.treatment for d in app.page.plan.decisions}


def opened(stage: Stage | None = None, **settings: Any) -> Any:
    return console(stage or Stage(), pid=4711, **settings)


def go(app: Any, start: int) -> None:
    assert app.screen.query_one("#regions", Table).go_to(start)


def test_treatments_and_undo() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        assert treatments(app)[LARGE_ANON] is PROTECTED
        go(app, LARGE_ANON)
        await pilot.press("e")
        assert treatments(app)[LARGE_ANON] is EAGER
        assert "chosen for this region" in screen_text(app)
        await pilot.press("w")
        assert treatments(app)[LARGE_ANON] is PROTECTED
        await pilot.press("d")
        assert app.screen.policy.keys == ()
        await pilot.press("u", "u")
        assert treatments(app)[LARGE_ANON] is EAGER
        await pilot.press("u")
        assert treatments(app)[LARGE_ANON] is PROTECTED
        await pilot.press("u")
        assert "Nothing to undo" in screen_text(app)

    drive(app, act)


def test_what_cannot_be_protected_says_why() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        go(app, 0x7FFFF7C00000)
        await pilot.press("w")
        assert "It stays none: shared mapping" in screen_text(app)
        go(app, 0x7FFFF7000000)
        await pilot.press("w")
        assert "userfaultfd does not register it" in screen_text(app)

    drive(app, act)


def test_tags() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        go(app, HEAP)
        await pilot.press("space", "space")
        assert "2 tagged" in screen_text(app)
        await pilot.press("e")
        assert treatments(app)[HEAP] is treatments(app)[LARGE_ANON] is EAGER
        await pilot.press("U")
        assert "tagged" not in screen_text(app)
        go(app, HEAP)
        await pilot.press("v", "down", "down", "v")
        assert "3 tagged" in screen_text(app)
        await pilot.press("U", "slash", *"anon", "enter", "asterisk")
        assert "tagged" in screen_text(app)
        shown = len(app.screen._shown)
        assert f"{shown} tagged" in screen_text(app)

    drive(app, act)


def test_a_span_where_nothing_is_shown() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("v", "slash", *"zzzz", "enter", "v")
        assert "No region is shown" in screen_text(app)
        await pilot.press("escape", "down", "v")
        assert "2 tagged" in screen_text(app)

    drive(app, act)


def test_a_threshold_that_is_at_its_end_is_no_step() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        before = app.screen.policy.eager_below
        await pilot.press(*["left_square_bracket"] * 20)
        assert "at its lowest" in screen_text(app)
        low = app.screen.policy.eager_below
        await pilot.press("u")
        assert low < app.screen.policy.eager_below <= before

    drive(app, act)


def test_the_threshold_changes_regions_at_once() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        before = treatments(app)
        assert "eager below 1MiB" in screen_text(app)
        await pilot.press(*["right_square_bracket"] * 4)
        assert "eager below 256MiB" in screen_text(app)
        assert sum(t is EAGER for t in treatments(app).values()) > sum(t is EAGER for t in before.values())
        await pilot.press(*["left_square_bracket"] * 4)
        assert treatments(app) == before
        await pilot.press(*["left_square_bracket"] * 20)
        assert "eager below 0" in screen_text(app)

    drive(app, act)


def test_the_cost_follows() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        def cost() -> str:
            return next(line for line in screen_text(app).splitlines() if "frozen about" in line)

        before = cost()
        go(app, LARGE_ANON)
        await pilot.press("e")
        assert cost() != before

    drive(app, act)


def test_heat() -> None:
    stage = Stage()
    stage.feeds = [Recorded([Update(), Update(heat=HEAT)])]
    app = opened(stage)

    async def act(pilot: Pilot[Any]) -> None:
        assert "h measures" in screen_text(app)
        await pilot.press("h")
        await pilot.pause(0.4)
        text = screen_text(app)
        assert stage.jobs[0].verb == "heat"
        assert stage.jobs[0].options.started == 47110
        assert "3 regions written to" in text
        assert "78%" in text  # 400 of the heap's 512 pages
        assert "write faults in a window" in text

    drive(app, act)


def test_heat_that_fails_is_said() -> None:
    stage = Stage()
    stage.feeds = [Recorded([Update(error=EngineError("it went wrong", cure="Try again"))])]
    app = opened(stage)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("h")
        await pilot.pause(0.3)
        assert "it went wrong. Try again" in screen_text(app)

    drive(app, act)


def test_save_and_load(place: Path) -> None:
    stage = Stage()
    app = opened(stage)

    async def act(pilot: Pilot[Any]) -> None:
        go(app, LARGE_ANON)
        await pilot.press("e", "s")
        app.screen.query_one(Input).value = str(place / "one.toml")
        await pilot.press("enter")
        text = stage.saved[place / "one.toml"]
        (place / "one.toml").write_text(text)
        assert f"{LARGE_ANON:x}-" in text
        assert load(place / "one.toml").plan([region(LARGE_ANON, 256 * MIB)]).decisions[0].treatment is EAGER
        await pilot.press("u", "o")
        app.screen.query_one(Input).value = str(place / "one.toml")
        await pilot.press("enter")
        assert treatments(app)[LARGE_ANON] is EAGER
        (place / "bad.toml").write_text("eager_below = []")
        await pilot.press("o")
        app.screen.query_one(Input).value = str(place / "bad.toml")
        await pilot.press("enter")
        assert "bad.toml" in screen_text(app)
        assert "wrong type" in screen_text(app)
        assert treatments(app)[LARGE_ANON] is EAGER

    drive(app, act)


def test_filter_and_launch() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("slash", *"libc", "enter")
        assert len(app.screen._shown) == 1
        await pilot.press("escape")
        assert len(app.screen._shown) == 15
        await pilot.press("L")
        assert isinstance(app.screen, Launch)
        await pilot.press("escape")
        assert isinstance(app.screen, Regions)

    drive(app, act)


def test_a_process_that_ended_is_said() -> None:
    stage = Stage()
    app = opened(stage)

    async def act(pilot: Pilot[Any]) -> None:
        stage.lines = []
        await pilot.press("r")
        assert "process 4711: the process is gone" in screen_text(app)

    drive(app, act)


def test_read_only_measures_and_launches_nothing() -> None:
    stage = Stage()
    app = opened(stage, read_only=True)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("h")
        assert "Read-only" in screen_text(app)
        await pilot.press("L")
        assert "Read-only: nothing is launched" in screen_text(app)
        assert stage.jobs == []

    drive(app, act)


def test_ten_thousand_regions_stay_quick() -> None:
    """Generous bounds: a tenth of a second is asked for on a quiet machine (benchmarks/console.py)."""
    stage = Stage()
    stage.memory = [region(0x10000000 + i * 0x10000, 0x8000, rss=0x1000 * (i % 8)) for i in range(10_000)]
    app = opened(stage)

    async def act(pilot: Pilot[Any]) -> None:
        assert "10,000 regions" in screen_text(app)
        begin = time.perf_counter()
        await pilot.press("G", "k", "pageup", "g")
        assert time.perf_counter() - begin < 4
        assert app.screen.query_one("#regions", Table).cursor == 0

    drive(app, act)


def test_the_strip_shows_treatments_by_letter() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        letters = "".join(cell.letter for cell in app.screen.query_one(RegionMap)._drawn)
        assert letters.count("W") > letters.count("E") > 0
        assert set(letters) <= set("EW.")
        go(app, LARGE_ANON)
        await pilot.press("e")
        await pilot.pause()
        after = "".join(cell.letter for cell in app.screen.query_one(RegionMap)._drawn)
        assert after.count("E") > letters.count("E")

    drive(app, act)


def test_regions_is_where_a_pid_leads() -> None:
    app = opened()

    async def act(pilot: Pilot[Any]) -> None:
        assert isinstance(app.screen, Regions)

    drive(app, act)
