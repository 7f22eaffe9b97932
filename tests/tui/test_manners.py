"""What holds on every screen: help, palette, keys of one's own, reading only, trouble, small terminals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from stage import SMALL, Recorded, Stage, console, drive, screen_text, words
from textual.command import CommandPalette
from textual.pilot import Pilot

from tuimig import settings
from tuimig.app import Console
from tuimig.core.errors import UsageError
from tuimig.core.model import Treatment
from tuimig.keys import known_bindings, refuse_unknown
from tuimig.palette import commands
from tuimig.plain import REPLACED
from tuimig.screens.check import Check
from tuimig.screens.help import Help
from tuimig.screens.processes import Processes
from tuimig.screens.regions import Regions
from tuimig.screens.small import TooSmall
from tuimig.settings import Settings
from tuimig.widgets.table import Table


def test_help_has_the_keys_of_the_screen_beneath() -> None:
    app = console(Stage(), pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        shown = {what for _, what in app.screen._keys}
        assert {"Eager", "Protect", "Undo", "Heat", "Launch", "Quit", "Check", "Down"} <= shown
        assert "write-protected" in words(app)
        await pilot.press("escape")
        assert isinstance(app.screen, Regions)
        await pilot.press("f1", "q")
        assert isinstance(app.screen, Regions)

    drive(app, act)


def test_check_is_reachable_from_everywhere() -> None:
    app = console(Stage(), pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("c")
        assert isinstance(app.screen, Check)
        assert app.screen.target is not None
        assert app.screen.target.pid == 4711
        await pilot.press("r", "a", "down")
        await pilot.press("escape", "escape", "c")
        assert isinstance(app.screen, Check)
        assert app.screen.target.pid == 4711  # the one under the cursor

    drive(app, act)


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_three_keys_leave(key: str) -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press(key)
        await pilot.pause()

    drive(app, act)
    assert app.return_value == 0


def test_the_palette_jumps() -> None:
    app = console(Stage(), pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("ctrl+p")
        assert isinstance(app.screen, CommandPalette)
        await pilot.press("escape")
        known = {command.title: command for command in commands(app)}
        next(command for title, command in known.items() if title.startswith("region 7fffd0000000")).callback()
        assert app.screen.query_one("#regions", Table).key == 0x7FFFD0000000
        known["Eager for a glob ..."].callback()
        await pilot.pause()
        await pilot.press(*"*libc*", "enter")
        await pilot.press("ctrl+p", *"process 6001", "enter")
        await pilot.pause(0.3)
        assert isinstance(app.screen, Regions)
        assert app.screen.target.pid == 6001

    drive(app, act)


def test_a_glob_from_the_palette_is_a_rule() -> None:
    app = console(Stage(), pid=4711)

    async def act(pilot: Pilot[Any]) -> None:
        page = app.screen
        assert isinstance(page, Regions)
        page.apply_rule("anon", Treatment.EAGER)
        large = next(d for d in page.plan.decisions if d.region.start == 0x7FFFD0000000)
        assert (large.treatment, large.rule) == (Treatment.EAGER, "key")
        await pilot.press("u")
        assert page.policy.rules == ()

    drive(app, act)


def test_keys_can_be_remapped() -> None:
    app = console(Stage(), keys={"processes.tree": "f7", "app.check": "f8"})

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("t")
        assert not app.page._tree  # type: ignore[attr-defined]
        await pilot.press("f7")
        assert app.page._tree  # type: ignore[attr-defined]
        await pilot.press("f8")
        assert isinstance(app.screen, Check)

    drive(app, act)


def test_every_key_has_an_id_of_its_own() -> None:
    known = known_bindings()
    assert len(known) > 60
    refuse_unknown({"regions.eager": "x"}, "config.toml")
    with pytest.raises(UsageError, match=r"no key is called 'regions\.eagre'.*Known: regions\."):
        refuse_unknown({"regions.eagre": "x"}, "config.toml")


def test_no_screen_hides_a_key_of_the_table_or_the_console() -> None:
    """One key with two meanings on a screen is one that cannot be reached."""
    from tuimig.keys import _all_subclasses
    from tuimig.screens.page import Page

    everywhere = {key for kind in (Table, Console) for binding in kind.BINDINGS for key in binding.key.split(",")}
    for page in _all_subclasses(Page):
        if not page.__module__.startswith("tuimig.screens"):
            continue
        for binding in page.__dict__.get("BINDINGS", []):
            if binding.priority:  # it comes first, on purpose
                continue
            clash = everywhere & set(binding.key.split(","))
            uses_table = page.__name__ not in ("Summary", "Launch")
            assert not (clash - {"enter"} and uses_table), f"{page.__name__}: {binding.action} on {clash}"


def test_too_small_says_one_line() -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        assert isinstance(app.screen, TooSmall)
        assert screen_text(app).strip() == "60x20: needs 80x24"
        await pilot.resize_terminal(*SMALL)
        await pilot.pause()
        assert isinstance(app.screen, Processes)
        await pilot.resize_terminal(79, 24)
        await pilot.pause()
        assert "79x24: needs 80x24" in screen_text(app)

    drive(app, act, (60, 20))


def test_an_internal_error_is_one_sentence(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    app = console(Stage())
    monkeypatch.setattr(type(app), "is_headless", property(lambda self: False))
    said: list[str] = []
    monkeypatch.setattr(app, "exit", lambda code, message="": said.append(message))
    with caplog.at_level(logging.CRITICAL):
        app._handle_exception(ValueError("a mistake"))
    assert said == ["tuimig: internal error: ValueError: a mistake. The log has more"]
    assert caplog.records[0].exc_info is not None


def test_ascii_has_a_likeness_for_what_we_draw() -> None:
    """Every character in our own sources that is not ASCII."""
    root = Path(settings.__file__).parent
    drawn = {
        c
        for folder in ("screens", "widgets")
        for path in (root / folder).glob("*.py")
        for c in path.read_text(encoding="utf-8")
        if not c.isascii()
    }
    assert drawn <= set(REPLACED)


def test_names_of_processes_are_text() -> None:
    """Markup, escape sequences and line ends in a command are shown, never obeyed."""
    stage = Stage()
    stage.lines = [line for line in stage.lines if line.pid != 4711]
    from stage import process

    stage.lines.append(process(4711, "evil\x1b[2J[red]\nname [/]", rss=1 << 40))
    app = console(stage)

    async def act(pilot: Pilot[Any]) -> None:
        assert r"evil\x1b[2J[red]\nname" in screen_text(app)
        await pilot.press("enter")
        assert isinstance(app.screen, Regions)
        stage.feeds = [Recorded([])]
        await pilot.press("L", "f5", "enter")
        await pilot.pause()

    drive(app, act)


def test_settings_from_a_file(place: Path) -> None:
    file = place / "config.toml"
    assert settings.load(file, {}) == Settings()
    assert settings.load(file, {"SSH_CONNECTION": "1 2 3 4"}).low_bandwidth
    file.write_text('theme = "nord"\nrefresh = 5\nmouse = false\n[keys]\n"app.quit" = "f10"\n')
    found = settings.load(file, {})
    assert (found.theme, found.refresh_s, found.mouse, found.keys) == ("nord", 5.0, False, {"app.quit": "f10"})
    file.write_text("low_bandwidth = false")
    assert not settings.load(file, {"SSH_CONNECTION": "1"}).low_bandwidth


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("theme = 3", "theme has the wrong type"),
        ('theme = "pink"', "no such theme"),
        ("colour = true", "unknown key 'colour'"),
        ("refresh = 0.01", "refresh is not between"),
        ("refresh = true", "refresh has the wrong type"),
        ("[keys]\n'app.quit' = 3", "each value is a key"),
        ("theme =", "cannot read the settings"),
    ],
)
def test_bad_settings_name_the_file(place: Path, text: str, said: str) -> None:
    file = place / "config.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        settings.load(file, {})
    assert str(file) in str(caught.value)


def test_places_follow_xdg() -> None:
    assert settings.config_file({"XDG_CONFIG_HOME": "/c"}) == Path("/c/tuimig/config.toml")
    assert settings.config_file({"HOME": "/h", "XDG_CONFIG_HOME": "relative"}) == Path("/h/.config/tuimig/config.toml")
    assert settings.state_directory({"HOME": "/h"}) == Path("/h/.local/state/tuimig")
