"""Regions: the memory map of one process, and the choice of a treatment for each region."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from tuimig.core.client import Feed
from tuimig.core.errors import TuimigError
from tuimig.core.jobs import Job
from tuimig.core.model import PAGE, Decision, Heat, Kind, Options, Plan, Region, Treatment
from tuimig.core.policy import Policy, Rule, format_size
from tuimig.core.rates import Rates, content, held
from tuimig.core.strip import Span, layout, used
from tuimig.screens.confirm import Ask
from tuimig.screens.page import Page, Target
from tuimig.screens.processes import matcher
from tuimig.widgets.lines import FilterLine
from tuimig.widgets.region_map import BLANK, MapCell, RegionMap
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import count, cut, cut_left, duration, plural, safe, short_size, size

THRESHOLDS: Final = (0, *(1 << shift for shift in range(12, 33, 2)))  # 4 KiB to 4 GiB in fours
HEAT_S: Final = 2.0
LETTERS: Final = {Treatment.EAGER: "E", Treatment.PROTECTED: "W", Treatment.NONE: "."}
WORDS: Final = {Treatment.EAGER: "E eager", Treatment.PROTECTED: "W protect", Treatment.NONE: ". none"}
TREATMENT_KINDS: Final = {Treatment.EAGER: "warn", Treatment.PROTECTED: "good", Treatment.NONE: "dim"}
UNDO_MOST: Final = 200


class Regions(Page):
    """What is done with each region, who decided that, and what it will cost."""

    heading = "regions"
    about = """
The memory of the process. The strip shows its address space: E eager (copied while it is stopped), W write-protected
(captured while it runs on), . nothing there; below each letter a bar for its content, or its heat once measured.
The table has one line a region, with the rule that decided. Change a treatment and the last lines say what it costs:
the estimated frozen time from what this host has measured, and the faults to expect. h measures which regions are
written to, for two seconds, without harm."""
    DEFAULT_CSS = """
    Regions #detail { height: 2; padding: 0 1; color: $text-muted; }
    Regions #cost { height: 2; padding: 0 1; background: $surface; }
    Regions RegionMap { padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("L", "launch", "Launch", id="regions.launch"),
        Binding("e", "treat('eager')", "Eager", id="regions.eager"),
        Binding("w", "treat('protected')", "Protect", id="regions.protected"),
        Binding("d", "treat('')", "Default", id="regions.default"),
        Binding("space", "tag", "Tag", id="regions.tag"),
        Binding("v", "span", "Span", show=False, id="regions.span"),
        Binding("asterisk", "tag_shown", "Tag all shown", show=False, id="regions.tag-shown"),
        Binding("U", "untag", "Untag", show=False, id="regions.untag"),
        Binding("u", "undo", "Undo", id="regions.undo"),
        Binding("left_square_bracket", "threshold(-1)", "Lower threshold", show=False, id="regions.threshold-down"),
        Binding("right_square_bracket", "threshold(1)", "Threshold", key_display="[ ]", id="regions.threshold-up"),
        Binding("h", "heat", "Heat", id="regions.heat"),
        Binding("s", "save", "Save", id="regions.save"),
        Binding("o", "load", "Load", id="regions.load"),
        Binding("slash", "filter", "Filter", id="regions.filter"),
        Binding("r", "again", "Read again", show=False, id="regions.again"),
    ]

    def __init__(self, target: Target, policy: Policy | None = None) -> None:
        super().__init__()
        self.target = target
        self.policy = policy or Policy()
        self.plan = Plan(())
        self._undo: list[Policy] = []
        self._tagged: set[int] = set()
        self._span_from: int | None = None
        self._filter = ""
        self._shown: list[Decision] = []
        self._spans: tuple[Span, ...] = ()
        self._cells: list[MapCell] = []
        self._cells_by_start: dict[int, list[int]] = {}
        self._heat: Heat | None = None
        self._measuring: Feed | None = None
        self._timer: Timer | None = None
        self._rates = Rates()

    def body(self) -> Iterable[Widget]:
        yield RegionMap(id="map")
        columns = [
            Column("", 1),
            Column("START", 12, right=True),
            Column("END", 12, right=True, least=110),
            Column("SIZE", 5, right=True),
            Column("RSS", 5, right=True),
            Column("SWAP", 5, right=True, least=100),
            Column("PERM", 4),
            Column("KIND", 11, least=100),
            Column("NAME", left_cut=True),
            Column("TREATMENT", 9),
            Column("RULE", 15),
            Column("HEAT", 4, right=True),
        ]
        yield Table(columns, empty="reading ...", id="regions")
        yield FilterLine("name, treatment, rule; regex; ! inverts")
        yield Static(id="detail", markup=False)
        yield Static(id="cost", markup=False)

    def title_text(self) -> str:
        return f"regions  {self.target.pid} {self.target.name}  {plural(len(self.plan.decisions), 'region')}"

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self._rates = self.console_app.backend.rates()
        self.action_again()

    def on_unmount(self) -> None:
        if self._measuring is not None:
            self._measuring.close()

    # ------------------------------------------------------------ what it shows

    def action_again(self) -> None:
        pid = self.target.pid
        ticks = self.target.ticks
        self.ask(lambda: self.console_app.backend.regions(pid, ticks), self.take)

    def take(self, regions: list[Region]) -> None:
        self.plan = self.policy.plan(regions)
        self._spans = layout(self.plan.decisions)
        if not regions:
            self.query_one(Table).empty = "it has no memory: it has ended"
        self._show()
        self.retitle()

    def _decide(self, policy: Policy, *, undoable: bool = True) -> None:
        """The regions under another policy."""
        if undoable:
            self._undo = [*self._undo[-UNDO_MOST:], self.policy]
        self.say("")
        self.policy = policy
        self.plan = policy.plan([d.region for d in self.plan.decisions])
        self._show()

    def _show(self) -> None:
        try:
            wanted = matcher(self._filter)
        except re.error as error:
            self.wrong_filter(f"not a regular expression: {error}")
            return
        self.wrong_filter("")
        self._shown = [d for d in self.plan.decisions if not self._filter or wanted(text_of(d))]
        table = self.query_one(Table)
        if self.plan.decisions:
            table.empty = "no region matches"
        table.show([d.region.start for d in self._shown], self._row)
        self._show_map()
        self._show_cost()
        self._show_detail()

    def _row(self, index: int) -> Row:
        decision = self._shown[index]
        region = decision.region
        kind = "mark" if region.start in self._tagged else "plain"
        return (
            Cell("*" if region.start in self._tagged else "", "mark"),
            Cell(f"{region.start:x}", kind),
            f"{region.end:x}",
            short_size(region.size),
            short_size(region.rss),
            short_size(region.swap) if region.swap else "",
            region.perms,
            region.kind.value,
            Cell(safe(region.name), "dim" if decision.treatment is Treatment.NONE else "plain"),
            Cell(WORDS[decision.treatment], TREATMENT_KINDS[decision.treatment]),
            Cell(short_rule(decision), "dim"),
            self._heat_cell(region),
        )

    def _heat_cell(self, region: Region) -> Cell:
        share = self._share(region)
        if share is None:
            return Cell("", "dim")
        return Cell(f"{share:.0%}" if share >= 0.005 or share == 0 else "<1%", "bad" if share > 0.2 else "plain")

    def _share(self, region: Region) -> float | None:
        """Of its pages that hold content, those written while the heat was measured."""
        if self._heat is None or region.start not in self._heat.written:
            return None
        return min(1.0, self._heat.written[region.start] * PAGE / max(PAGE, content(region)))

    def _show_map(self) -> None:
        self._cells = cells_of(self.plan, self._spans, self._share)
        self._cells_by_start = {}
        for span in self._spans:
            self._cells_by_start.setdefault(self.plan.decisions[span.region].region.start, []).append(span.cell)
        self._show_mark()

    def _show_mark(self) -> None:
        """The map with the cells of the region under the cursor."""
        cells, current = list(self._cells), self._current()
        for cell in self._cells_by_start.get(current.region.start, []) if current else []:
            cells[cell] = replace(cells[cell], marked=True)
        self.query_one(RegionMap).show(cells)

    def _show_cost(self) -> None:
        plan = self.plan
        counts = {t: sum(1 for d in plan.decisions if d.treatment is t) for t in Treatment}
        text = Text(no_wrap=True)
        text.append(f"E {size(held(plan, Treatment.EAGER))} in {count(counts[Treatment.EAGER])}", "bold")
        text.append(f"   W {size(held(plan, Treatment.PROTECTED))} in {count(counts[Treatment.PROTECTED])}", "bold")
        text.append(f"   eager below {format_size(self.policy.eager_below)}")
        if self._tagged:
            text.append(f"   {len(self._tagged)} tagged")
        text.append("\nfrozen about ").append(duration(self._rates.frozen_us(plan)), "bold")
        text.append(f"  {self._expected_faults()}")
        self.query_one("#cost", Static).update(text, layout=False)

    def _expected_faults(self) -> str:
        """Pages of protected regions written while the sweep goes over them; each faults at most once."""
        if self._heat is None:
            return "write faults: h measures what to expect"
        written = sum(
            self._heat.written.get(d.region.start, 0) for d in self.plan.decisions if d.treatment is Treatment.PROTECTED
        )
        window = self._rates.window_s(self.plan)
        expected = int(written * min(1.0, window / 2 / self._heat.seconds))  # half the pages are swept by then
        return f"about {count(expected)} write faults in a window of {duration(window * 1e6)}"

    def _show_detail(self) -> None:
        decision = self._current()
        text = Text(no_wrap=True)
        if decision is not None:
            region = decision.region
            width = max(40, self.size.width - 2)
            line = f"{region.start:x}-{region.end:x} {region.kind.value}, {size(region.rss)} present"
            line += f", {size(region.swap)} in swap" if region.swap else ""
            text.append(f"{line}  {cut_left(safe(region.path), max(8, width - len(line) - 2))}")
            why = f"{WORDS[decision.treatment][2:]}: {decision.why}"
            rule = f" (rule: {decision.rule})"
            text.append(f"\n{cut(why + rule if len(why + rule) <= width else why, width)}")
        self.query_one("#detail", Static).update(text, layout=False)

    def _current(self) -> Decision | None:
        at = self.query_one(Table).cursor
        return self._shown[at] if at < len(self._shown) else None

    def on_table_moved(self) -> None:
        self._show_detail()
        self._show_mark()

    # ------------------------------------------------------------ treatments

    def _chosen(self) -> list[Region]:
        """What a key is about: the tagged regions, else the one under the cursor."""
        if self._tagged:
            return [d.region for d in self.plan.decisions if d.region.start in self._tagged]
        current = self._current()
        return [current.region] if current else []

    def action_treat(self, name: str) -> None:
        treatment = Treatment(name) if name else None
        regions = self._chosen()
        changed = self.policy.with_keys(regions, treatment)
        fixed = [d for d in changed.plan(regions).decisions if d.rule == "cannot be protected"]
        if treatment is not None and len(fixed) == len(regions) and regions:
            self.say(f"It stays {WORDS[fixed[0].treatment][2:]}: {fixed[0].why}")
            return
        self._decide(changed)
        if treatment is Treatment.PROTECTED and fixed:
            self.say(f"{plural(len(regions) - len(fixed), 'region')} protected; {len(fixed)} cannot be: {fixed[0].why}")

    def action_undo(self) -> None:
        if not self._undo:
            self.say("Nothing to undo")
            return
        self._decide(self._undo.pop(), undoable=False)

    def action_threshold(self, by: int) -> None:
        now = self.policy.eager_below
        place = sum(1 for step in THRESHOLDS if step < now)
        if by > 0 and place < len(THRESHOLDS) and THRESHOLDS[place] == now:
            place += 1
        if by < 0:
            place -= 1
        place = max(0, min(place, len(THRESHOLDS) - 1))
        if THRESHOLDS[place] == now:
            self.say(f"The threshold is at its {'highest' if by > 0 else 'lowest'}")
            return
        self._decide(replace(self.policy, eager_below=THRESHOLDS[place], below_source="key"))

    def apply_rule(self, match: str, treatment: Treatment) -> None:
        """A treatment for all that a name or glob means; from the palette."""
        try:
            rule = Rule(match, treatment, "key")
        except TuimigError as error:
            self.complain(error)
            return
        self._decide(replace(self.policy, rules=(rule, *self.policy.rules)))
        if not any(rule.speaks_of(d.region) for d in self.plan.decisions):
            self.say(f"No region matches {match}")

    # ------------------------------------------------------------ tags

    def action_tag(self) -> None:
        current = self._current()
        if current is not None:
            self._tagged ^= {current.region.start}
            self.query_one(Table).action_move(1)
            self._show()

    def action_span(self) -> None:
        """The first press begins, the second tags all between."""
        table = self.query_one(Table)
        if table.key is None:
            self.say("No region is shown")
            return
        if self._span_from is None:
            self._span_from = table.key
            self.say("Move to the other end and press v again")
            return
        first, last = sorted((self._span_from, table.key))
        self._tagged |= {d.region.start for d in self._shown if first <= d.region.start <= last}
        self._span_from = None
        self.say("")
        self._show()

    def action_tag_shown(self) -> None:
        self._tagged |= {d.region.start for d in self._shown}
        self._show()

    def action_untag(self) -> None:
        self._tagged.clear()
        self._span_from = None
        self._show()

    # ------------------------------------------------------------ heat

    def action_heat(self) -> None:
        if self._measuring is not None:
            return
        if self.console_app.settings.read_only:
            self.say("Read-only: measuring heat attaches to the process")
            return
        try:
            options = Options(started=self.target.ticks)
            job = Job("heat", self.target.pid, policy=self.policy, options=options, seconds=HEAT_S)
            self._measuring = self.console_app.backend.start(job)
        except TuimigError as error:
            self.complain(error)
            return
        self.say(f"Measuring for {HEAT_S:g} s which regions are written to ...")
        self._timer = self.set_interval(0.1, self._poll_heat)

    def _poll_heat(self) -> None:
        if self._measuring is None:
            return
        update = self._measuring.poll()
        if not update.over:
            return
        if self._timer is not None:
            self._timer.stop()
        self._measuring.close()
        self._measuring = None
        if update.error is not None:
            self.complain(update.error)
        elif update.heat is not None:
            self._heat = update.heat
            hot = sum(1 for pages in update.heat.written.values() if pages)
            self.say(f"{plural(hot, 'region')} written to; {sum(update.heat.written.values()):,} pages in {HEAT_S:g} s")
            self.action_again()  # they may have changed since they were read
        self._show()

    # ------------------------------------------------------------ files, filter, onward

    def action_filter(self) -> None:
        self.query_one(FilterLine).open()

    def on_filter_line_changed(self, event: FilterLine.Changed) -> None:
        self._filter = event.text
        self._show()

    def on_filter_line_left(self) -> None:
        self.query_one(Table).focus()

    def action_back(self) -> None:
        if self._filter:
            self.query_one(FilterLine).set("")
        else:
            super().action_back()

    def action_save(self) -> None:
        def write(name: str | None) -> None:
            if name:
                file = Path(name)
                self.ask(
                    lambda: self.console_app.backend.save_policy(file, self.policy),
                    lambda _: self.say(f"The policy is in {file}"),
                )

        self.app.push_screen(Ask("Save this policy as TOML in a new file:", f"{self.target.name}.toml"), write)

    def action_load(self) -> None:
        def read(name: str | None) -> None:
            if name:
                self.ask(lambda: self.console_app.backend.load_policy(Path(name)), self._loaded)

        self.app.push_screen(Ask("Load a policy from:", f"{self.target.name}.toml"), read)

    def _loaded(self, policy: Policy) -> None:
        self._decide(policy)
        self.say(f"{plural(len(policy.rules), 'rule')}, eager below {format_size(policy.eager_below)}")

    def action_launch(self) -> None:
        self.console_app.open_launch(self.target, self.policy, self.plan)

    def on_table_chosen(self, event: Table.Chosen) -> None:
        self.action_launch()


def text_of(decision: Decision) -> str:
    """What the filter looks at."""
    region = decision.region
    return f"{region} {region.kind.value} {decision.treatment.value} {decision.rule}"


def short_rule(decision: Decision) -> str:
    """The rule in a word or two; the line below has it whole."""
    if decision.rule == "cannot be protected":
        return {Kind.KERNEL: "kernel", Kind.SHARED_FILE: "shared file"}.get(decision.region.kind, "not protectable")
    return decision.rule.removesuffix(" (default)").replace("eager-below (", "below (")


def cells_of(plan: Plan, spans: Sequence[Span], share: Callable[[Region], float | None]) -> list[MapCell]:
    """The strip before a migration: letters by treatment, bars by content, or by heat where it was measured."""
    cells = [BLANK] * used(spans)
    made: dict[int, MapCell] = {}  # by number of the decision: large regions have many spans
    most = max((math.log2(1 + content(d.region) / PAGE) for d in plan.decisions), default=1) or 1
    for span in spans:
        fresh = made.get(span.region)
        if fresh is None:
            fresh = made[span.region] = cell_of(plan.decisions[span.region], most, share)
        known = cells[span.cell]
        if known.letter == "." or (fresh.letter != "." and fresh.level > known.level):
            cells[span.cell] = fresh
    return cells


def cell_of(decision: Decision, most: float, share: Callable[[Region], float | None]) -> MapCell:
    inside, hot = content(decision.region), share(decision.region)
    level = math.log2(1 + inside / PAGE) / most * 8 if hot is None else 0 if hot == 0 else 1 + 7 * hot
    letter = LETTERS[decision.treatment] if inside else "."
    return MapCell(letter, round(level), decision.treatment.value if letter != "." else "none")
