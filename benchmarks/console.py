"""What the console costs: bytes to the terminal, processor time, and what a captured writer feels of it.

The real command in a pty at 80x24, in the normal and in the low-bandwidth profile. The writer faults as fast as it can
while its memory is captured; the same capture without a console is the measure for its latency, in turns.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import Figures, arguments, ballast, directory
from harness.command import tuimig
from harness.targets import Target
from harness.terminal import DOWN, ENTER, ESCAPE, RIGHT, Terminal

MANY = 10**12
REGIONS = 10_000
MOVES = 40
SSH = {"SSH_CONNECTION": "192.0.2.1 50000 192.0.2.2 22"}
PROFILES = {"normal": ({}, 40.0), "low bandwidth": (SSH, 12.0)}
TICKS = os.sysconf("SC_CLK_TCK")

# A process with many regions: neighbours differ in their permissions, so that the kernel does not join them.
MAPPED = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
import ctypes
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
for page in range(0, int(sys.argv[1]), 2):
    memory[page * 4096] = 1
    assert libc.mprotect(ctypes.c_void_p(base + page * 4096), ctypes.c_size_t(4096), 1) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass
class Attached:
    """Captures with the console attached, in one profile; a headless one follows each."""

    kilobytes_s: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults_s: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p50_headless: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    p99_headless: list[float] = field(default_factory=list)


def cpu_s(pid: int) -> float:
    """Processor time of the process itself, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def console(home: Path, *args: str | int, **env: str) -> Iterator[Terminal]:
    with Terminal(*args, home=home, env=env) as shown:
        yield shown
        shown.press("q")


def settle(shown: Terminal, seconds: float = 1.0) -> None:
    """Until nothing has come for so long; a list that refreshes never comes to rest, so at most ten seconds."""
    limit = time.monotonic() + 10
    while shown.bytes_during(seconds) and time.monotonic() < limit:
        pass


def idle(figures: Figures, home: Path, target: Target, seconds: float) -> None:
    """Bytes a second on each screen while nobody does anything."""
    with console(home) as shown:
        shown.until(r"processes \d+ processes")
        settle(shown)
        figures.context("idle, processes", shown.bytes_during(seconds) / seconds, "B/s")
    with console(home, "--pid", target.pid) as shown:
        shown.until(rf"regions {target.pid} \S+ \d+ regions")
        for name, key, words in (
            ("regions", "", "eager below"),
            ("check", "c", "userfaultfd"),
            ("help", "?", "F1|Help"),
            ("launch", "L", "stops for about"),
        ):
            if key:
                shown.press(key)
            shown.until(words)
            settle(shown, 0.5)
            figures.at_most(f"idle, {name}", shown.bytes_during(seconds) / seconds, 0, "B/s")
            if key:
                shown.press(ESCAPE)
                shown.until("eager below")


def idle_run(figures: Figures, home: Path, target: Target, seconds: float) -> None:
    """The same of a migration that waits for a key, and of its summary."""
    with console(home, "--pid", target.pid) as shown:
        launch_snapshot(shown, target, home / "snap", step=True)
        shown.until("Stopped before attach")
        settle(shown)
        figures.at_most("idle, migration", shown.bytes_during(seconds) / seconds, 0, "B/s")
        for phase in ("freeze", "capture", "commit"):
            shown.press(" ")
            shown.until(f"Stopped before {phase}")
        shown.press(" ")
        shown.until(rf"summary snapshot of {target.pid}")
        settle(shown)
        figures.at_most("idle, summary", shown.bytes_during(seconds) / seconds, 0, "B/s")
    shutil.rmtree(home / "snap")


def launch_snapshot(shown: Terminal, target: Target, snapshot: Path, *, step: bool = False) -> None:
    shown.until(rf"regions {target.pid} \S+ \d+ regions")
    shown.press("L")
    shown.until("stops for about")
    shown.press(RIGHT)
    name = str(shown.until(r"Directory (\S+)")[1])
    shown.press(DOWN, *["\x7f"] * len(name))
    shown.until("a directory is needed")
    shown.press(str(snapshot))
    shown.until(f"go to {snapshot}")
    shown.press(DOWN, DOWN, RIGHT)  # no pre-copy: pages that are written to fault
    shown.until(r"Pre-copy \( \) auto \(\*\) off")
    if step:
        shown.press(DOWN, DOWN, DOWN, DOWN, " ")
        shown.until(r"Step \[x\]")
    settle(shown, 0.3)
    shown.press_launch()


def attached(home: Path, place: Path, target: Target, env: dict[str, str], found: Attached) -> None:
    """One capture with the console attached, then one without."""
    snapshot = place / "snap"
    os.sync()  # what the last one left to be written is not this one's
    with console(home, "--pid", target.pid, **env) as shown:
        launch_snapshot(shown, target, snapshot)
        target.ask(f"begin {MANY}")
        shown.until("▶capture")
        begin, sent, cpu = time.monotonic(), len(shown.raw), cpu_s(shown.process.pid)
        shown.until(lambda: "▶capture" not in shown.words)
        seconds = time.monotonic() - begin
        found.kilobytes_s.append((len(shown.raw) - sent) / seconds / 1000)
        found.cpu.append((cpu_s(shown.process.pid) - cpu) / seconds)
        answer = target.ask("end")
        shown.until(rf"summary snapshot of {target.pid}")
        faults = int(re.sub(r"\D", "", str(shown.until(r"faults ([\d,]+) on write")[1])))
    found.faults_s.append(faults / seconds)
    found.p50.append(answer["p50_us"])
    found.p99.append(answer["p99_us"])
    shutil.rmtree(snapshot)
    os.sync()
    target.ask(f"begin {MANY}")
    tuimig("snapshot", target.pid, snapshot, "--precopy", "off")
    answer = target.ask("end")
    found.p50_headless.append(answer["p50_us"])
    found.p99_headless.append(answer["p99_us"])
    shutil.rmtree(snapshot)


def during_a_capture(figures: Figures, place: Path, megabytes: int, rounds: int) -> None:
    middle = statistics.median
    with ballast(place, megabytes) as target:
        for name, (env, kilobytes) in PROFILES.items():
            found = Attached()
            for _ in range(rounds):
                attached(place, place, target, env, found)
            figures.context(f"{name}: faults a second", middle(found.faults_s), "/s")
            figures.at_most(f"{name}: to the terminal", middle(found.kilobytes_s), kilobytes, "KB/s")
            figures.at_most(f"{name}: console's processor time", 100 * middle(found.cpu), 15, "%")
            figures.context(f"{name}: p50 attached", middle(found.p50), "us")
            ratio = middle(found.p50) / middle(found.p50_headless)
            figures.at_most(f"{name}: p50 attached / headless", ratio, 1.15, "")
            ratio = middle(found.p99) / middle(found.p99_headless)
            figures.context(f"{name}: p99 attached / headless", ratio, "")


def start_s(home: Path) -> float:
    begin = time.monotonic()
    with console(home) as shown:
        shown.until(r"processes \d+ processes")
        return time.monotonic() - begin


def many_regions(figures: Figures, home: Path) -> None:
    mapped = subprocess.Popen(
        [sys.executable, "-c", MAPPED, str(REGIONS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert mapped.stdout is not None
        assert mapped.stdout.readline() == "ready\n"
        with console(home, "--refresh", "60") as shown:
            shown.until(r"processes \d+ processes")
            shown.press("/")
            shown.until("/ text, regex")
            shown.press(f"^{mapped.pid} ")
            shown.until(r" 1 process of")
            shown.press(ENTER)
            settle(shown)
            shown.press(ENTER)
            begin = time.monotonic()
            shown.until(r"regions .* \d+,\d{3} regions")
            figures.at_most(f"open {REGIONS} regions", time.monotonic() - begin, 0.5, "s")
            settle(shown, 0.5)
            moves = []
            for _ in range(MOVES):
                before = len(shown.raw)
                begin = time.monotonic()
                shown.press(DOWN)
                shown.until(lambda before=before: len(shown.raw) > before)
                moves.append((time.monotonic() - begin) * 1000)
                settle(shown, 0.05)
            figures.at_most("cursor move among them", statistics.median(moves), 50, "ms")
            figures.context("cursor move, slowest", max(moves), "ms")
    finally:
        mapped.kill()
        mapped.communicate()


def main() -> int:
    options = arguments(__doc__ or "", mb=3000, seconds=8.0)
    figures = Figures("the console at 80x24")
    with directory() as place:
        figures.at_most(
            "start to the first list", statistics.median(start_s(place) for _ in range(options.rounds)), 0.8, "s"
        )
        many_regions(figures, place)
        with ballast(place, 64) as target:
            idle(figures, place, target, options.seconds)
            idle_run(figures, place, target, options.seconds)
        during_a_capture(figures, place, options.mb, 2 * options.rounds + 1)  # half of them meet a busy disk
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
