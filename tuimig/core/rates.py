"""What a freeze costs on this host, from its own measurements: learnt from every report, begun with a short trial.

Estimates only: they are shown to a person who chooses, nothing depends on them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from tuimig.core.model import PAGE, Kind, Plan, Region, Report, Treatment

WEIGHT: Final = 0.3  # of what was measured last
TRIAL: Final = 16 << 20  # bytes
ENOUGH_EAGER_MIB: Final = 16  # what is less is copied beside other work, and tells nothing of a rate
ENOUGH_MIB: Final = 64


@dataclass(frozen=True, slots=True)
class Rates:
    """Microseconds of frozen time: for the process as such, a region, and a MiB of either treatment."""

    fixed_us: float = 2500.0
    region_us: float = 3.0
    eager_us_per_mib: float = 200.0
    protected_us_per_mib: float = 12.0
    precopied_us_per_mib: float = 3.0  # of protected memory, where pre-copy has gone before
    sweep_mib_per_s: float = 1200.0
    measured: int = 0  # reports it has learnt from

    def frozen_us(self, plan: Plan, *, precopied: bool = True) -> float:
        """What the freeze will take with this plan; `precopied`: after pre-copy that ended in the freeze."""
        eager, protected = held(plan, Treatment.EAGER), held(plan, Treatment.PROTECTED)
        return (
            self.fixed_us
            + self.region_us * len(plan.decisions)
            + self.eager_us_per_mib * eager / (1 << 20)
            + (self.precopied_us_per_mib if precopied else self.protected_us_per_mib) * protected / (1 << 20)
        )

    def window_s(self, plan: Plan) -> float:
        """How long pages of it stay protected after T0."""
        return held(plan, Treatment.PROTECTED) / (1 << 20) / self.sweep_mib_per_s

    def learn(self, report: Report) -> Rates:
        """With what a report measured mixed in."""
        parts = report.frozen
        if report.frozen_us is None or not parts:
            return self
        eager, protected = report.eager_bytes / (1 << 20), (report.bytes - report.eager_bytes) / (1 << 20)
        copying = parts.get("eager", 0)
        arming = sum(parts.get(name, 0) for name in ("arm", "scan", "proof", "dirty"))
        precopied = report.precopy is not None and report.precopy.ended == "freeze"
        per_mib = "precopied_us_per_mib" if precopied else "protected_us_per_mib"
        rest = max(0.0, report.frozen_us - copying - arming - parts.get("verify", 0) - self.region_us * report.regions)
        new = {
            "fixed_us": rest,
            "eager_us_per_mib": copying / eager if eager >= ENOUGH_EAGER_MIB else self.eager_us_per_mib,
            per_mib: arming / protected if protected >= ENOUGH_MIB else getattr(self, per_mib),
        }
        weight = WEIGHT if self.measured else 1.0
        mixed = {name: getattr(self, name) * (1 - weight) + value * weight for name, value in new.items()}
        return Rates(**{**asdict(self), **mixed, "measured": self.measured + 1})

    @classmethod
    def load(cls, file: Path) -> Self:
        """What was kept, or a short trial's result. A damaged file counts as none."""
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return msgspec.convert(kept, cls, strict=False)
        except (OSError, ValueError):
            return cls(eager_us_per_mib=_copy_us_per_mib())

    def save(self, file: Path) -> None:
        with contextlib.suppress(OSError):  # an estimate that is not kept is no harm
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = file.with_suffix(".part")
            fresh.write_text(json.dumps(asdict(self)), encoding="utf-8")
            fresh.rename(file)


def content(region: Region) -> int:
    """Bytes of a region that will be captured, as far as smaps tells."""
    if region.kind is Kind.FILE:
        return region.anonymous + region.swap
    return region.rss + region.swap


def held(plan: Plan, treatment: Treatment) -> int:
    """Bytes that will be captured of the regions with this treatment."""
    return sum(content(d.region) for d in plan.decisions if d.treatment is treatment)


def _copy_us_per_mib() -> float:
    """A copy between two stretches of memory of ours, as the freeze copies eager pages: read by the kernel, stored."""
    with mmap.mmap(-1, TRIAL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * TRIAL)
        fd = os.memfd_create("tuimig-trial", os.MFD_CLOEXEC)
        try:
            begin = time.perf_counter()
            for at in range(0, TRIAL, 256 * PAGE):
                os.pwrite(fd, memory[at : at + 256 * PAGE], at)
            return (time.perf_counter() - begin) * 1e6 / (TRIAL >> 20)
        finally:
            os.close(fd)
