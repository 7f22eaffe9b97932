"""Snapshot: what one holds, and running it again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Static

from tuimig.core.errors import TuimigError
from tuimig.core.manifest import Manifest
from tuimig.core.model import PAGE, Plan
from tuimig.core.policy import Policy
from tuimig.screens.page import Page, Target
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import cut, duration, plural, safe, short_size, size


class Snapshot(Page):
    """A directory: facts above, its regions below."""

    heading = "snapshot"
    about = """
A snapshot: one process as it was at T0. Above, what it is and when it was taken; below, its regions with what is stored
of each. R runs it again, as a new process beside whatever runs now. `tuimig verify` checks every byte of it,
`tuimig inspect` shows all of its state."""
    DEFAULT_CSS = """
    Snapshot #facts { height: auto; max-height: 8; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("R", "restore", "Restore", id="snapshot.restore")]

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._manifest: Manifest | None = None

    def body(self) -> Iterable[Widget]:
        yield Static(id="facts", markup=False)
        columns = [
            Column("START", 12, right=True),
            Column("SIZE", 5, right=True),
            Column("STORED", 6, right=True),
            Column("PERM", 4),
            Column("KIND", 11),
            Column("NAME", left_cut=True),
            Column("TREATMENT", 9),
            Column("RULE", 16, least=100),
        ]
        yield Table(columns, empty="reading ...", id="stored")

    def title_text(self) -> str:
        return f"snapshot  {self._directory}"

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self.ask(lambda: self.console_app.backend.inspect(self._directory), self._take, self._failed)

    def _failed(self, error: TuimigError) -> None:
        self.query_one(Table).empty = ""
        self.complain(error)

    def _take(self, manifest: Manifest) -> None:
        self._manifest = manifest
        process = manifest.process
        stored = sum(region.pages for region in manifest.regions) * PAGE
        text = Text()
        for name, value in (
            ("command", cut(safe(" ".join(process.cmdline) or process.comm), max(20, self.size.width - 14))),
            ("taken", f"{manifest.created} on Linux {manifest.host.kernel}, frozen {duration(manifest.frozen_us)}"),
            ("process", f"{process.host_pid}, {plural(len(manifest.threads), 'thread')}"),
            ("content", f"{size(stored)} in {plural(len(manifest.regions), 'region')}"),
            ("state", ", ".join(name for name in manifest.state)),
        ):
            text.append(f"{name:>8}  ", "bold").append(f"{value}\n")
        text.rstrip()
        self.query_one("#facts", Static).update(text)
        self.query_one(Table).show([region.start for region in manifest.regions], self._row)

    def _row(self, index: int) -> Row:
        assert self._manifest is not None
        region = self._manifest.regions[index]
        return (
            f"{region.start:x}",
            short_size(region.size),
            short_size(region.pages * PAGE) if region.slot is not None else "",
            region.perms,
            region.kind,
            safe(region.path or "anon"),
            Cell(region.treatment, "dim" if region.treatment == "none" else "plain"),
            Cell(region.rule, "dim"),
        )

    def action_restore(self) -> None:
        from tuimig.screens.launch import Launch

        if self._manifest is None:
            return
        if self.console_app.settings.read_only:
            self.say("Read-only: nothing is launched")
            return
        if self.console_app.running is not None:
            self.say(f"{self.console_app.busy(self.console_app.running)}: m shows it")
            return
        process = self._manifest.process
        target = Target(process.host_pid, 0, safe(" ".join(process.cmdline) or process.comm))
        ports = self.console_app.backend.stored_ports(self._manifest)
        self.app.push_screen(Launch(target, Policy(), Plan(()), restore=str(self._directory), ports=ports))
