"""The summary of a run that failed or was cancelled: why, how far it had come, and what became of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rich.table import Table
from rich.text import Text
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from tuimig.core.errors import Cancelled, HandOverFailed, TargetGone, Unsupported
from tuimig.run import Run
from tuimig.screens.summary import Summary, hottest
from tuimig.words import count, duration, plural, safe

NAMES: Final = 16  # columns of a fact's name, as in the summary of a success


class Failed(Summary):
    """Of a run without a report."""

    about = """
What the migration was stopped by, and what helps; how far it had come, with the time that each phase took. y copies the
command line that does the same without the console, R keeps a recording of the run, r runs it again."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("json", "end", "open"):
            return False
        if action == "again":
            return not (self.run_shown.recorded or self.console_app.settings.read_only)
        return super().check_action(action, parameters)

    def title_text(self) -> str:
        how = "cancelled" if isinstance(self.run_shown.error, Cancelled) else "failed"
        return f"{super().title_text()}  {how}"

    def body(self) -> Iterable[Widget]:
        """A grid: what is long goes on below itself, however wide the window is."""
        facts = Table.grid(padding=(0, 2))
        facts.add_column(justify="right", width=NAMES, style="bold", no_wrap=True)
        facts.add_column()
        for name, value in failure_lines(self.run_shown):
            facts.add_row(Text(name), Text(safe(value)))
        yield VerticalScroll(Static(facts), Static(hottest(self.run_shown), markup=False), can_focus=True)


def failure_lines(run: Run) -> Iterator[tuple[str, str]]:
    error = run.error
    assert error is not None
    yield "cancelled" if isinstance(error, Cancelled) else "failed", str(error).removesuffix(f". {error.cure}")
    if error.cure:
        yield "what to do", error.cure
    if isinstance(error, Unsupported):
        for obstacle in error.obstacles:
            yield "in the way", f"{obstacle.name} ({obstacle.where}): {obstacle.why}"
            yield "what to do", obstacle.cure
    yield "the source", _source(run)
    yield "in phase", run.phase
    for stage in run.stages:
        if stage.took_ns is not None:
            yield f"{stage.name} took", duration(stage.took_ns // 1000)
    if run.attempts > 1:
        yield "attempts", str(run.attempts)
    if run.frozen is not None:
        yield "frozen", duration(run.frozen.frozen_us)
    if run.rounds:
        yield (
            "pre-copy",
            f"{plural(len(run.rounds), 'round')}, {count(run.rounds[-1].dirty_pages)} dirty pages at the end",
        )
    done, total = run.totals()
    if total:
        yield "pages", f"{count(done)} of {count(total)}"
    yield "faults", f"{count(run.progress.wp_faults)} on write, {count(run.progress.demand_faults)} on demand"


def _source(run: Run) -> str:
    if run.job.verb == "restore":
        return "not touched"
    if isinstance(run.error, TargetGone):
        return f"process {run.job.pid} is gone"
    if isinstance(run.error, HandOverFailed):
        return f"process {run.job.pid} is stopped and keeps all of its memory"
    return f"process {run.job.pid} runs on as before"
