"""Explain: what is happening now, in plain sentences with this run's figures, over any screen."""

from __future__ import annotations

from typing import ClassVar, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tuimig.explain import Explanation, Situation, explain
from tuimig.run import Run

AGAIN_S: Final = 0.5


class Explain(ModalScreen[None]):
    """Follows the run while it is open. Without a run it says what comes first."""

    DEFAULT_CSS = """
    Explain {
        align: center bottom; background: $background 30%;
        & > VerticalScroll { width: 100%; height: auto; max-height: 80%; background: $surface; border: round $primary;
            padding: 0 1; }
        & Static { height: auto; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,E,q", "leave", "Close", show=False, id="explain.close"),
        Binding("down", "scroll(1)", "Down", show=False, id="explain.down"),
        Binding("up", "scroll(-1)", "Up", show=False, id="explain.up"),
    ]

    def __init__(self, run: Run | None) -> None:
        super().__init__()
        self._run = run
        self._shown: Explanation | None = None

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(markup=False)

    def on_mount(self) -> None:
        self._tell()
        self.set_interval(AGAIN_S, self._tell)

    def _tell(self) -> None:
        explanation = explain(situation_of(self._run) if self._run else Situation("look"))
        if explanation != self._shown:
            self._shown = explanation
            self.query_one(Static).update(as_text(explanation))

    def action_leave(self) -> None:
        self.dismiss(None)

    def action_scroll(self, by: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


def situation_of(run: Run) -> Situation:
    last = next(iter(run.faults.last(1)), None)
    return Situation(
        phase=run.phase,
        verb=run.job.verb,
        pid=run.job.pid,
        command=run.command,
        plan=run.plan,
        round=run.rounds[-1] if run.rounds else None,
        frozen=run.frozen,
        progress=run.progress,
        details=run.details,
        last_fault=last,
        region_of_fault=run.region_name(last) if last else "",
        attempts=run.attempts,
        connection=run.connection,
        handover=run.handover,
        remote=run.remote,
        report=run.report,
        error="" if run.error is None else str(run.error),
        copy_ended=run.copy_ended,
        waiting_for=run.waiting,
    )


def as_text(explanation: Explanation) -> Text:
    text = Text()
    text.append(f"{explanation.idea.title}\n", "bold")
    text.append(f"{explanation.idea.text}\n")
    for sentence in explanation.here:
        text.append(f"\n{sentence}", "cyan")
    if explanation.next:
        text.append(f"\n\n{explanation.next}", "bold")
    if explanation.idea.calls:
        text.append(f"\n\nSystem calls: {', '.join(explanation.idea.calls)}", "dim")
    return text
