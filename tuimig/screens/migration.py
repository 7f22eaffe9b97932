"""Migration: the phases, the strip filling, the faults as they are served."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Digits, Label

from tuimig.core.errors import Cancelled, TuimigError, Unsupported
from tuimig.core.model import Fault, Histogram
from tuimig.core.strip import used
from tuimig.run import RegionProgress, Run
from tuimig.screens.check import Check
from tuimig.screens.confirm import Confirm
from tuimig.screens.page import Page, Target
from tuimig.screens.processes import matcher
from tuimig.widgets.fault_log import KIND_NAMES, FaultTable
from tuimig.widgets.lines import FilterLine
from tuimig.widgets.meters import Bar, LineWidget, PhaseBar, histogram_line, spark
from tuimig.widgets.region_map import MapCell, RegionMap
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import count, cut, duration, plural, safe, seconds, size

NAMES_S = 5.0  # between two readings of the threads' names
BAR = 10  # columns of a region's bar


class Migration(Page):
    """Draws a Run, at the settings' rate; the run goes on whether it is drawn or not."""

    heading = "migration"
    about = """
One migration. Above, its phases with their times, and the address space: each column fills as its pages are captured
or arrive; f marks where a fault was served, z pages that are zero. The big figure is the frozen time, what the process
lost. The table has each fault: the thread waited for `us` microseconds until its page was saved (write) or fetched
(demand). p pauses the tables, never the work; x cancels, and the source runs on as before.
R keeps a recording, to be played again with `tuimig replay`."""
    DEFAULT_CSS = """
    Migration #panel { height: 3; }
    Migration Digits { width: 14; height: 3; padding: 0 1; }
    Migration #unit { width: 8; height: 3; color: $text-muted; }
    Migration #figures { width: 1fr; height: 3; }
    Migration #rates { height: 4; padding: 0 1; background: $surface; }
    Migration #tables { height: 1fr; }
    Migration #tables Table { width: 1fr; }
    Migration #by-region { display: none; }
    Migration.-by-region #faults { display: none; }
    Migration.-by-region #by-region { display: block; }
    Migration.-wide #faults, Migration.-wide #by-region { display: block; }
    Migration.-wide #by-region { width: 56; margin-left: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "go", "Next step", id="migration.go"),
        Binding("n", "reconnect", "Reconnect", id="migration.reconnect"),
        Binding("x", "cancel", "Cancel", id="migration.cancel"),
        Binding("p", "pause", "Pause", id="migration.pause"),
        Binding("b", "by_region", "By region", id="migration.regions"),
        Binding("f", "follow", "Follow", show=False, id="migration.follow"),
        Binding("slash", "filter", "Filter", id="migration.filter"),
        Binding("s", "summary", "Summary", id="migration.summary"),
        Binding("R", "record", "Record", show=False, id="migration.record"),
        Binding("enter", "summary", "Summary", show=False, id="migration.summary-too"),
    ]

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self._version = -1
        self._draws = 0
        self._told = run.over
        self._noted = 0
        self._lost = False
        self._regions: list[RegionProgress] = []
        self._wanted: Callable[[str], bool] = lambda _: True

    def process(self) -> Target | None:
        job = self.run_shown.job
        return Target(job.pid, job.options.started, safe(self.run_shown.command)) if job.options.started else None

    def body(self) -> Iterable[Widget]:
        yield PhaseBar(id="phases")
        yield RegionMap(id="map")
        yield Bar(id="bar")
        yield Horizontal(Digits("", id="frozen"), Label("", id="unit"), LineWidget(id="figures"), id="panel")
        yield LineWidget(id="rates")
        regions = [
            Column("START", 12, right=True),
            Column("NAME", left_cut=True),
            Column("DONE", BAR),
            Column("%", 4, right=True),
            Column("PAGES", 8, right=True),
            Column("FAULTS", 7, right=True),
        ]
        by_region = Table(regions, empty="no region that is captured after T0", id="by-region")
        yield Horizontal(FaultTable(id="faults"), by_region, id="tables")
        yield FilterLine("thread, name, region, kind; regex; ! inverts")

    def title_text(self) -> str:
        run = self.run_shown
        failed = "cancelled" if isinstance(run.error, Cancelled) else "failed"
        state = "done" if run.report else failed if run.error else "cancelling" if run.cancelled else "running"
        state += self.attempt_words()
        name = safe(run.command).split(" ", 1)[0].rsplit("/", 1)[-1]
        return f"{run.job.verb} of {run.job.pid} {name}  {state}"

    def attempt_words(self) -> str:
        return f", attempt {self.run_shown.attempts}" if self.run_shown.attempts > 1 else ""

    def on_mount(self) -> None:
        table = self.query_one(FaultTable)
        table.region_name = self.run_shown.region_name
        table.focus()
        self._read_names()
        self.set_interval(1 / self.console_app.settings.tables_hz, self._tick)
        self.set_interval(NAMES_S, self._read_names)
        self.call_after_refresh(self._draw)

    def _read_names(self) -> None:
        run = self.run_shown
        if run.over or not self.is_active or run.job.verb == "restore":
            return
        pid = run.job.pid
        self.ask(lambda: self.console_app.backend.threads(pid), self._take_names, lambda _: None)

    def _take_names(self, names: dict[int, str]) -> None:
        self.query_one(FaultTable).names = names

    def _tick(self) -> None:
        if self.is_active and (self.run_shown.version != self._version or not self.run_shown.over):
            self._draw()

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self._draw)

    def on_resize(self) -> None:
        """What was drawn fits another width; of a run that is over nothing else draws it again."""
        if self.is_active:
            self.call_after_refresh(self._draw)

    # ------------------------------------------------------------ drawing

    def _draw(self) -> None:
        run = self.run_shown
        if not self.query(PhaseBar):  # not mounted yet, or left already
            return
        self._version = run.version
        self.retitle()
        if (run.lost is not None) != self._lost:
            self._lost = not self._lost
            self.refresh_bindings()
        self._draw_phases()
        self.query_one(RegionMap).show(cells_of(run))
        self._draw_bar()
        self._draw_figures()
        self._draw_rates()
        self._draws += 1
        if run.over or self._draws % self.console_app.settings.table_every == 0:
            self._draw_tables()
        if run.over and not self._told:
            self._told = True
            self.refresh_bindings()
            if run.error is not None:
                self._failed(run.error)
                self.call_after_refresh(self._draw_tables)  # the message takes some of their lines
            elif self.is_active:
                self.action_summary()
        elif line := run.lost:
            left = f"; given up in {line.left_s:.0f} s" if line.left_s else ""
            lost = f"The connection to {line.destination} is lost: {line.text}{left}"
            self.say(f"{lost}. It is tried again; n: at once")
        elif run.waiting and not run.over:
            source = "" if run.job.verb == "restore" else "; the source runs"
            self.say(f"Stopped before {run.waiting}{source}. Space goes on, E explains")
        elif len(run.notes) > self._noted and not run.over:
            self._noted = len(run.notes)
            self.say(run.notes[-1])

    def _failed(self, error: TuimigError) -> None:
        """What is in the way is shown whole, with its cures."""
        self.complain(error)
        target = self.process()
        if isinstance(error, Unsupported) and error.obstacles and target is not None and self.is_active:
            self.app.push_screen(Check(target, error.obstacles))

    def _draw_phases(self) -> None:
        run = self.run_shown
        latest = {stage.name: stage for stage in run.stages}
        shown = []
        for name in run.phases:
            stage = latest.get(name)
            if stage is None:
                shown.append((name, "next", ""))
            elif stage.took_ns is None:
                shown.append((name, "now", duration((run.now_ns() - stage.since_ns) // 1000)))
            else:
                shown.append((name, "done", duration(stage.took_ns // 1000)))
        self.query_one(PhaseBar).show_phases(shown)

    def _draw_bar(self) -> None:
        run = self.run_shown
        done, total = run.totals()
        part = done / total if total else 1.0 if run.report else 0.0
        words = f"{int(part * 100):3d}%  {size(done * 4096)} of {size(total * 4096)}"
        if not run.over:
            left = run.seconds_left()
            words += f"  {size(run.byte_rate.now)}/s" + (f"  {seconds(left)} left" if left is not None else "")
        self.query_one(Bar).show_bar(part, words)

    def _draw_figures(self) -> None:
        run, progress = self.run_shown, self.run_shown.progress
        digits, unit = self.query_one("#frozen", Digits), self.query_one("#unit", Label)
        if run.frozen is not None:
            value, name = duration(run.frozen.frozen_us).split(" ")
            if digits.value != value:
                digits.update(value)
                unit.update(f"\n{name}\nfrozen")
        elif digits.value:
            digits.update("")
            unit.update("")
        missed = progress.faults_dropped + run.faults.missed
        self.query_one("#figures", LineWidget).show(
            [
                figures(("write faults", count(progress.wp_faults)), ("demand faults", count(progress.demand_faults))),
                figures(("swept pages", count(progress.swept_pages)), ("zero pages", count(progress.zero_pages))),
                figures(("guard stops", count(progress.guard_stops)), ("not logged", count(missed))),
            ]
        )

    def _draw_rates(self) -> None:
        run = self.run_shown
        widget = self.query_one("#rates", LineWidget)
        width = max(20, widget.size.width)
        half = (width - 4) // 2
        room = half - 24
        lines = [
            Text(
                f"faults/s {count(int(run.fault_rate.now)):>9} {spark(run.fault_rate.samples, room + 4)}    "
                f"bytes/s {size(run.byte_rate.now):>9} {spark(run.byte_rate.samples, room + 4)}",
                no_wrap=True,
                end="",
            )
        ]
        histogram = self._histogram()
        bars, axis = histogram_line(histogram, width - 39)
        times = histogram.times
        if histogram.count:
            words = f"fault p50 {duration(times.p50)}  p99 {duration(times.p99)}"
            lines += [
                Text(f"{cut(words, 34).ljust(35)}{bars}", no_wrap=True, end=""),
                Text(
                    f"{f'latency most {duration(times.max)}'.ljust(35)}{axis}{' us' if axis else ''}",
                    no_wrap=True,
                    end="",
                ),
            ]
        else:
            lines += [Text(text, no_wrap=True, end="") for text in self._round_lines(width)]
        hottest = run.by_thread.most_common(3)
        names = self.query_one(FaultTable).names
        threads = "  ".join(f"{tid} {safe(names.get(tid, ''))} {count(n)}".replace("  ", " ") for tid, n in hottest)
        last = self._other_side() if run.job.remote else f"hottest  {threads}" if threads else ""
        lines.append(Text(cut(last, width), no_wrap=True, end=""))
        widget.show(lines)

    def _other_side(self) -> str:
        """The destination: what has arrived, how long a demand takes there and back, where a move stands."""
        run, there = self.run_shown, self.run_shown.remote
        said = []
        if run.handover is not None:
            said.append(f"source {run.handover.source}, destination {run.handover.destination}")
        elif run.connection is not None:
            said.append(run.connection.state)
        if there is not None:
            said.append(f"{there.phase} there: {count(there.arrived_pages)} pages arrived")
            if there.round_trip_us is not None and there.round_trip_us.max:
                times = there.round_trip_us
                said.append(f"demands p50 {duration(times.p50)} p99 {duration(times.p99)}")
        if len(run.progress.stream_bytes) > 1:
            demands, *pages = map(size, run.progress.stream_bytes)
            said.append(f"streams {'/'.join(pages)}, for demands {demands}")
        return "  ".join(said)

    def _round_lines(self, width: int) -> tuple[str, str]:
        """Pre-copy, where no fault has come: the dirty pages of each round."""
        rounds = self.run_shown.rounds
        if not rounds:
            return "fault latency: no fault yet", ""
        last = rounds[-1]
        dirty = "  ".join(count(r.dirty_pages) for r in rounds[-8:])
        rate = f"dirtied {size(last.dirty_per_second * 4096)}/s" if last.number else "the first round copies all"
        hot = f", {count(last.hot_pages)} hot pages left to the end" if last.hot_pages else ""
        return cut(f"pre-copy round {last.number + 1}: dirty pages {dirty}", width), cut(f"{rate}{hot}", width)

    def _histogram(self) -> Histogram:
        """Of the side whose faults come now."""
        details = self.run_shown.details
        side = "copy" if "copy" in details and details["copy"].histogram.count else "source"
        return details[side].histogram if side in details else Histogram()

    def _draw_tables(self) -> None:
        run, table = self.run_shown, self.query_one(FaultTable)
        if run.stages:
            table.since_ns = run.stages[0].since_ns
        if table.display:
            table.update_from(run.faults)
        if table.paused:
            return
        by_region = self.query_one("#by-region", Table)
        if by_region.display:
            self._regions = [r for r in run.regions() if self._wanted(f"{r.start:x} {r.name}")]
            by_region.show([region.start for region in self._regions], self._region_row)

    def _region_row(self, index: int) -> Row:
        region = self._regions[index]
        part = region.done / region.pages
        return (
            f"{region.start:x}",
            safe(region.name),
            Cell("█" * int(part * BAR) + "░" * (BAR - int(part * BAR)), "good"),
            f"{part:.0%}",
            count(region.pages),
            count(region.faults),
        )

    # ------------------------------------------------------------ keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "record":
            return self.run_shown.tape is not None
        if action == "reconnect":
            return self.run_shown.lost is not None
        if action in ("go", "cancel") and self.run_shown.over:
            return False
        return action != "go" or self.run_shown.job.step

    def action_record(self) -> None:
        self.console_app.record(self.run_shown)

    def action_reconnect(self) -> None:
        self.run_shown.feed.reconnect()
        self.say("Connecting again; from now on it has its whole time again")

    def action_go(self) -> None:
        self.run_shown.go()
        self.say("")

    def action_cancel(self) -> None:
        run = self.run_shown
        if run.over:
            self.say("It is over already")
            return
        if run.handed_over:
            self.say("It has been handed over: the copy is what runs now, and the move goes on to its end")
            return

        def decide(answer: str | None) -> None:
            if answer == "cancel" and not run.over:
                run.cancel()
                self.retitle()

        if run.job.verb == "restore":
            question = f"Cancel the restore of {run.job.place}? Nothing is left of it."
        else:
            question = (
                f"Cancel the {run.job.verb} of process {run.job.pid}? "
                f"The process runs on as before; nothing is left of the {run.job.verb}."
            )
        self.app.push_screen(Confirm(question, [("go-on", "Go on"), ("cancel", "Cancel it")]), decide)

    def action_pause(self) -> None:
        """The tables stand still; the work, the figures and the strip do not."""
        table = self.query_one(FaultTable)
        table.pause(self.run_shown.faults, not table.paused)
        self.say("The tables are paused; p lets them go on. The work goes on." if table.paused else "")

    def action_follow(self) -> None:
        self.query_one(FaultTable).action_follow()
        self.say("")

    def on_table_moved(self, event: Table.Moved) -> None:
        table = event.table
        if isinstance(table, FaultTable) and table.has_focus and table.follows and table.moved_away:
            table.stand(self.run_shown.faults)
            self.say(f"Standing still over the last {plural(len(table.keys), 'fault')}; f follows the newest again")

    def action_by_region(self) -> None:
        self.toggle_class("-by-region")
        self._shown_table().focus()
        self._draw_tables()

    def action_filter(self) -> None:
        self.query_one(FilterLine).open()

    def on_filter_line_changed(self, event: FilterLine.Changed) -> None:
        table, run = self.query_one(FaultTable), self.run_shown
        try:
            wanted = matcher(event.text)
        except re.error as error:
            self.wrong_filter(f"not a regular expression: {error}")
            return
        self.wrong_filter("")
        self._wanted = wanted

        def takes(fault: Fault) -> bool:
            name = table.names.get(fault.tid, "")
            return wanted(f"{fault.tid} {name} {fault.address:x} {KIND_NAMES[fault.kind]} {run.region_name(fault)}")

        table.wanted = takes if event.text else None
        table.again(run.faults)
        self._draw_tables()

    def on_filter_line_left(self) -> None:
        self._shown_table().focus()

    def _shown_table(self) -> Table:
        by_region = self.query_one("#by-region", Table)
        return by_region if by_region.display and self.has_class("-by-region") else self.query_one(FaultTable)

    def on_table_chosen(self) -> None:
        self.action_summary()

    def action_summary(self) -> None:
        run = self.run_shown
        if not run.over:
            self.say("The summary comes when it is done")
            return
        from tuimig.screens.failed import Failed
        from tuimig.screens.summary import Summary

        self.app.push_screen(Failed(run) if run.report is None else Summary(run))


def figures(*pairs: tuple[str, str]) -> Text:
    line = Text(no_wrap=True, end="")
    for name, value in pairs:
        line.append(f"{value:>9} ", "bold").append(f"{name:<15}")
    return line


def cells_of(run: Run) -> list[MapCell]:
    """The strip of a running migration: how far each cell is, on the side that works now."""
    side = "copy" if run.phase in ("fill", "done") and "copy" in run.details else "source"
    detail = run.details.get(side)
    cells = [MapCell()] * used(run.spans)
    if detail is None or not detail.cells:
        for span in run.spans:
            cells[span.cell] = MapCell("-", 0, "none")
        return cells
    for index, (total, done, zero) in enumerate(detail.cells[: len(cells)]):
        if total:
            cells[index] = cell_of(total, done, zero, index in run.fault_cells)
    return cells


def cell_of(total: int, done: int, zero: int, faulted: bool) -> MapCell:
    level = 8 if done >= total else done * 8 // total
    if faulted:
        return MapCell("f", level, "fault")
    if done and zero * 2 > done:
        return MapCell("z", level, "zero")
    if done >= total:
        return MapCell("s", level, "done")
    return MapCell("w" if not done else "+", level, "part" if done else "protected")
