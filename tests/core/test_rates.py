"""Rates: an estimate from what was measured, kept between runs, and never an obstacle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuimig.core.model import Decision, Kind, Plan, Precopy, Region, Report, Treatment
from tuimig.core.rates import Rates

MIB = 1 << 20


def plan(**mib: int) -> Plan:
    made, at = [], 0
    for name, size in mib.items():
        region = Region(at, at + size * MIB, "rw-p", 0, "00:00", 0, "", Kind.ANON, rss=size * MIB)
        made.append(Decision(region, Treatment(name), "", ""))
        at += 1 << 40
    return Plan(tuple(made))


def report(frozen_us: int, eager_mib: int = 20, protected_mib: int = 1000, precopy: Precopy | None = None) -> Report:
    return Report(
        "snapshot",
        1,
        regions=10,
        bytes=(eager_mib + protected_mib) * MIB,
        total_us=10**6,
        frozen_us=frozen_us,
        frozen={"eager": 5000, "arm": 8000, "scan": 2000},
        eager_bytes=eager_mib * MIB,
        precopy=precopy,
    )


def test_an_estimate_is_what_was_measured() -> None:
    learnt = Rates().learn(report(20_000))
    assert learnt.eager_us_per_mib == pytest.approx(250)
    assert learnt.protected_us_per_mib == pytest.approx(10)
    assert learnt.frozen_us(plan(eager=20, protected=1000), precopied=False) == pytest.approx(20_000, rel=0.01)
    assert learnt.measured == 1


def test_memory_that_was_copied_before_has_a_rate_of_its_own() -> None:
    precopy = Precopy("async", (), "freeze", "")
    learnt = Rates().learn(report(20_000, precopy=precopy))
    assert learnt.precopied_us_per_mib == pytest.approx(10)
    assert learnt.protected_us_per_mib == Rates().protected_us_per_mib
    assert learnt.frozen_us(plan(eager=20, protected=1000)) == pytest.approx(20_000, rel=0.01)


def test_later_measurements_are_mixed_in() -> None:
    first = Rates().learn(report(20_000))
    second = first.learn(report(120_000))
    assert first.fixed_us < second.fixed_us < 105_000
    for _ in range(40):
        second = second.learn(report(120_000))
    assert second.frozen_us(plan(eager=20, protected=1000), precopied=False) == pytest.approx(120_000, rel=0.01)


def test_a_report_that_says_nothing_changes_nothing() -> None:
    assert Rates().learn(Report("restore", 1, 1, 1, 1)) == Rates()
    small = Rates().learn(report(20_000, eager_mib=10, protected_mib=50))
    assert (small.eager_us_per_mib, small.protected_us_per_mib) == (200.0, 12.0)


def test_treatments_cost_what_they_hold() -> None:
    rates = Rates()
    assert rates.frozen_us(plan(eager=100)) > rates.frozen_us(plan(protected=100)) > rates.frozen_us(plan(none=100))
    assert rates.window_s(plan(protected=1200, eager=5000)) == pytest.approx(1.0)


def test_only_changed_pages_of_a_file_count() -> None:
    region = Region(0, 64 * MIB, "rw-p", 0, "08:01", 7, "/lib/x", Kind.FILE, rss=64 * MIB, anonymous=MIB)
    file_plan = Plan((Decision(region, Treatment.EAGER, "", ""),))
    assert Rates().frozen_us(file_plan) == Rates().frozen_us(plan(eager=1))


def test_kept_and_read(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rates.json"
    learnt = Rates().learn(report(20_000))
    learnt.save(file)
    assert Rates.load(file) == learnt
    assert [p.name for p in file.parent.iterdir()] == ["rates.json"]


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"fixed_us": "much"}', "\x00\xff"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "rates.json"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    tried = Rates.load(file)
    assert tried.measured == 0
    assert 1 < tried.eager_us_per_mib < 100_000


def test_where_it_cannot_be_kept_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Rates().save(tmp_path / "file" / "rates.json")
    assert (tmp_path / "file").stat().st_size == 0
