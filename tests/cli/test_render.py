"""The report for people: what each figure is called, and that no more is counted than there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tuimig import page, render, words
from tuimig.core.model import Precopy, Progress, Report, Round

CLONE = Report(
    verb="clone",
    pid=7,
    regions=3,
    bytes=8192,
    total_us=9000,
    frozen_us=2000,
    new_pid=8,
    downtime_us=4000,
    destination="ssh://far",
    bytes_sent=5000,
    stream_bytes=(1000, 4000),
)


def shown(report: Report, capsys: pytest.CaptureFixture[str]) -> list[str]:
    render.report(report)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def a_round(number: int) -> Round:
    return Round(number, 1500 // (number + 1), 1000 // (number + 1), 0, 0, 100_000 * number, 3000, 10)


def test_the_demand_stream_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sent 4.88 KiB over 1 stream and one for demands" in shown(CLONE, capsys)
    three = replace(CLONE, stream_bytes=(1, 2, 3, 4))
    assert "sent 4.88 KiB over 3 streams and one for demands" in shown(three, capsys)


def test_only_a_move_has_a_downtime(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs after 4 ms" in shown(CLONE, capsys)
    assert "downtime 4 ms" in shown(replace(CLONE, verb="move"), capsys)
    assert "downtime" not in page._totals(CLONE)


def test_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(CLONE, precopy=Precopy("async", (a_round(0), a_round(1)), "freeze", "it fits"))
    lines = shown(report, capsys)
    at = lines.index("pre-copy 2 rounds, ended in the freeze: it fits")
    assert lines[at + 1 : at + 3] == [
        "round 0 copied 1,000 of 1,500 pages, took 3 ms",
        "round 1 copied 500 of 750 dirty pages, 7,500 dirtied/s, took 3 ms",
    ]


@pytest.mark.parametrize(("number", "lines"), [(0, 0), (9, 9), (10, 10), (11, 10), (1000, 10)])
def test_of_many_rounds_the_first_and_the_last(number: int, lines: int) -> None:
    told = list(words.each_round(Precopy("async", tuple(map(a_round, range(number))), "window", "")))
    assert len(told) == lines
    names = [name for name, _ in told]
    assert names[:3] == [f"round {n}" for n in range(number)][:3]
    assert names[-6:] == [f"round {n}" for n in range(number)][-6:]
    if number > 10:
        assert told[3] == ("...", f"{number - 9} more")


def test_the_bar_is_that_of_one_side() -> None:
    bar = render.ProgressBar()
    for event in (
        Progress("send", 100, 40, wp_faults=3),
        Progress("fill", 90, 10, demand_faults=2, side="destination"),
    ):
        bar.show(event)
        (task,) = bar._progress.tasks
        assert (task.total, task.completed) == (100, 40)
    assert task.fields["faults"] == 5
