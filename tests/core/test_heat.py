"""Heat on real processes: what is written shows, what is not does not, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.targets import Target

from tuimig.core import heat, procfs
from tuimig.core.errors import Cancelled
from tuimig.core.model import Options

CHURN = "none"


def flags(pid: int) -> set[str]:
    return {flag for region in procfs.read_regions(pid) for flag in region.flags}


def ranges(pid: int) -> list[tuple[int, str]]:
    return [(region.start, region.perms) for region in procfs.read_regions(pid, with_figures=False)]


def test_written_regions_are_told_from_cold_ones(
    targets: Callable[..., Target], need: Callable[..., None], undisturbed: Callable[[int], None]
) -> None:
    need(root=True)
    target = targets("ballast", "--mb", 32)
    before = ranges(target.pid)
    cold = heat.measure(target.pid, Options(), 0.3, lambda: None)
    assert cold
    large = max(procfs.read_regions(target.pid), key=lambda region: region.rss)
    assert cold[large.start] == 0
    assert ranges(target.pid) == before
    assert not {"um", "uw", "ui"} & flags(target.pid)
    undisturbed(target.pid)


def test_a_writer_is_hot(targets: Callable[..., Target], need: Callable[..., None]) -> None:
    need(root=True)
    target = targets("churn", "--pages", 800, "--writers", 2, "--churn", CHURN, "--pace", 2000)
    written = heat.measure(target.pid, Options(), 0.5, lambda: None)
    assert max(written.values()) > 100
    assert target.alive


def test_cancelled_it_leaves_nothing(
    targets: Callable[..., Target], need: Callable[..., None], undisturbed: Callable[[int], None]
) -> None:
    need(root=True)
    target = targets("churn", "--pages", 800, "--writers", 2, "--churn", CHURN, "--pace", 2000)

    def stop() -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        heat.measure(target.pid, Options(), 5, stop)
    assert not {"um", "uw", "ui"} & flags(target.pid)
    undisturbed(target.pid)
