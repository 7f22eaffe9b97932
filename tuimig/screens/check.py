"""Check: what this host and this process lack for a migration, and the cure for each no."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Static

from tuimig.core.errors import Obstacle
from tuimig.core.host import Probe
from tuimig.core.model import Options
from tuimig.screens.page import Page, Target
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import safe


@dataclass(frozen=True, slots=True)
class Line:
    """One finding: a feature of the host, or something in the process."""

    verdict: str  # yes | no | asks
    of: str  # host | process
    name: str
    found: str
    cure: str


class Check(Page):
    """Shown by itself where something blocks a launch; `blocking` are the obstacles that did."""

    heading = "check"
    about = """
What this host offers and, with a process chosen, what in that process stands in the way. "no" blocks a migration,
"asks" needs your consent (in Launch), "yes" is fine. Below the table: what was found, and what you can do about it.
Nothing is stopped or changed by looking."""
    DEFAULT_CSS = """
    Check #detail { height: 5; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "again", "Look again", id="check.again"),
        Binding("a", "all", "All lines", id="check.all"),
    ]

    def __init__(self, target: Target | None = None, blocking: Iterable[Obstacle] = ()) -> None:
        super().__init__()
        self.target = target
        self._blocking = list(blocking)
        self._probes: list[Probe] = []
        self._obstacles: list[Obstacle] = []
        self._lines: list[Line] = []
        self._all = not self._blocking

    def body(self) -> Iterable[Widget]:
        columns = [
            Column("", 4),
            Column("OF", 7),
            Column("WHAT", 20),
            Column("FOUND"),
        ]
        yield Table(columns, empty="looking ...", id="findings")
        yield Static(id="detail", markup=False)

    def title_text(self) -> str:
        return f"check  {self.target.pid} {self.target.name}" if self.target else "check  this host"

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self.action_again()

    def action_again(self) -> None:
        self.ask(self.console_app.backend.probes, self._take_probes)
        if self.target is not None:
            pid = self.target.pid
            # The widest sight: what the defaults refuse is said, with the option that allows it.
            options = Options(started=self.target.ticks)
            self.ask(lambda: self.console_app.backend.obstacles(pid, options), self._take_obstacles)

    def action_all(self) -> None:
        self._all = not self._all
        self._show()

    def _take_probes(self, probes: list[Probe]) -> None:
        self._probes = probes
        self._show()

    def _take_obstacles(self, obstacles: list[Obstacle]) -> None:
        self._obstacles = obstacles
        self._show()
        if self.target and not obstacles:
            later = " any more; what is shown stopped the last launch" if self._blocking else ""
            self.say(f"Nothing in process {self.target.pid} stands in the way{later}")

    def _show(self) -> None:
        known = {(o.name, o.where) for o in self._obstacles}
        obstacles = self._obstacles + [o for o in self._blocking if (o.name, o.where) not in known]
        lines = [
            Line("asks" if o.asks else "no", "process", o.name, safe(f"{o.where}: {o.why}"), safe(o.cure))
            for o in obstacles
        ] + [
            Line("yes" if p.ok else "no", "host", p.name, p.detail or p.needed_for, "" if p.ok else p.cure)
            for p in sorted(self._probes, key=lambda probe: probe.ok)
        ]
        self._lines = [line for line in lines if self._all or line.verdict != "yes"]
        self.query_one(Table).show([(line.of, line.name, line.found) for line in self._lines], self._row, sticky=False)
        self._detail()

    def _row(self, index: int) -> Row:
        line = self._lines[index]
        kind = {"yes": "good", "no": "bad", "asks": "warn"}[line.verdict]
        return (Cell(line.verdict, kind), line.of, line.name, Cell(line.found, "dim" if kind == "good" else "plain"))

    def on_table_moved(self) -> None:
        self._detail()

    def _detail(self) -> None:
        at = self.query_one(Table).cursor
        text = Text()
        if at < len(self._lines):
            line = self._lines[at]
            text.append(f"{line.name}: {line.found}")
            if line.cure:
                text.append("\nWhat to do: ", "bold").append(line.cure)
        self.query_one("#detail", Static).update(text)
