"""The console: settings, screens, keys that hold everywhere, signals, and the one migration that may run.

The engine works in a process of its own (core/client.py); nothing here is on its way. Screens get at the core through
`backend` only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import ClassVar, Final

from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.filter import LineFilter
from textual.geometry import Size
from textual.screen import Screen

from tuimig.backend import Backend
from tuimig.core.errors import TuimigError
from tuimig.core.jobs import Job
from tuimig.core.model import Plan
from tuimig.core.policy import Policy
from tuimig.core.recording import Recording
from tuimig.leaving import Force
from tuimig.plain import Ascii
from tuimig.run import Run
from tuimig.screens.check import Check
from tuimig.screens.confirm import Ask, Confirm
from tuimig.screens.help import Help
from tuimig.screens.page import Page, Target
from tuimig.screens.processes import Processes
from tuimig.screens.regions import Regions
from tuimig.screens.small import TooSmall
from tuimig.settings import Settings
from tuimig.typeahead import TypeAhead
from tuimig.words import safe

log = logging.getLogger("tuimig.console")
POLL_S: Final = 0.1  # of a running migration; what is drawn has rates of its own
LEAST: Final = (80, 24)


class Console(TypeAhead):
    """`pid`: open its regions at once. `threads` False: answers come at once, for pictures."""

    TITLE = "tuimig"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012  as Textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f1", "help", "Help", key_display="?", id="app.help"),
        Binding("c", "check", "Check", id="app.check"),
        Binding("E", "explain", "Explain", show=False, id="app.explain"),
        Binding("m", "migration", "Migration", show=False, id="app.migration"),
        Binding("q", "leave", "Quit", id="app.quit"),
        Binding("ctrl+q,ctrl+c", "leave", "Quit", show=False, priority=True, id="app.quit-anywhere"),
    ]

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        pid: int | None = None,
        *,
        recording: Recording | None = None,
        threads: bool = True,
    ) -> None:
        self._ascii = Ascii() if settings.ascii else None
        self._force = Force()  # here: the terminal is still as the shell left it
        super().__init__()
        self.backend = backend
        self.settings = settings
        self.threads = threads
        self.run_now: Run | None = None
        self.forms: dict[object, dict[str, str]] = {}  # what was left half filled in, by process or snapshot
        self._pid = pid
        self._recording = recording

    # ------------------------------------------------------------ beginning and end

    def on_mount(self) -> None:
        self.theme = self.settings.theme
        if self.settings.keys:
            self.set_keymap(dict(self.settings.keys))
        self.push_screen(Processes())
        if self._recording is not None:
            from tuimig.screens.replay import Replay

            self.push_screen(Replay(self._recording))
        self.call_after_refresh(lambda: self._fit(self.size))
        if self._pid is not None:
            self.call_after_refresh(self._open_pid, self._pid)
        self.set_interval(POLL_S, self._poll)
        if self.threads:
            self._leave_on_signals(asyncio.get_running_loop())

    def _open_pid(self, pid: int) -> None:
        try:
            line = next(line for line in self.backend.processes() if line.pid == pid)
        except StopIteration:
            self.page.complain(TuimigError("no such process", subject=f"process {pid}", cure="Pick one from the list"))
        except TuimigError as error:
            self.page.complain(error)
        else:
            self.open_regions(Target(line.pid, line.ticks, safe(line.command)))

    def _leave_on_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """The terminal, or somebody, ends us: what runs is cancelled by the session's end of our socket.

        Handlers of the loop would wait for it, and it may itself wait for a terminal that takes nothing any more.
        """

        def handle(number: int, _: FrameType | None) -> None:
            self._force.leave_soon(number)
            loop.call_soon_threadsafe(self.exit, 128 + number)

        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, handle)

    def on_unmount(self) -> None:
        if self.run_now is not None:
            self.run_now.feed.close()

    def _handle_exception(self, error: Exception) -> None:
        """A mistake of ours: the log gets its traceback, the person one sentence."""
        if not self.is_headless:
            log.critical("internal error", exc_info=error)
            self.exit(1, message=f"tuimig: internal error: {type(error).__name__}: {error}. The log has more")
            return
        super()._handle_exception(error)

    def background(self, work: Callable[[], None]) -> None:
        """On a thread that holds up nobody's exit."""
        if self.threads:
            threading.Thread(target=work, daemon=True, name="tuimig-ask").start()
        else:
            work()

    # ------------------------------------------------------------ where one is

    @property
    def page(self) -> Page:
        """The topmost screen that is a page."""
        return next(screen for screen in reversed(self.screen_stack) if isinstance(screen, Page))

    @property
    def running(self) -> Run | None:
        """The migration that goes on."""
        return self.run_now if self.run_now is not None and not self.run_now.over else None

    def busy(self, run: Run) -> str:
        return f"A {run.job.verb} of process {run.job.pid} runs"

    def title_right(self) -> str:
        run = self.running
        if run is not None and run is not getattr(self.screen, "run_shown", None):
            return f"{run.job.verb} of {run.job.pid} runs (m)"
        return ("read-only  " if self.settings.read_only else "") + self.backend.host

    def get_line_filters(self) -> list[LineFilter]:
        filters = list(super().get_line_filters())
        return [*filters, self._ascii] if self._ascii else filters

    def on_resize(self, event: Resize) -> None:
        self._fit(event.size)

    def _fit(self, size: Size) -> None:
        """One line instead of everything where there is too little room."""
        small = size.width < LEAST[0] or size.height < LEAST[1]
        shown = any(isinstance(screen, TooSmall) for screen in self.screen_stack)
        if small and not shown and any(isinstance(screen, Page) for screen in self.screen_stack):
            self.push_screen(TooSmall())
        while not small and any(isinstance(screen, TooSmall) for screen in self.screen_stack):
            self.pop_screen()  # what asked something over it asks again

    # ------------------------------------------------------------ from screen to screen

    def open_regions(self, target: Target) -> None:
        self.push_screen(Regions(target))

    def open_launch(self, target: Target, policy: Policy, plan: Plan) -> None:
        from tuimig.screens.launch import Launch

        if self.settings.read_only:
            self.page.say("Read-only: nothing is launched")
        elif self.running is not None:
            self.page.say(f"{self.busy(self.running)}: m shows it")
        else:
            self.push_screen(Launch(target, policy, plan))

    def open_snapshot(self, directory: str = "") -> None:
        """Ask which one, then show it."""
        from tuimig.screens.snapshot import Snapshot

        def show(name: str | None) -> None:
            if name:
                self.push_screen(Snapshot(Path(name)))

        if directory:
            show(directory)
        else:
            self.push_screen(Ask("Open the snapshot in:", ""), show)

    def launch(self, job: Job) -> None:
        """Start it and show it. Raises TuimigError where it cannot be started."""
        from tuimig.screens.migration import Migration

        if self.running is not None:
            raise TuimigError(self.busy(self.running), cure="m shows it")
        self.run_now = Run(job, self.backend.start(job))
        while len(self.screen_stack) > 2 and not isinstance(self.screen, Regions):
            self.pop_screen()
        self.push_screen(Migration(self.run_now))

    def record(self, run: Run) -> None:
        """Ask for a file; it is written when the run is over, so that it is whole."""

        def keep(name: str | None) -> None:
            if name and run.over:
                self.save_tape(run, Path(name))
            elif name:
                run.record_to = Path(name)
                self.page.say(f"The recording is written to {name} at the end")

        proposed = f"{run.job.verb}-{run.job.pid}.rec"
        self.push_screen(Ask("Keep a recording, for `tuimig replay`, in:", proposed), keep)

    def save_tape(self, run: Run, file: Path) -> None:
        page, tape = self.page, run.tape
        if tape is not None:
            page.ask(lambda: self.backend.save_tape(file, tape), lambda _: page.say(f"The recording is in {file}"))

    def _poll(self) -> None:
        self._fit(self.size)  # a size that came before there was a screen
        run = self.running
        if run is None:
            return
        if run.poll() and run.over:
            run.feed.close()
            if run.report is not None:
                self.backend.learn(run.report)
                self.backend.adopt(run.report)
            if run.record_to is not None:
                self.save_tape(run, run.record_to)
            self.page.retitle()

    # ------------------------------------------------------------ keys

    def action_help(self) -> None:
        if not isinstance(self.screen, Help):
            self.push_screen(Help(self.screen))

    def action_explain(self) -> None:
        from tuimig.screens.explain import Explain

        run = getattr(self.page, "run_shown", None) or self.run_now
        self.push_screen(Explain(run))

    def action_check(self) -> None:
        if not isinstance(self.screen, Check):
            self.push_screen(Check(self.page.process()))

    def action_migration(self) -> None:
        from tuimig.screens.migration import Migration

        if self.run_now is None:
            self.page.say("No migration runs")
            return
        shown = [s for s in self.screen_stack if isinstance(s, Migration) and s.run_shown is self.run_now]
        if not shown:
            self.push_screen(Migration(self.run_now))
        while shown and self.screen is not shown[0]:
            self.pop_screen()

    async def action_quit(self) -> None:
        self.action_leave()

    def action_leave(self) -> None:
        run = self.running
        if run is None:
            self.exit(0)
            return
        if isinstance(self.screen, Confirm):
            return
        report = self.report_file(run)
        words = f"A {run.job.verb} of process {run.job.pid} is running. In the background its report would go to"

        def decide(answer: str | None) -> None:
            if run.over and answer != "stay":  # while the question stood there
                self.exit(0)
            elif answer == "cancel":
                run.cancel()
                self.exit(0)
            elif answer == "background" and run.feed.to_background(report):
                self.exit(0, message=f"The {run.job.verb} goes on. Its report: {report}")
            elif answer == "background":
                self.page.complain(TuimigError(f"the {run.job.verb} cannot be left alone", cure="It goes on here"))

        choices = [("stay", "Stay"), ("cancel", "Cancel it and quit"), ("background", "Quit, let it finish")]
        if run.handed_over:
            choices = [choice for choice in choices if choice[0] != "cancel"]
        self.push_screen(Confirm(f"{words}\n{report}", choices), decide)

    def report_file(self, run: Run) -> Path:
        from tuimig.settings import state_directory

        return state_directory() / "reports" / f"{run.job.verb}-{run.job.pid}-{time.strftime('%Y%m%d-%H%M%S')}.json"

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        from tuimig.palette import commands

        yield SystemCommand("Theme", "light, dark and others", self.action_change_theme)
        yield from commands(self)
