"""Summary: the report in words and figures, and what to do with the result."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from tuimig.arguments import command_of
from tuimig.core.errors import TuimigError
from tuimig.core.model import Report
from tuimig.output import document
from tuimig.run import Run
from tuimig.screens.confirm import Ask, Confirm
from tuimig.screens.page import Page
from tuimig.words import count, duration, plural, rounds, safe, size, streams

BAR = 30


class Summary(Page):
    """Of a run that succeeded."""

    heading = "summary"
    about = """
What the migration did and what it cost. Frozen is the time for which no thread of the process ran, by its parts; the
hottest regions and threads are those that waited for faults most often. y copies the command line that does the same
without the console, j writes the report as JSON, R keeps a recording of the run,
r runs it again, k ends the copy."""
    DEFAULT_CSS = """
    Summary VerticalScroll { height: 1fr; padding: 0 1; scrollbar-size: 1 1; }
    Summary Static { height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", show=False, id="summary.open"),
        Binding("y", "copy", "Copy command", id="summary.copy"),
        Binding("j", "json", "JSON", id="summary.json"),
        Binding("r", "again", "Run again", id="summary.again"),
        Binding("R", "record", "Record", id="summary.record"),
        Binding("k", "end", "End the copy", id="summary.end"),
        Binding("o", "open", "Open snapshot", id="summary.inspect"),
        Binding("down", "scroll(1)", "Down", show=False, id="summary.down"),
        Binding("up", "scroll(-1)", "Up", show=False, id="summary.up"),
    ]

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        report = self.run_shown.report
        if action == "record":
            return self.run_shown.tape is not None
        if report is None:
            return True
        if self.run_shown.recorded and action in ("end", "open", "again"):
            return False  # what it names may be another's by now
        if action == "end":
            return report.new_pid is not None and report.destination is None  # elsewhere it is not ours to end
        if action == "open":
            return report.directory is not None
        return not (action == "again" and self.console_app.settings.read_only)

    def body(self) -> Iterable[Widget]:
        yield VerticalScroll(Static(self.text(), markup=False), can_focus=True)

    def title_text(self) -> str:
        return f"summary  {self.run_shown.job.verb} of {self.run_shown.job.pid}"

    def text(self) -> Text:
        report = self.run_shown.report
        assert report is not None
        text = Text()
        for name, value in (*result_lines(report, self.run_shown), *figure_lines(report)):
            text.append(f"{name:>16}  ", "bold").append(f"{value}\n")
        if report.frozen:
            text.append("\n      frozen, by its parts\n", "bold")
            text.append(parts(report))
        text.append(hottest(self.run_shown))
        for warning in report.warnings:
            text.append(f"\nnote: {safe(warning)}")
        return text

    # ------------------------------------------------------------ keys

    def action_scroll(self, by: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)

    def action_copy(self) -> None:
        line = shlex.join(command_of(self.run_shown.job))
        self.app.copy_to_clipboard(line)
        self.say(f"Copied: {line}")

    def action_json(self) -> None:
        report = self.run_shown.report

        def write(name: str | None) -> None:
            if name:
                out = io.StringIO()
                document(report, out)
                self.ask(
                    lambda: self.console_app.backend.save_report(Path(name), out.getvalue()),
                    lambda _: self.say(f"The report is in {name}"),
                )

        job = self.run_shown.job
        self.app.push_screen(Ask("Write the report as JSON to:", f"{job.verb}-{job.pid}.json"), write)

    def action_record(self) -> None:
        self.console_app.record(self.run_shown)

    def action_again(self) -> None:
        try:
            self.console_app.launch(self.run_shown.job)
        except TuimigError as error:
            self.complain(error)

    def action_end(self) -> None:
        report = self.run_shown.report
        assert report is not None
        if self.run_shown.copy_ended:
            self.say("The copy has ended")
            return

        def decide(answer: str | None) -> None:
            if answer == "end":
                self.run_shown.copy_ended = True
                if self.console_app.backend.end_copy(report):
                    source = "" if report.verb == "restore" else f"; process {report.pid} runs on"
                    self.say(f"The copy, process {report.new_pid}, has been ended{source}")
                else:
                    self.say(f"The copy, process {report.new_pid}, had ended already")

        question = f"End the copy, process {report.new_pid} ({safe(self.run_shown.command)})?"
        question += "" if report.verb == "restore" else " Its source is not touched."
        self.app.push_screen(Confirm(question, [("keep", "Keep it"), ("end", "End the copy")]), decide)

    def action_open(self) -> None:
        report = self.run_shown.report
        if report is not None and report.directory is not None:
            self.console_app.open_snapshot(report.directory)


def result_lines(report: Report, run: Run) -> list[tuple[str, str]]:
    """Where the result is."""
    lines = []
    if report.directory is not None:
        lines.append(("snapshot", report.directory))
    if report.new_pid is not None:
        inside = f", {report.inner_pid} in its PID namespace" if report.inner_pid not in (None, report.new_pid) else ""
        there = f" at {report.destination}" if report.destination is not None else ""
        lines.append(("the copy", f"process {report.new_pid}{there}{inside}"))
        if run.job.options.map_ports:
            lines.append(("its ports", ", ".join(f"{m.new} for {m.old}" for m in run.job.options.map_ports)))
    source = {"restore": "not touched", "move": f"process {report.pid} has ended; the copy goes on in its place"}
    lines.append(("the source", source.get(report.verb, f"process {report.pid} runs on")))
    return lines


def figure_lines(report: Report) -> list[tuple[str, str]]:
    lines = []
    if report.frozen_us is not None:
        lines.append(("frozen", duration(report.frozen_us)))
    if report.downtime_us is not None:
        since = "running after" if report.verb == "restore" else "T0 to running"
        lines.append((since, duration(report.downtime_us)))
    if report.fill_us is not None:
        lines.append(("filled after", duration(report.fill_us)))
    lines.append(("in all", duration(report.total_us)))
    lines.append(("content", f"{size(report.bytes)} in {plural(report.regions, 'region')}"))
    if report.frozen_us is not None:
        lines.append(("eager, protected", f"{size(report.eager_bytes)}, {size(report.protected_bytes)} mapped"))
        lines.append(("pages", f"{count(report.swept_pages)} swept, {count(report.zero_pages)} zero"))
        again = f", {report.attempts} attempts" if report.attempts > 1 else ""
        lines.append(("guard", f"{report.guard}, {count(report.guard_stops)} stops{again}"))
    if report.precopy is not None:
        lines.append(("pre-copy", rounds(report.precopy)))
    lines.append(("faults", f"{count(report.wp_faults)} on write, {count(report.demand_faults)} on demand"))
    if report.wp_faults or report.demand_faults:
        times = report.fault_us
        lines.append(("fault service", f"p50 {times.p50:g} us, p99 {times.p99:g} us, most {times.max:g} us"))
    if report.destination is not None:
        early = f", {size(report.precopy_sent)} of it before T0" if report.precopy_sent else ""
        lines.append(("sent", f"{size(report.bytes_sent or 0)} over {streams(report.stream_bytes)}{early}"))
        if report.round_trip_us is not None and report.round_trip_us.max:
            trip = report.round_trip_us
            lines.append(("round trips", f"p50 {trip.p50:g} us, p99 {trip.p99:g} us, most {trip.max:g} us"))
        if report.reconnects:
            lines.append(("connection", f"lost and made again {plural(report.reconnects, 'time')}"))
    if report.verified_pages is not None:
        lines.append(("verified", f"{count(report.verified_pages)} pages are those of T0"))
    if report.faults_dropped:
        lines.append(("not logged", f"{plural(report.faults_dropped, 'fault')} (served, but the log was full)"))
    return lines


def parts(report: Report) -> Text:
    """The frozen time split by its parts, with bars."""
    text = Text()
    most = max(report.frozen.values(), default=0) or 1
    for name, value in sorted(report.frozen.items(), key=lambda part: -part[1]):
        bar = "█" * max(1, round(value / most * BAR))
        text.append(f"{name:>16}  ").append(f"{duration(value):>8}  ").append(f"{bar}\n", "cyan")
    return text


def hottest(run: Run) -> Text:
    """Regions and threads that waited for faults most often."""
    text = Text()
    regions = sorted((r for r in run.regions() if r.faults), key=lambda r: -r.faults)[:3]
    if regions:
        text.append("\n      hottest regions\n", "bold")
        for region in regions:
            text.append(f"{region.start:>16x}  {count(region.faults):>8} faults  {safe(region.name)}\n")
    threads = run.by_thread.most_common(3)
    if threads:
        text.append("\n      hottest threads\n", "bold")
        for tid, number in threads:
            text.append(f"{tid:>16}  {plural(number, 'fault'):>15}\n")
    return text
