"""What the benchmarks share: the harness of the tests, the table of figures, the words for asked, measured and met.

A figure is a ratio or a time with the bound it has to keep. Everything compared is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import psutil
from harness.targets import Target, compiled, end

MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23
COPIES = 4  # of its memory that there may be at once: its own, both spools, the copy's
SPARE = 512  # MiB
MEMORY = Path("/dev/shm")  # snapshots go here: the disk is not what is measured


@dataclass(frozen=True)
class Figure:
    """One measured value. `asked` is the bound in words, empty where the value is only context."""

    name: str
    value: float
    unit: str
    asked: str = ""
    ok: bool | None = None


@dataclass
class Figures:
    """The result of one program."""

    title: str
    figures: list[Figure] = field(default_factory=list)

    def at_most(self, name: str, value: float, bound: float, unit: str) -> None:
        self.figures.append(Figure(name, value, unit, f"at most {bound:g}", value <= bound))

    def at_least(self, name: str, value: float, bound: float, unit: str) -> None:
        self.figures.append(Figure(name, value, unit, f"at least {bound:g}", value >= bound))

    def context(self, name: str, value: float, unit: str) -> None:
        self.figures.append(Figure(name, value, unit))

    @property
    def met(self) -> bool:
        return all(figure.ok is not False for figure in self.figures)

    def show(self, as_json: bool) -> int:
        """Print; the exit code is 1 where a bound was not kept."""
        if as_json:
            print(json.dumps({"title": self.title, "met": self.met, "figures": [asdict(f) for f in self.figures]}))
        else:
            print(self.title)
            width = max(len(figure.name) for figure in self.figures)
            for f in self.figures:
                verdict = {True: "ok", False: "MISSED", None: ""}[f.ok]
                print(f"  {f.name:<{width}}  {f.value:>10.2f} {f.unit:<8}  {f.asked:<14}  {verdict}".rstrip())
        return 0 if self.met else 1


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """`--json`, `--rounds`, and one option for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each value; the median counts")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


@contextmanager
def directory() -> Iterator[Path]:
    """A directory in memory, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="mig-", dir=MEMORY))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def warm(megabytes: int) -> None:
    """Memory that a virtual machine gets from its host at the first touch costs it seconds a gigabyte, and goes back
    there when it is free: what is measured next finds so much of it there, or what there is."""
    size = min(megabytes << 20, psutil.virtual_memory().available - (SPARE << 20))
    pid = os.fork()
    if pid == 0:
        try:
            with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
                memory.madvise(MADV_NOHUGEPAGE)
                memory.madvise(MADV_POPULATE_WRITE)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


@contextmanager
def ballast(place: Path, megabytes: int, *options: str | int, before: Sequence[str] = ()) -> Iterator[Target]:
    """A process with that much memory, which can hammer it. `before`: what executes it."""
    warm(COPIES * megabytes + SPARE)
    control = place / "ballast.control"
    argv = [*before, compiled("ballast"), "--mb", str(megabytes), "--control", control, *map(str, options)]
    target = Target(argv, directory=place, control=control)
    try:
        yield target
    finally:
        target.stop()


def phases(events: Path) -> dict[str, int]:
    """When each phase began, monotonic nanoseconds, from a file of `--events`."""
    found = {}
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event.get("event") == "phase":
            found[event["name"]] = event["time_ns"]
    return found


def median(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def ended(report: dict[str, Any]) -> None:
    """End a copy and its init."""
    for key in ("new_pid", "init_pid"):
        if report.get(key):
            end(report[key])


def rate_between(series: Sequence[int], begin_ns: int, from_ns: int, to_ns: int) -> float:
    """Writes a second between two moments, from counts of each millisecond since `begin_ns`."""
    first = max(0, (from_ns - begin_ns) // 1_000_000)
    last = min(len(series), (to_ns - begin_ns) // 1_000_000)
    return sum(series[first:last]) * 1000 / max(1, last - first)
