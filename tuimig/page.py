"""`--report FILE.html`: the summary of a run as one page that needs nothing else: no script, no network, no fonts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from tuimig import charts
from tuimig.core.model import FaultKind, Report
from tuimig.core.record import Header
from tuimig.core.summary import SIDES, Summary
from tuimig.words import duration, safe, size, until_running


def page(summary: Summary, header: Header) -> str:
    template = Template(files("tuimig").joinpath("page.html").read_text(encoding="utf-8"))
    report = summary.report
    return template.substitute(
        title=_text(f"tuimig {report.verb}: process {report.pid}"),
        subtitle=f"<code>{_text(summary.command)}</code><br>{_text(header.created)}, tuimig {_text(header.tuimig)}",
        warnings=_list([*summary.notes, *report.warnings]),
        totals=_totals(report),
        phases_words=_text(_phases_words(summary)),
        phases=charts.phases(summary.phases),
        frozen=_frozen(report),
        progress=charts.progress(summary.progress, summary.phases),
        heat_words=_text(_heat_words(summary)),
        heat=_heat(summary),
        histograms=_histograms(summary),
        regions=_regions(summary),
    )


def _text(words: object) -> str:
    return escape(safe(words))


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _totals(report: Report) -> str:
    facts = [
        ("frozen", None if report.frozen_us is None else duration(report.frozen_us)),
        (until_running(report), None if report.downtime_us is None else duration(report.downtime_us)),
        ("filled after", None if report.fill_us is None else duration(report.fill_us)),
        ("in all", duration(report.total_us)),
        ("content", size(report.bytes)),
        ("write-protect faults", str(report.wp_faults)),
        ("demand faults", str(report.demand_faults)),
        ("fault service p50", f"{report.fault_us.p50:.1f} us"),
        ("fault service p99", f"{report.fault_us.p99:.1f} us"),
        ("swept pages", str(report.swept_pages)),
        ("guard", f"{report.guard}, {report.guard_stops} stops"),
        ("attempts", str(report.attempts)),
        ("the copy", None if report.new_pid is None else f"process {report.new_pid}"),
        ("snapshot", report.directory),
    ]
    return "\n".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts if value is not None)


def _phases_words(summary: Summary) -> str:
    if not summary.complete:
        return "The recording ends before the migration did."
    return "The source ran in all of them but freeze, where it stood still for a part of the time."


def _frozen(report: Report) -> str:
    if report.frozen_us is None:
        return '<p class="soft">A restore freezes nobody.</p>'
    values = {"in all": float(report.frozen_us), **{name: float(us) for name, us in report.frozen.items()}}
    return charts.bars(values, "cost", "us", "frozen time and its parts")


def _heat_words(summary: Summary) -> str:
    words = f"{summary.recorded_faults} faults were recorded"
    if summary.left_out:
        words += f", {summary.left_out} more came faster than they are kept"
    return f"{words}. Only regions with faults are drawn, and small ones larger than they are."


def _heat(summary: Summary) -> str:
    parts = []
    for kind, words in (
        (FaultKind.WP, "The source wrote to a protected page"),
        (FaultKind.MISSING, "The copy touched a page that was not there"),
    ):
        drawing = charts.heat(summary.heat, kind)
        parts.append(f"<h3>{words}</h3>{drawing or '<p class=soft>never</p>'}")
    return "\n".join(parts)


def _histograms(summary: Summary) -> str:
    parts = []
    for side in SIDES.values():
        if side in summary.histograms:
            shown = summary.histograms[side]
            parts.append(f"<h3>Faults of the {side}: {shown.count}</h3>{charts.histogram(shown, side)}")
    return "\n".join(parts)


def _regions(summary: Summary) -> str:
    head = "".join(
        f"<th{' class=n' if name in ('size', 'resident', 'faults') else ''}>{name}</th>"
        for name in ("address", "perms", "size", "resident", "kind", "treatment", "rule", "faults", "name")
    )
    rows = []
    for index, decision in enumerate(summary.plan):
        region = decision.region
        cells = [
            f"<td class=mono>{region.start:x}-{region.end:x}</td>",
            f"<td class=mono>{_text(region.perms)}</td>",
            f"<td class=n>{size(region.size)}</td>",
            f"<td class=n>{size(region.rss)}</td>",
            f"<td>{region.kind.value}</td>",
            f"<td>{decision.treatment.value}</td>",
            f"<td>{_text(decision.rule)}</td>",
            f"<td class=n>{summary.region_faults.get(index, 0) or ''}</td>",
            f"<td>{_text(region.path)}</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>"
