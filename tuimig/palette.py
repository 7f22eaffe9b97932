"""The command palette: jump to a process, a screen, a region; a treatment for all that a glob means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from textual.app import SystemCommand

from tuimig.core.model import Treatment
from tuimig.screens.confirm import Ask
from tuimig.screens.processes import Processes
from tuimig.screens.regions import Regions
from tuimig.widgets.table import Table
from tuimig.words import cut, safe, short_size

if TYPE_CHECKING:
    from tuimig.app import Console

MOST_REGIONS: Final = 500  # the largest ones; the table's own filter finds the rest


def commands(app: Console) -> Iterable[SystemCommand]:
    yield SystemCommand("Help", "the keys of this screen", app.action_help)
    yield SystemCommand("Check", "what stands in the way", app.action_check)
    yield SystemCommand("Migration", "the one that runs, or ran last", app.action_migration)
    yield SystemCommand("Open snapshot", "look into one, or restore it", app.open_snapshot)
    yield SystemCommand("Quit", "leave tuimig", app.action_leave)
    for screen in app.screen_stack:
        if isinstance(screen, Processes):
            for line in screen.lines:
                if not line.kernel:
                    title = f"process {line.pid} {cut(safe(line.command), 50)}"
                    yield SystemCommand(title, "open its regions", lambda s=screen, p=line: _choose(app, s, p))
    page = app.page
    if isinstance(page, Regions):
        yield SystemCommand("Eager for a glob ...", "all regions that match", lambda: _rule(app, page, Treatment.EAGER))
        yield SystemCommand(
            "Protect for a glob ...", "all regions that match", lambda: _rule(app, page, Treatment.PROTECTED)
        )
        largest = sorted(page.plan.decisions, key=lambda d: d.region.rss, reverse=True)[:MOST_REGIONS]
        for decision in largest:
            region = decision.region
            title = f"region {region.start:x} {short_size(region.size)} {cut(safe(region.name), 40)}"
            yield SystemCommand(title, "move to it", lambda at=region.start: page.query_one(Table).go_to(at))


def _choose(app: Console, screen: Processes, line: object) -> None:
    from tuimig.core.procfs import ProcessLine

    assert isinstance(line, ProcessLine)
    while len(app.screen_stack) > 2:
        app.pop_screen()
    screen.choose(line)


def _rule(app: Console, page: Regions, treatment: Treatment) -> None:
    def apply(match: str | None) -> None:
        if match:
            page.apply_rule(match, treatment)

    app.push_screen(Ask(f"{treatment.value} for (a path glob, heap, stack, anon or a range in hex):", ""), apply)
