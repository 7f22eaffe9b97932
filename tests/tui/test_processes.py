"""The process list, every key of it, on a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from stage import PROCESSES, Stage, console, drive, process, screen_text
from textual.pilot import Pilot

from tuimig.core.errors import PrivilegeError
from tuimig.screens.check import Check
from tuimig.screens.processes import Processes, matcher, tree
from tuimig.screens.regions import Regions
from tuimig.widgets.table import Table


def commands(app: Any) -> list[str]:
    """What stands in the list, in order."""
    page = app.page
    return [line.command for line, _ in page._shown]


def test_the_list_says_what_can_be_migrated() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        text = screen_text(app)
        lines = {word: line for line in text.splitlines() for word in line.split()[:1]}
        assert "yes" in lines["4711"]
        assert "no io_uring" in lines["5003"]
        assert "asks children" in lines["4720"]
        assert "no permission" in lines["1180"]
        assert "kthreadd" not in text
        assert "9 processes" in text

    drive(app, act)


def test_filter_text_regex_and_inverse() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("slash", *"redis", "enter")
        assert commands(app) == ["/usr/bin/redis-server 127.0.0.1:6379"]
        await pilot.press("slash", *["backspace"] * 5, *"nginx|node", "enter")
        assert len(commands(app)) == 3
        await pilot.press("slash", *["backspace"] * 10, *"!root", "enter")
        assert all(line.user != "root" for line, _ in app.page._shown)  # type: ignore[attr-defined]
        await pilot.press("escape")
        assert len(commands(app)) == 9

    drive(app, act)


def test_a_bad_expression_is_said_and_changes_nothing() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("slash", "(")
        assert "not a regular expression" in screen_text(app)
        assert len(commands(app)) == 9
        await pilot.press("backspace")
        assert "not a regular expression" not in screen_text(app)

    drive(app, act)


def test_sorting() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        assert commands(app)[0].startswith("/usr/bin/redis")  # by RSS, most first
        await pilot.press("I")
        assert commands(app)[0].startswith("/usr/sbin/nginx") or app.page._shown[0][0].rss <= 7 << 20  # type: ignore[attr-defined]
        await pilot.press("I", "greater_than_sign")
        assert commands(app)[0].startswith("/usr/bin/node")  # by threads
        await pilot.press("less_than_sign", "less_than_sign", "less_than_sign", "less_than_sign", "I")
        pids = [line.pid for line, _ in app.page._shown]  # type: ignore[attr-defined]
        assert pids == sorted(pids) or pids == sorted(pids, reverse=True)
        assert "PID▲" in screen_text(app) or "USER" in screen_text(app)

    drive(app, act)


def test_tree_and_kernel_threads() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("t")
        assert "└─nginx: worker" in screen_text(app)
        await pilot.press("K")
        assert any("kthreadd" in command for command in commands(app))

    drive(app, act)


def test_the_cursor_sticks_to_the_process() -> None:
    stage = Stage()
    app = console(stage)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("down", "down")
        table = app.screen.query_one(Table)
        key = table.key
        stage.lines = [process(9, "new and huge", rss=1 << 40), *PROCESSES]
        await pilot.press("r")
        assert table.key == key
        # Another process under the same id is another process.
        stage.lines = [replace(line, ticks=1) if (line.pid, line.ticks) == key else line for line in stage.lines]
        await pilot.press("r")
        assert table.key != key

    drive(app, act)


def test_vim_keys_move() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        table = app.screen.query_one(Table)
        await pilot.press("j", "j", "k")
        assert table.cursor == 1
        await pilot.press("G")
        assert table.cursor == 8
        await pilot.press("g")
        assert table.cursor == 0
        await pilot.press("pagedown")
        assert table.cursor == 8
        await pilot.press("pageup", "end", "home")
        assert table.cursor == 0

    drive(app, act)


def test_enter_opens_the_regions_or_says_what_is_in_the_way() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("enter")
        assert isinstance(app.screen, Regions)
        assert app.screen.target.pid == 4711
        await pilot.press("escape", "slash", *"node", "enter", "enter")
        assert isinstance(app.screen, Check)
        assert "io_uring" in screen_text(app)
        assert "Start it without" in screen_text(app)
        await pilot.press("escape", "slash", *["backspace"] * 4, *"ada.*priv", "enter", "enter")
        assert isinstance(app.screen, Check)
        assert "CAP_SYS_PTRACE" in screen_text(app)

    drive(app, act)


def test_trouble_is_said_and_the_console_stays() -> None:
    stage = Stage()
    app = console(stage)

    async def act(pilot: Pilot[Any]) -> None:
        stage.trouble = PrivilegeError("may not read the list", subject="/proc", cure="Mount it")
        await pilot.press("r")
        assert "may not read the list. Mount it" in screen_text(app)
        stage.trouble = None
        await pilot.press("r")
        assert "may not read" not in screen_text(app)
        assert isinstance(app.screen, Processes)

    drive(app, act)


def test_no_process() -> None:
    stage = Stage()
    stage.lines = []
    drive(console(stage), lambda pilot: _sees(pilot, "0 processes"))


async def _sees(pilot: Pilot[Any], text: str) -> None:
    assert text in screen_text(pilot.app)  # type: ignore[arg-type]


def test_a_pid_that_is_not_there() -> None:
    drive(console(Stage(), pid=99999), lambda pilot: _sees(pilot, "process 99999: no such process"))


@pytest.mark.parametrize(
    ("text", "value", "taken"),
    [
        ("redis", "1 root REDIS-server", True),
        ("!redis", "1 root redis-server", False),
        ("^1 ", "1 root init", True),
        ("!^1 ", "2 root init", True),
        ("a.b", "aXb", False),
        ("", "anything", True),
        ("!", "anything", True),
    ],
)
def test_matcher(text: str, value: str, taken: bool) -> None:
    assert matcher(text)(value) is taken


def test_a_tree_keeps_orphans_and_loops() -> None:
    lines = [process(5, "child", parent=4), process(4, "parent", parent=99), process(7, "own", parent=7)]
    assert [(line.pid, branch) for line, branch in tree(lines)] == [(4, ""), (5, "└─"), (7, "")]
