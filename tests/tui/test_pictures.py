"""Every screen as a picture, at 80x24 and 120x40; compared with those in snapshots/. Made from recorded migrations."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MADE_WITH, PICTURES, versions
from stage import HEAT, LARGE, SMALL, Recorded, Stage, console, ready, recording, region
from test_migration import Held, middle_of
from textual.pilot import Pilot
from textual.widgets import Input

from tuimig.app import Console
from tuimig.core.client import Update
from tuimig.core.errors import PrivilegeError
from tuimig.core.jobs import Job
from tuimig.core.model import Options, Planned, PortMap
from tuimig.core.recording import load
from tuimig.run import Run
from tuimig.screens.migration import Migration
from tuimig.settings import Settings

Act = Callable[[Pilot[Any]], Awaitable[None]]


def keys(*pressed: str) -> Act:
    async def act(pilot: Pilot[Any]) -> None:
        await ready(pilot)
        await pilot.press(*pressed)
        await pilot.pause()

    return act


def plain(stage: Stage) -> None:
    pass


def empty(stage: Stage) -> None:
    stage.lines = []


def ten_thousand(stage: Stage) -> None:
    stage.memory = [region(0x10000000 + i * 0x100000, 0x80000, rss=0x1000 * (i % 64)) for i in range(10_000)]


def heat(stage: Stage) -> None:
    stage.feeds = [Recorded([Update(heat=HEAT)])]


async def measured(pilot: Pilot[Any]) -> None:
    await ready(pilot)
    await pilot.press("h")
    page = pilot.app.screen
    page._poll_heat()  # type: ignore[attr-defined]
    await pilot.pause()


async def trouble(pilot: Pilot[Any]) -> None:
    await ready(pilot)
    pilot.app.backend.trouble = PrivilegeError(  # type: ignore[attr-defined]
        "may not look into the process", subject="process 4711", syscall="open", errno=13, cure="Run as root"
    )
    await pilot.press("r")
    await pilot.pause()


async def wrong_port(pilot: Pilot[Any]) -> None:
    await ready(pilot)
    await pilot.press("L")
    pilot.app.screen.query_one("#ports", Input).value = "6379"
    await pilot.pause()


async def to_elsewhere(pilot: Pilot[Any]) -> None:
    await ready(pilot)
    await pilot.press("L", "right", "right")
    pilot.app.screen.query_one("#to", Input).value = "ssh://root@backup"
    await pilot.pause()


SCREENS: dict[str, tuple[Callable[[Stage], None], int | None, Act]] = {
    "processes": (plain, None, keys()),
    "processes-tree": (plain, None, keys("t")),
    "processes-filter": (plain, None, keys("slash", *"nginx|redis", "enter")),
    "processes-empty": (empty, None, keys()),
    "processes-error": (plain, None, trouble),
    "regions": (plain, 4711, keys("down", "down", "down", "down")),
    "regions-heat": (heat, 4711, measured),
    "regions-tagged": (plain, 4711, keys("down", "down", "down", "space", "space", "e")),
    "regions-10000": (ten_thousand, 4711, keys()),
    "regions-error": (plain, 4711, trouble),
    "check": (plain, None, keys("c")),
    "check-process": (plain, None, keys("slash", *"node", "enter", "enter")),
    "launch": (plain, 4711, keys("L")),
    "launch-snapshot": (plain, 4711, keys("L", "right")),
    "launch-to": (plain, 4711, to_elsewhere),
    "launch-error": (plain, 4711, wrong_port),
    "help": (plain, 4711, keys("question_mark")),
}


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
@pytest.mark.parametrize("name", SCREENS)
def test_screen(snap_compare: Any, name: str, size: tuple[int, int]) -> None:
    prepare, pid, act = SCREENS[name]
    stage = Stage()
    prepare(stage)
    assert snap_compare(console(stage, pid=pid), terminal_size=size, run_before=act)


class Clock:
    """Stands still: what goes on is drawn as of one moment."""

    def __init__(self, updates: list[Update]) -> None:
        self._ns = max(event.time_ns for u in updates for event in u.events if hasattr(event, "time_ns")) + 250_000_000

    def __call__(self) -> float:
        return self._ns / 1e9


def migrating(name: str, held: int, press: Act) -> tuple[Console, Act]:
    """The migration screen over a recording, `held` updates before its end."""
    app = console(Stage(), pid=4711)
    updates = recording(name)
    feed = Held(updates, held)

    async def act(pilot: Pilot[Any]) -> None:
        await ready(pilot)
        options = Options(map_ports=(PortMap(6379, 16379),))
        pid = next((e.pid for u in updates for e in u.events if isinstance(e, Planned)), 4711)
        job = Job("snapshot" if name == "snapshot" else "clone", pid, options=options)
        shown = updates[: len(updates) - held]
        app.run_now = Run(job, feed, Clock(shown))
        app.push_screen(Migration(app.run_now))
        await pilot.pause()
        for _ in shown:
            app._poll()
        page = app.screen
        assert isinstance(page, Migration)
        page._draw()
        await pilot.pause()
        if isinstance(app.screen, Migration):
            app.screen._draw()
        await press(pilot)

    return app, act


RUNS: dict[str, tuple[str, int | None, Act]] = {
    "migration": ("clone", None, keys()),
    "migration-regions": ("clone", None, keys("b")),
    "migration-fill": ("clone", 4, keys()),
    "migration-cancel": ("clone", None, keys("x")),
    "migration-quit": ("clone", None, keys("q")),
    "migration-failed": ("failed", 0, keys()),
    "summary": ("clone", 0, keys()),
    "summary-failed": ("failed", 0, keys("s")),
    "summary-snapshot": ("snapshot", 0, keys()),
}


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
@pytest.mark.parametrize("name", RUNS)
def test_run(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]) -> None:
    recorded, held, press = RUNS[name]
    app, act = migrating(recorded, middle_of(recorded) if held is None else held, press)
    monkeypatch.setattr(Console, "report_file", lambda self, run: Path("/var/lib/state/tuimig/reports/clone-4711.json"))
    assert snap_compare(app, terminal_size=size, run_before=act)


REPLAYS: dict[str, Act] = {
    "replay": keys(*["right_square_bracket"] * 7, *["full_stop"] * 4),
    "replay-explain": keys(*["right_square_bracket"] * 7, *["full_stop"] * 4, "E"),
}


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
@pytest.mark.parametrize("name", REPLAYS)
def test_replay(snap_compare: Any, name: str, size: tuple[int, int]) -> None:
    shown = load(Path(__file__).resolve().parents[2] / "examples" / "churn.rec")
    app = Console(Stage(), Settings(refresh_s=60.0), recording=shown, threads=False)
    assert snap_compare(app, terminal_size=size, run_before=REPLAYS[name])


def test_ascii(snap_compare: Any) -> None:
    app, act = migrating("clone", middle_of("clone"), keys())
    app._ascii = console(Stage(), ascii=True)._ascii
    assert snap_compare(app, terminal_size=SMALL, run_before=act)


def test_no_color(snap_compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app, act = migrating("clone", middle_of("clone"), keys())
    assert snap_compare(app, terminal_size=SMALL, run_before=act)


def test_light(snap_compare: Any) -> None:
    app = console(Stage(), pid=4711, theme="textual-light")
    assert snap_compare(app, terminal_size=SMALL, run_before=keys("down", "e"))


def test_too_small(snap_compare: Any) -> None:
    assert snap_compare(console(Stage()), terminal_size=(60, 20), run_before=keys())


def test_no_picture_is_an_orphan() -> None:
    """A test that went leaves its picture behind; a picture in the way of nobody is looked at by nobody."""
    expected = {f"test_screen[{name}-{size}]" for name in SCREENS for size in ("80x24", "120x40")}
    expected |= {f"test_run[{name}-{size}]" for name in RUNS for size in ("80x24", "120x40")}
    expected |= {f"test_replay[{name}-{size}]" for name in REPLAYS for size in ("80x24", "120x40")}
    expected |= {"test_ascii", "test_no_color", "test_light", "test_too_small"}
    found = {path.stem.removesuffix(".raw") for path in PICTURES.glob("*.svg")}
    assert found == expected
    assert MADE_WITH.read_text() == versions()


def test_pictures_differ_where_they_should() -> None:
    """Two screens with the same picture would be one that was never drawn."""
    digests: dict[str, str] = {}
    for path in PICTURES.glob("*80x24*.svg"):
        digest = hashlib.blake2b(path.read_bytes()).hexdigest()
        assert digest not in digests, f"{path.name} and {digests[digest]} are the same"
        digests[digest] = path.name
