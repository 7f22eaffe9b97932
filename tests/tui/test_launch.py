"""Launch: defaults that fit, what is wrong said at its field, and one deliberate Enter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage import Recorded, Stage, console, drive, screen_text, words
from textual.pilot import Pilot
from textual.widgets import Button, Input

from tuimig import arguments
from tuimig.core.errors import EngineError, Obstacle
from tuimig.core.jobs import Job
from tuimig.core.model import Options, PortMap, Treatment
from tuimig.core.policy import Policy, Rule
from tuimig.screens.check import Check
from tuimig.screens.launch import Launch
from tuimig.screens.migration import Migration
from tuimig.widgets.choice import Choice, Switch


def staged() -> tuple[Stage, Any]:
    stage = Stage()
    stage.feeds = [Recorded([])]
    return stage, console(stage, pid=4711)


def test_the_defaults_fit_the_process() -> None:
    stage, app = staged()
    stage.in_use = {16379}
    stage.in_the_way[4711] = [Obstacle("tcp", "descriptor 8", "one is established", "With --tcp close ...")]

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        assert app.screen.query_one("#ports", Input).value == "6379:16380"
        assert app.screen.query_one("#tcp", Choice).value == "close"
        assert "process 4711 (redis-server) stops for about" in words(app)
        assert "listening on 16380 for 6379" in words(app)

    drive(app, act)


def test_nothing_starts_before_enter_on_the_button() -> None:
    stage, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "enter", "enter")
        assert stage.jobs == []
        assert not app.screen.query_one("#launch", Button).has_focus
        await pilot.press("f5", "enter")
        assert isinstance(app.screen, Migration)
        job = stage.jobs[0]
        assert (job.verb, job.pid, job.options.started) == ("clone", 4711, 47110)
        assert job.options.map_ports == (PortMap(6379, 16379),)

    drive(app, act)


def test_a_snapshot_asks_for_a_directory() -> None:
    stage, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "right")
        text = screen_text(app)
        assert "/var/tmp/redis-server-4711.snap" in text
        assert "Ports" not in text
        app.screen.query_one("#directory", Input).value = ""
        await pilot.pause()
        assert "a directory is needed" in screen_text(app)
        await pilot.press("f5", "enter")
        assert stage.jobs == []
        app.screen.query_one("#directory", Input).value = "/var/tmp/here"
        await pilot.pause()
        app.screen.query_one("#launch").focus()
        await pilot.press("enter")
        assert (stage.jobs[0].verb, stage.jobs[0].place) == ("snapshot", "/var/tmp/here")

    drive(app, act)


def test_what_is_wrong_is_said_at_the_field() -> None:
    stage, app = staged()
    stage.in_use = {80}

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        ports = app.screen.query_one("#ports", Input)
        for value, said in (("6379", "write it like 6379:16379"), ("6379:80", "80 is in use"), ("6379:99999", "write")):
            ports.value = value
            await pilot.pause()
            line = next(line for line in screen_text(app).splitlines() if "Ports" in line)
            assert said in line
        assert app.screen.query_one("#launch", Button).disabled

    drive(app, act)


def test_proposed_ports_can_be_emptied() -> None:
    stage, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        ports = app.screen.query_one("#ports", Input)
        assert ports.value == "6379:16379"
        ports.focus()
        await pilot.press("end", *["backspace"] * len(ports.value))
        assert ports.value == ""
        await pilot.press(*"6379:7000", "f5", "enter")
        assert stage.jobs[0].options.map_ports == (PortMap(6379, 7000),)

    drive(app, act)


def test_what_was_filled_in_is_there_again() -> None:
    stage, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "right", "right")
        app.screen.query_one("#to", Input).value = "unix:/run/there"
        app.screen.query_one("#ports", Input).value = "6379:7000"
        app.screen.query_one("#verify", Switch).value = "yes"
        await pilot.press("escape", "L")
        text = screen_text(app)
        assert "(*) clone to" in text
        assert "unix:/run/there" in text
        assert "6379:7000" in text
        assert "[x] hash all pages" in text
        await pilot.press("f5", "enter")
        job = stage.jobs[0]
        assert (job.place, job.options.verify) == ("unix:/run/there", True)

    drive(app, act)


def test_what_asks_wants_a_yes() -> None:
    stage, app = staged()
    stage.in_the_way[4711] = [Obstacle("children", "process 9", "only the process is copied", "Accept", asks=True)]

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "f5", "enter")
        assert stage.jobs == []
        assert "say yes to go on" in screen_text(app)
        await pilot.press("space", "f5", "enter")
        assert stage.jobs[0].options.yes

    drive(app, act)


def test_what_blocks_is_shown_with_its_cure() -> None:
    stage, app = staged()
    stage.in_the_way[4711] = [Obstacle("io_uring", "descriptor 5", "cannot be rebuilt", "Start it without")]

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "f5", "enter")
        assert isinstance(app.screen, Check)
        assert "Start it without" in screen_text(app)
        assert stage.jobs == []
        await pilot.press("escape")
        assert isinstance(app.screen, Launch)

    drive(app, act)


def test_what_was_in_the_way_and_is_gone_blocks_no_more() -> None:
    stage, app = staged()
    stage.in_the_way[4711] = [Obstacle("pipe", "descriptor 5", "leads to another process", "Close it")]

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "f5", "enter")
        assert isinstance(app.screen, Check)
        stage.in_the_way[4711] = [Obstacle("children", "process 9", "only the process is copied", "Accept", asks=True)]
        await pilot.press("escape", "f5", "enter")
        assert "say yes to go on" in screen_text(app)
        await pilot.press("space", "f5", "enter")
        assert len(stage.jobs) == 1

    drive(app, act)


def test_an_engine_that_does_not_start_is_said() -> None:
    stage, app = staged()

    def refuse(job: Job) -> Any:
        raise EngineError("cannot start a session process", syscall="fork", errno=11)

    stage.start = refuse  # type: ignore[method-assign]

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "f5", "enter")
        assert "cannot start a session process" in screen_text(app)
        assert isinstance(app.screen, Launch)

    drive(app, act)


def test_back() -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        app.screen.query_one("#back").focus()
        await pilot.press("enter")
        assert not isinstance(app.screen, Launch)

    drive(app, act)


def test_every_option_reaches_the_job() -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        screen = app.screen
        screen.query_one("#tcp", Choice).value = "close"
        screen.query_one("#namespace", Choice).value = "new"
        screen.query_one("#guard", Choice).value = "on"
        screen.query_one("#precopy", Choice).value = "off"
        for name in ("full", "verify"):
            screen.query_one(f"#{name}").action_step(1)
        screen.query_one("#stdio", Input).value = "/tmp/out"
        await pilot.pause()
        options = screen.job().options
        assert (options.tcp, options.pid_namespace, options.guard) == ("close", "new", "on")
        assert options.full
        assert options.precopy == "off"
        assert options.verify
        assert options.stdio == "/tmp/out"

    drive(app, act)


async def to_elsewhere(pilot: Pilot[Any], to: str, *before: str) -> None:
    await pilot.press("L", *(before or ("right", "right")))
    pilot.app.screen.query_one("#to", Input).value = to
    await pilot.pause()


def shown(app: Any) -> set[str]:
    """The labels of the form."""
    return {line.split()[0] for line in screen_text(app).splitlines() if line.strip()}


def test_the_connection_to_elsewhere() -> None:
    stage, app = staged()
    labels = {"Streams", "Bandwidth", "Compress", "Command"}

    async def act(pilot: Pilot[Any]) -> None:
        await to_elsewhere(pilot, "")
        assert not labels & shown(app)
        for to, there in (("ssh://far", labels), ("unix:/run/x", labels - {"Command"})):
            app.screen.query_one("#to", Input).value = to
            await pilot.pause()
            assert labels & shown(app) == there
        assert app.screen.job().options.remote_command == "tuimig"
        app.screen.query_one("#to", Input).value = "ssh://far"
        for name, value in (("streams", "3"), ("bandwidth", "50MiB"), ("command", "sudo tuimig")):
            app.screen.query_one(f"#{name}", Input).value = value
        app.screen.query_one("#compress", Choice).value = "lz4"
        await pilot.press("f5", "enter")
        options = stage.jobs[0].options
        assert (options.streams, options.bandwidth, options.compress) == (3, 50 << 20, "lz4")
        assert options.remote_command == "sudo tuimig"

    drive(app, act)


def test_a_clone_here_has_no_connection() -> None:
    stage, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await to_elsewhere(pilot, "ssh://far")
        app.screen.query_one("#streams", Input).value = "x"
        app.screen.query_one("#what", Choice).value = "clone here"
        await pilot.pause()
        await pilot.press("f5", "enter")
        assert stage.jobs[0].options == Options(map_ports=(PortMap(6379, 16379),), started=47110)

    drive(app, act)


def test_what_is_wrong_with_a_connection() -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await to_elsewhere(pilot, "ssh://far")
        for name, values, said in (
            ("streams", ("0", "17", "x", ""), "1 to 16"),
            ("bandwidth", ("fast", "-1"), "write it like 50MiB"),
            ("command", ("", "'"), "not a command"),
        ):
            field = app.screen.query_one(f"#{name}", Input)
            kept = field.value
            for value in values:
                field.value = value
                await pilot.pause()
                assert said in screen_text(app), (name, value)
                assert app.screen.query_one("#launch", Button).disabled
            field.value = kept
        await pilot.pause()
        assert not app.screen.query_one("#launch", Button).disabled

    drive(app, act)


def test_what_stdio_can_be(place: Path) -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        stdio = app.screen.query_one("#stdio", Input)
        for value, said in (("", "null, or a file"), ("out", "null, or a file"), ("inherit", "null, or a file")):
            stdio.value = value
            await pilot.pause()
            assert said in screen_text(app), value
        stdio.value = str(place)
        await pilot.pause()
        assert "is a directory" in screen_text(app)
        stdio.value = "~/out"
        await pilot.pause()
        assert app.screen.job().options.stdio == str(Path.home() / "out")
        await to_elsewhere_here(pilot)
        assert "null, or a file" in screen_text(app)  # whose home it would be is not known
        stdio.value = str(place)
        await pilot.pause()
        assert not app.screen.query_one("#launch", Button).disabled  # there it may be a file

    async def to_elsewhere_here(pilot: Pilot[Any]) -> None:
        app.screen.query_one("#what", Choice).value = "clone to"
        app.screen.query_one("#to", Input).value = "ssh://far"
        await pilot.pause()

    drive(app, act)


def test_the_sentence_has_pre_copy() -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L")
        first = "Its memory is copied in rounds first, while it runs. Then process 4711"
        assert first in words(app)
        app.screen.query_one("#precopy", Choice).value = "off"
        await pilot.pause()
        assert "rounds" not in words(app)
        assert "are captured" in words(app)
        app.screen.query_one("#precopy", Choice).value = "auto"
        app.screen.query_one("#what", Choice).value = "move to"
        app.screen.query_one("#to", Input).value = "unix:/run/there"
        await pilot.pause()
        assert f"{first} (redis-server) stops, goes on at unix:/run/there" in words(app)

    drive(app, act)


def test_the_whole_form_is_within_reach_of_a_small_terminal() -> None:
    """More fields than lines: the one that has the focus is always seen, and so are the sentence and the buttons."""
    stage, app = staged()
    stage.in_the_way[4711] = [Obstacle("children", "process 9", "only the process is copied", "Accept", asks=True)]

    async def act(pilot: Pilot[Any]) -> None:
        await to_elsewhere(pilot, "ssh://far")
        seen = set()
        app.screen.query_one("#what").focus()
        while not app.screen.query_one("#launch").has_focus:
            await pilot.pause()
            focused = app.focused
            assert focused is not None
            assert app.screen.find_widget(focused).visible_region.area, focused.id
            seen.add(focused.id)
            assert "Launch" in screen_text(app)
            await pilot.press("down")
        assert {"to", "streams", "bandwidth", "compress", "command", "ports", "stdio", "step", "accept"} <= seen

    drive(app, act)


def test_the_help_names_what_can_be_chosen() -> None:
    _, app = staged()

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("L", "question_mark")
        text = " ".join(str(Launch.about).split())
        for word in ("clone here", "snapshot", "clone to", "move to", "Pre-copy:", "Guard:", "Stdio:", "Bandwidth"):
            assert word in text
        assert "clone to and move to bring it" in words(app)

    drive(app, act)


def test_the_command_line_says_the_same_as_the_job(place: Path) -> None:
    policy = Policy(
        4 << 20,
        (Rule("heap", Treatment.EAGER, "policy.toml:3"), Rule("*/cache*", Treatment.PROTECTED, "key")),
        ((0x1000, 0x3000, Treatment.EAGER),),
    )
    options = Options(
        guard="on",
        precopy="3",
        track="async",
        verify=True,
        map_ports=(PortMap(1, 2), PortMap(3, 4)),
        pid_namespace="host",
        tcp="close",
        stdio="/tmp/out put",
        full=True,
        yes=True,
    )
    for verb, where in (("clone", ""), ("snapshot", str(place / "s n")), ("restore", str(place / "s n"))):
        line = arguments.command_of(Job(verb, 4711, where, policy, options))
        found = arguments.parse(line[1:])
        assert found.verb == verb
        again = arguments.options_of(found)
        assert (again.tcp, again.stdio, again.yes) == (options.tcp, options.stdio, True)
        if verb != "restore":
            made = arguments.policy_of(found)
            assert made.eager_below == policy.eager_below
            assert [(rule.match, rule.treatment) for rule in made.rules] == [
                ("1000-3000", Treatment.EAGER),
                ("heap", Treatment.EAGER),
                ("*/cache*", Treatment.PROTECTED),
            ]
            assert (again.guard, again.verify) == ("on", True)
            assert (again.precopy, again.track) == ("3", "async")
        if verb != "snapshot":
            assert (again.map_ports, again.pid_namespace, again.full) == (options.map_ports, "host", True)
        else:
            assert found.directory == place / "s n"


def test_the_command_line_of_a_job_to_elsewhere() -> None:
    far = Options(
        remote_command="/opt/a b", streams=3, compress="lz4", bandwidth=3 << 20, reconnect_s=5, on_loss="poison"
    )
    for options in (Options(), far):
        line = arguments.command_of(Job("clone", 4711, "ssh://host", options=options))
        assert arguments.options_of(arguments.parse(line[1:])) == options
    assert len(arguments.command_of(Job("clone", 4711, "local", options=Options()))) == 3
