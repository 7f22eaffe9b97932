"""What the command line says, for people: rich tables on stdout, a progress bar on stderr.

Names and paths come from other processes: they are shown as text, never as markup, and control characters are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tuimig.core.errors import Obstacle
from tuimig.core.host import Probe
from tuimig.core.journals import Kept
from tuimig.core.manifest import Manifest
from tuimig.core.model import PAGE, Event, Faults, Note, Phase, Plan, Report, Treatment
from tuimig.core.model import Progress as Counters
from tuimig.words import age, cut, duration, each_round, rounds, safe, size, streams, until_running

if TYPE_CHECKING:
    from tuimig.replay import Row

WIDTH_WITHOUT_TERMINAL = 240
NEVER_WRAPPED = frozenset(
    {"ADDRESS", "PERMS", "KIND", "TREATMENT", "OBSTACLE", "FEATURE", "SESSION", "ROLE", "PROCESS", "STATE"}
)
RENAMED = {"downtime_us": "runs after"}  # of fields: the source of a clone stands still for a part of it only
MOST_CELL = 96  # characters of a value that stands for a longer one

STYLES = {
    Treatment.EAGER.value: "yellow",
    Treatment.PROTECTED.value: "green",
    Treatment.NONE.value: "dim",
    "yes": "green",
    "asks": "yellow",
    "no": "red",
}


def cell(value: object) -> Text:
    text = safe(value)
    return Text(text, style=STYLES.get(text, ""))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """What the command line does about a closed pipe holds for tables too."""
        raise BrokenPipeError


def _console() -> Console:
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def _show(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Sequence[str] = (),
) -> None:
    """A table under its title; without column names it is a list of facts."""
    if title:
        console.print(Text(safe(title), style="bold underline"))
    table = Table(show_header=any(columns), box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in right
        whole = numeric or column in NEVER_WRAPPED
        table.add_column(column, justify="right" if numeric else "left", no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    console.out("\n".join(line.rstrip() for line in lines))  # columns are padded; files and pipes need no padding


# ---------------------------------------------------------------- looking


def processes(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("PID", "USER", "RSS", "THREADS", "MIGRATE", "IN THE WAY", "COMMAND")
    lines = (
        (
            row["pid"],
            row["user"],
            size(row["rss"]),
            row["threads"],
            row["migrate"],
            ", ".join(dict.fromkeys(obstacle.name for obstacle in row["obstacles"])),
            row["command"][:80],
        )
        for row in rows
    )
    _show(_console(), "", columns, lines, right=("PID", "RSS", "THREADS"))


def plan(shown: Plan) -> None:
    columns = ("ADDRESS", "PERMS", "SIZE", "RSS", "KIND", "TREATMENT", "RULE", "WHY", "NAME")
    lines = (
        (
            f"{d.region.start:x}-{d.region.end:x}",
            d.region.perms,
            size(d.region.size),
            size(d.region.rss),
            d.region.kind.value,
            d.treatment.value,
            d.rule,
            d.why,
            d.region.name,
        )
        for d in shown.decisions
    )
    console = _console()
    _show(console, "", columns, lines, right=("SIZE", "RSS"))
    totals = (f"{size(shown.bytes(treatment))} {treatment.value}" for treatment in Treatment)
    console.print(f"{len(shown.decisions)} regions: {', '.join(totals)}")


def probes(found: Sequence[Probe]) -> None:
    lines = [("yes" if p.ok else "no", p.name, p.detail, p.needed_for, "" if p.ok else p.cure) for p in found]
    _show(_console(), "This host", ("OK", "FEATURE", "FOUND", "NEEDED FOR", "CURE"), lines)


def obstacles(pid: int, found: Sequence[Obstacle]) -> None:
    console = _console()
    if not found:
        console.print(f"\nProcess {pid}: nothing stands in the way")
        return
    lines = [("asks" if o.asks else "no", o.name, o.where, o.why, o.cure) for o in found]
    console.print()
    _show(console, f"Process {pid}", ("", "OBSTACLE", "WHERE", "WHY", "CURE"), lines)


def journals(found: Sequence[Kept]) -> None:
    columns = ("SESSION", "ROLE", "PROCESS", "STATE", "DESTINATION", "AGE", "COMMAND")
    lines = [
        (
            one.session,
            one.role,
            f"{one.pid or '?'} {one.process}",
            one.state,
            one.destination,
            age(one.age_s),
            cut(one.command, 40),
        )
        for one in found
    ]
    console = _console()
    _show(console, "", columns, lines, right=("AGE",))
    console.print()
    for one in found:
        console.print(Text(safe(f"{one.session} ({one.role}): {one.todo}")))


# ---------------------------------------------------------------- a snapshot


def manifest(directory: Path, shown: Manifest) -> None:
    """Everything a snapshot holds. State sections are shown by their own fields, so new kinds appear by themselves."""
    console = _console()
    process = shown.process
    facts = [
        ("command", " ".join(process.cmdline) or process.comm),
        ("program", process.exe),
        ("process", f"{process.pid} (on the host {process.host_pid}), parent {process.ppid}, session {process.sid}"),
        ("taken", f"{shown.created} by tuimig {shown.tuimig}, format {shown.format}"),
        ("host", f"{shown.host.arch}, Linux {shown.host.kernel}"),
        ("frozen", duration(shown.frozen_us)),
    ]
    _show(console, str(directory), ("", ""), facts)
    console.print()
    _show(console, "Sizes by treatment", ("TREATMENT", "REGIONS", "MAPPED", "STORED"), _sizes(shown), _RIGHT)
    console.print()
    threads = [(t.tid, t.comm, len(t.pending)) for t in shown.threads]
    _show(console, f"Threads ({len(threads)})", ("TID", "NAME", "SIGNALS PENDING"), threads, ("TID",))
    console.print()
    regions = [
        (f"{r.start:x}-{r.end:x}", r.perms, size(r.size), size(r.pages * PAGE), r.kind, r.treatment, r.rule, r.path)
        for r in shown.regions
    ]
    columns = ("ADDRESS", "PERMS", "SIZE", "STORED", "KIND", "TREATMENT", "RULE", "NAME")
    _show(console, f"Regions ({len(regions)})", columns, regions, _RIGHT)
    empty = []
    for name, raw in shown.state.items():
        section = msgspec.json.decode(raw)
        if isinstance(section, dict) and not any(section.values()):
            empty.append(name)
            continue
        console.print()
        _section(console, name, section)
    if empty:
        console.print(Text(f"\nIt has no {', '.join(empty)}"))


_RIGHT = ("REGIONS", "MAPPED", "STORED", "SIZE")


def _sizes(shown: Manifest) -> list[tuple[object, ...]]:
    lines: list[tuple[object, ...]] = []
    for treatment in Treatment:
        chosen = [r for r in shown.regions if r.treatment == treatment.value]
        stored = sum(r.pages for r in chosen) * PAGE
        lines.append((treatment.value, len(chosen), size(sum(r.size for r in chosen)), size(stored)))
    return lines


def _section(console: Console, name: str, section: Any) -> None:
    """A state section: its simple fields as one table, each list of records as one more."""
    fields = section if isinstance(section, dict) else {"value": section}
    records = {key: value for key, value in fields.items() if _is_records(value)}
    simple = [(key, _brief(value)) for key, value in fields.items() if key not in records and value != []]
    title = name.capitalize()
    if simple:
        _show(console, title, ("", ""), simple)
    for key, nested in records.items():
        rows = [_flat(row) for row in nested]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [[_brief(row.get(column, "")) for column in columns] for row in rows]
        heading = title if key == name and not simple else f"{title}: {key}"
        _show(console, f"{heading} ({len(rows)})", columns, lines)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record's own fields, with those of records inside it beside them."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _brief(value: Any) -> str:
    """One cell: addresses in hex, descriptors by number, long values cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if value >= 1 << 32 else str(value)
    if value is None:
        return ""
    if _is_records(value) and all("number" in item for item in value):
        return " ".join(str(item["number"]) for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_CELL else f"{text[: MOST_CELL - 12]}... ({len(text)})"


# ---------------------------------------------------------------- demos


def demos(rows: Sequence[Mapping[str, Any]]) -> None:
    console = _console()
    lines = [(r["name"], size(r["memory"]), r["what"], r["missing"]) for r in rows]
    _show(console, "", ("NAME", "MEMORY", "WHAT", "NOT HERE"), lines, ("MEMORY",))
    for row in rows:
        console.print(Text(f"\n{row['name']}: {row['watch']}"))


# ---------------------------------------------------------------- a migration


def report(shown: Report, ended: str = "done") -> None:
    """The report as a person wants it: what it cost the source, what was captured, what runs now."""
    lines = [("process", str(shown.pid))] if shown.pid else []
    lines.append(("regions", str(shown.regions)))
    lines.append(("content", f"{size(shown.bytes)} ({shown.zero_pages} zero pages left out)"))
    if shown.frozen_us is not None:
        parts = ", ".join(f"{name} {duration(us)}" for name, us in shown.frozen.items())
        lines.append(("frozen", duration(shown.frozen_us) + (f" ({parts})" if parts else "")))
        lines.append(("eager, protected", f"{size(shown.eager_bytes)}, {size(shown.protected_bytes)}"))
        lines.append(("guard", f"{shown.guard}, {shown.attempts} attempt(s), {shown.guard_stops} stops"))
        lines.append(("swept", f"{shown.swept_pages} pages"))
    if shown.precopy is not None:
        lines += [("pre-copy", rounds(shown.precopy)), *each_round(shown.precopy)]
    lines.append(("faults", f"{shown.wp_faults} write-protect, {shown.demand_faults} on demand"))
    if shown.wp_faults or shown.demand_faults:
        times = shown.fault_us
        lines.append(("fault service", f"p50 {times.p50:.1f} us, p99 {times.p99:.1f} us, most {times.max:.1f} us"))
    if shown.verified_pages is not None:
        lines.append(("verified", f"{shown.verified_pages} pages are those of T0"))
    if shown.destination is not None:
        lines.append(("destination", shown.destination))
        sent = size(shown.bytes_sent or 0)
        early = f", {size(shown.precopy_sent)} of it before T0" if shown.precopy_sent else ""
        packed = f", {size(shown.unpacked_bytes)} packed to {size(shown.packed_bytes)}" if shown.packed_bytes else ""
        lines.append(("sent", f"{sent} over {streams(shown.stream_bytes)}{early}{packed}"))
        if shown.round_trip_us is not None and shown.round_trip_us.max:
            trip = shown.round_trip_us
            lines.append(("round trips", f"p50 {trip.p50:.1f} us, p99 {trip.p99:.1f} us, most {trip.max:.1f} us"))
    if shown.new_pid is not None:
        inside = f" ({shown.inner_pid} in its PID namespace)" if shown.inner_pid not in (None, shown.new_pid) else ""
        lines.append(("the copy", f"process {shown.new_pid}{inside}"))
    times_us = ((until_running(shown), shown.downtime_us), ("filled after", shown.fill_us), ("in all", shown.total_us))
    for name, value in times_us:
        if value is not None:
            lines.append((name, duration(value)))
    if shown.directory is not None:
        lines.append(("snapshot", shown.directory))
    if shown.faults_dropped:
        lines.append(("not logged", f"{shown.faults_dropped} faults (served, but the log was full)"))
    what = shown.verb or "a migration"  # a recording may end before it says which
    _show(_console(), f"{what}: {ended}", ("", ""), lines)


def comparison(first: str, second: str, rows: Sequence[Row]) -> None:
    console = _console()
    console.print(Text(f"first: {safe(first)}\nsecond: {safe(second)}\n"))
    lines: list[tuple[object, ...]] = []
    group = ""
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        name = RENAMED.get(row.name) or row.name.removesuffix("_us").replace("_", " ")
        shown = "" if row.group == group else row.group
        lines.append((shown, name, _figure(row.first, row.unit), _figure(row.second, row.unit), ratio))
        group = row.group
    columns = ("", "FIGURE", "FIRST", "SECOND", "SECOND/FIRST")
    _show(console, "", columns, lines, ("FIRST", "SECOND", "SECOND/FIRST"))


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "us":
        return duration(value)
    return size(int(value)) if unit == "bytes" else f"{value:.0f}"


class ProgressBar:
    """The bar of a long verb, on stderr, fed with events."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("pages  {task.fields[faults]} faults"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("look", total=None, faults=0)
        self._faults = 0
        self._there = 0  # of the destination

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        match event:
            case Phase():
                self._progress.update(self._task, description=event.name)
            case Note():
                self._console.print(Text(safe(event.text)))
            case Faults():
                self._faults += len(event)
                self._progress.update(self._task, faults=self._faults)
            case Counters(side="destination"):  # the bar is the source's; two would take turns in it
                self._there = event.demand_faults
                self._progress.update(self._task, faults=self._faults + self._there)
            case Counters():
                self._faults = event.wp_faults + event.demand_faults
                self._progress.update(
                    self._task,
                    total=event.pages_total or None,
                    completed=event.pages_done,
                    faults=self._faults + self._there,
                )
