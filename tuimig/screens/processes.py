"""Processes: the live list to pick from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from textual.binding import Binding, BindingType
from textual.widget import Widget

from tuimig.core.errors import Obstacle, TargetGone, TuimigError
from tuimig.core.model import Options
from tuimig.core.procfs import ProcessLine
from tuimig.screens.check import Check
from tuimig.screens.page import Page, Target
from tuimig.widgets.lines import FilterLine
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import plural, safe, short_size

JUDGE_AGAIN_S: Final = 30.0
BATCH: Final = 12  # verdicts found at once, so that the first ones come soon
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Can it be migrated: yes, asks or no; and why in a word."""

    word: str
    why: str
    at: float

    @property
    def kind(self) -> str:
        return {"yes": "good", "asks": "warn", "no": "bad"}[self.word]


Order = Callable[["Processes", ProcessLine], Any]
ORDERS: Final[tuple[tuple[str, Order], ...]] = (
    ("PID", lambda _, p: p.pid),
    ("USER", lambda _, p: p.user),
    ("CPU%", lambda s, p: s.cpu.get((p.pid, p.ticks), 0.0)),
    ("RSS", lambda _, p: p.rss),
    ("THR", lambda _, p: p.threads),
    ("MIGRATE", lambda s, p: s.verdict_word(p)),
    ("COMMAND", lambda _, p: p.command),
)


class Processes(Page):
    """The first screen."""

    heading = "processes"
    about = """
All processes of this host. MIGRATE says whether one can be cloned or snapshotted, and if not, why in a word:
"asks" needs your consent, "no" is shown with its cure by Enter. Enter on any other opens its memory map.
The filter takes text or a regular expression; a ! before it shows what does not match."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", id="processes.filter"),
        Binding("less_than_sign", "order(-1)", "Sort left", show=False, id="processes.sort-left"),
        Binding("greater_than_sign", "order(1)", "Sort", key_display="< >", id="processes.sort-right"),
        Binding("I", "invert", "Invert", id="processes.invert"),
        Binding("t", "tree", "Tree", id="processes.tree"),
        Binding("K", "kernel", "Kernel threads", show=False, id="processes.kernel"),
        Binding("r", "look_again", "Refresh", show=False, id="processes.again"),
        Binding("O", "snapshot", "Open snapshot", id="processes.snapshot"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.cpu: dict[Key, float] = {}
        self._all: list[ProcessLine] = []
        self._shown: list[tuple[ProcessLine, str]] = []  # with the tree's branch
        self._verdicts: dict[Key, Verdict] = {}
        self._before: dict[Key, tuple[float, float]] = {}  # CPU seconds, at
        self._filter = ""
        self._order = 3
        self._down = True
        self._tree = False
        self._kernel = False
        self._read = False
        self._trouble = False  # the last reading failed, and that is said
        self._reading = False
        self._judging = False

    def body(self) -> Iterable[Widget]:
        yield Table(self._columns(), empty="reading ...", id="processes")
        yield FilterLine("text, regex, or ! for what does not match")

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self.action_again()
        self.set_interval(self.console_app.settings.refresh_s, self._tick)

    def title_text(self) -> str:
        if not self._read:
            return "processes"
        everything = sum(self._kernel or not line.kernel for line in self._all)
        return f"processes  {plural(len(self._shown), 'process')}" + (f" of {everything}" if self._filter else "")

    def on_screen_resume(self) -> None:
        self._tick()

    def _tick(self) -> None:
        if self.is_active:  # nobody looks at it otherwise
            self.action_again()

    def action_again(self) -> None:
        if not self._reading:
            self._reading = True
            self.ask(self.console_app.backend.processes, self._take, self._failed)

    def _failed(self, error: TuimigError) -> None:
        self._reading = False
        self._trouble = True
        self.complain(error)

    def process(self) -> Target | None:
        """The one under the cursor."""
        key = self.query_one(Table).key
        line = next((line for line, _ in self._shown if (line.pid, line.ticks) == key), None)
        return Target(line.pid, line.ticks, safe(line.command)) if line is not None else None

    def action_look_again(self) -> None:
        self._verdicts.clear()
        self.action_again()

    def _take(self, found: list[ProcessLine]) -> None:
        self._reading = False
        self._read = True
        if self._trouble:
            self._trouble = False
            self.say("")
        now = self.console_app.backend.now()
        seen: dict[Key, tuple[float, float]] = {}
        for line in found:
            key = (line.pid, line.ticks)
            was, at = self._before.get(key, (line.cpu_seconds, now))
            if now > at:
                self.cpu[key] = 100 * max(0.0, line.cpu_seconds - was) / (now - at)
            seen[key] = (line.cpu_seconds, now)
        self._before = seen
        self.cpu = {key: value for key, value in self.cpu.items() if key in seen}
        self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key in seen}
        self._all = found
        self._show()
        self._judge()

    # ------------------------------------------------------------ can it be migrated

    def verdict_word(self, line: ProcessLine) -> str:
        verdict = self._verdicts.get((line.pid, line.ticks))
        return f"{verdict.word} {verdict.why}" if verdict else ""

    def _judge(self) -> None:
        """The next few in sight that have no verdict. Looking walks page tables: not of those nobody looks at."""
        if self._judging or not self.is_active:
            return
        now = self.console_app.backend.now()
        table = self.query_one(Table)
        by_verdict = ORDERS[self._order][0] == "MIGRATE"
        sight = self._shown if by_verdict else self._shown[table.top : table.top + table.lines]
        due: dict[Key, ProcessLine] = {}
        for line, _ in sight:
            key = (line.pid, line.ticks)
            verdict = self._verdicts.get(key)
            if verdict is None or now - verdict.at > JUDGE_AGAIN_S:
                due[key] = line
            if len(due) == BATCH:
                break
        if due:
            self._judging = True
            lines = list(due.values())
            self.ask(lambda: [self._verdict(line, now) for line in lines], self._take_verdicts, self._not_judged)

    def _verdict(self, line: ProcessLine, now: float) -> tuple[Key, Verdict]:
        key = (line.pid, line.ticks)
        if not line.readable and not line.kernel:
            return key, Verdict("no", "permission", now)
        try:
            return key, judged(self.console_app.backend.obstacles(line.pid, Options(tcp="close")), now)
        except TargetGone:
            return key, Verdict("no", "gone", now)
        except TuimigError:
            return key, Verdict("no", "unreadable", now)

    def _not_judged(self, error: TuimigError) -> None:
        self._judging = False
        self.complain(error)

    def _take_verdicts(self, found: list[tuple[Key, Verdict]]) -> None:
        self._judging = False
        self._verdicts.update(found)
        self._show()
        self._judge()

    # ------------------------------------------------------------ the table

    def _columns(self) -> list[Column]:
        def title(name: str) -> str:
            chosen = ORDERS[self._order][0] == name and not self._tree
            return (name + ("▼" if self._down else "▲")) if chosen else name

        return [
            Column(title("PID"), 7, right=True),
            Column(title("USER"), 9),
            Column("S", 1),
            Column(title("CPU%"), 5, right=True),
            Column(title("RSS"), 5, right=True),
            Column(title("THR"), 4, right=True),
            Column(title("MIGRATE"), 16),
            Column(title("COMMAND")),
        ]

    def _show(self) -> None:
        try:
            wanted = matcher(self._filter)
        except re.error as error:
            self.wrong_filter(f"not a regular expression: {error}")
            return
        self.wrong_filter("")
        lines = [p for p in self._all if (self._kernel or not p.kernel) and wanted(f"{p.pid} {p.user} {p.command}")]
        order = ORDERS[self._order][1]
        lines.sort(key=lambda p: (order(self, p), p.pid), reverse=self._down)
        self._shown = tree(lines) if self._tree else [(line, "") for line in lines]
        table = self.query_one(Table)
        table.empty = "no process matches" if self._read else "reading ..."
        table.show([(line.pid, line.ticks) for line, _ in self._shown], self._row)
        self.retitle()

    def _row(self, index: int) -> Row:
        line, branch = self._shown[index]
        key = (line.pid, line.ticks)
        verdict = self._verdicts.get(key)
        kind = "plain" if line.readable and not line.kernel else "dim"
        said = Cell(f"{verdict.word} {verdict.why}".strip(), verdict.kind) if verdict else Cell("…", "dim")
        cpu = self.cpu.get(key)
        return (
            Cell(str(line.pid), kind),
            Cell(safe(line.user), kind),
            Cell(line.state, kind),
            Cell("" if cpu is None else f"{cpu:.1f}", kind),
            Cell(short_size(line.rss), kind),
            Cell(str(line.threads), kind),
            said,
            Cell(branch + safe(line.command), kind),
        )

    # ------------------------------------------------------------ keys

    def action_filter(self) -> None:
        self.query_one(FilterLine).open()

    def on_filter_line_changed(self, event: FilterLine.Changed) -> None:
        self._filter = event.text
        self._show()

    def on_filter_line_left(self) -> None:
        self.query_one(Table).focus()

    def action_back(self) -> None:
        """Esc takes the filter away."""
        self.query_one(FilterLine).set("")

    def action_order(self, by: int) -> None:
        self._order = (self._order + by) % len(ORDERS)
        self._reorder()

    def action_invert(self) -> None:
        self._down = not self._down
        self._reorder()

    def action_tree(self) -> None:
        self._tree = not self._tree
        self._reorder()

    def action_kernel(self) -> None:
        self._kernel = not self._kernel
        self._show()

    def _reorder(self) -> None:
        table = self.query_one(Table)
        table.columns = tuple(self._columns())
        table.refresh()
        self._show()

    def action_snapshot(self) -> None:
        self.console_app.open_snapshot()

    def on_table_moved(self) -> None:
        self._judge()

    def on_table_chosen(self, event: Table.Chosen) -> None:
        line = next((line for line, _ in self._shown if (line.pid, line.ticks) == event.key), None)
        if line is not None:
            self.choose(line)

    def choose(self, line: ProcessLine) -> None:
        """Go on with a process: to its regions, or to what stands in the way."""
        target = Target(line.pid, line.ticks, safe(line.command))
        verdict = self._verdicts.get((line.pid, line.ticks))
        if line.kernel or not line.readable or (verdict and verdict.word == "no"):
            reason = [] if line.readable or line.kernel else [no_permission(line.pid)]
            self.app.push_screen(Check(target, reason))
        else:
            self.console_app.open_regions(target)

    @property
    def lines(self) -> list[ProcessLine]:
        """What was read last."""
        return self._all


def no_permission(pid: int) -> Obstacle:
    from tuimig.core.procfs import PTRACE_CURE

    return Obstacle("permission", f"process {pid}", "we may not look into it", PTRACE_CURE)


def judged(obstacles: list[Obstacle], now: float) -> Verdict:
    """The verdict in a word: the first that blocks, else the first that asks."""
    blocking = [o for o in obstacles if not o.asks]
    if blocking:
        return Verdict("no", blocking[0].name, now)
    return Verdict("asks", obstacles[0].name, now) if obstacles else Verdict("yes", "", now)


def matcher(text: str) -> Callable[[str], bool]:
    """What the filter's text takes: text, a regular expression, the opposite of either. Raises re.error."""
    inverse, text = text.startswith("!"), text.removeprefix("!")
    if not text:
        return lambda _: True
    pattern = re.compile(text if re.search(r"[\\^$*+?\[\](){}|]", text) else re.escape(text), re.IGNORECASE)
    return lambda value: (pattern.search(value) is None) == inverse


def tree(lines: list[ProcessLine]) -> list[tuple[ProcessLine, str]]:
    """Children under their parents, in the order given, with the branch before each command."""
    known = {line.pid for line in lines}
    children: dict[int, list[ProcessLine]] = {}
    roots = []
    for line in lines:
        if line.parent in known and line.parent != line.pid:
            children.setdefault(line.parent, []).append(line)
        else:
            roots.append(line)
    found: list[tuple[ProcessLine, str]] = []
    stack = [(line, "", "") for line in reversed(roots)]
    while stack:
        line, branch, below = stack.pop()
        found.append((line, branch))
        own = children.get(line.pid, [])
        for place, child in reversed(list(enumerate(own))):
            last = place == len(own) - 1
            stack.append((child, below + ("└─" if last else "├─"), below + ("  " if last else "│ ")))
    return found
