"""How fast memory is swept into a file in memory, against memcpy of the same memory, and what it needs itself.

Without pre-copy, so that all of it is swept after T0; what it needs itself is measured with pre-copy. The file's pages
are new, so the measure is memcpy into new memory; into memory that is there already it is several times as fast.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from pathlib import Path

from common import Figures, arguments, ballast, directory, phases
from harness.command import start, tuimig


def peak_mib(pid: int) -> float:
    """Anonymous and file memory of a process; the spool is in neither."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssFile"].split()[0])) / 1024


def memory_of_a_capture(pid: int, place: Path) -> float:
    """Peak over the capture, in MiB."""
    attempt = start("snapshot", pid, place / "snap")
    peak = 0.0
    while attempt.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):  # it may end between two looks
            peak = max(peak, peak_mib(attempt.pid))
    _, words = attempt.communicate()
    if attempt.returncode != 0:
        raise SystemExit(words)
    return peak


def main() -> int:
    options = arguments(__doc__ or "", mb=4096)
    figures = Figures(f"sweep of {options.mb} MB into memory")
    size = options.mb << 20
    sweep, copy, fresh = [], [], []
    with directory() as place, ballast(place, options.mb) as target:
        for number in range(options.rounds):
            copy.append(size / 1e9 / (target.ask("copy")["copy_us"] / 1e6))
            fresh.append(size / 1e9 / (target.ask("copy fresh")["copy_us"] / 1e6))
            events = place / f"events{number}"
            tuimig("snapshot", target.pid, place / "snap", "--precopy", "off", "--events", events)
            times = phases(events)
            sweep.append(size / 1e9 / ((times["commit"] - times["capture"]) / 1e9))
            shutil.rmtree(place / "snap")
        peak = memory_of_a_capture(target.pid, place)
    middle = statistics.median
    figures.context("sweep", middle(sweep), "GB/s")
    figures.context("memcpy", middle(copy), "GB/s")
    figures.context("memcpy into fresh memory", middle(fresh), "GB/s")
    figures.at_least("sweep / memcpy into fresh memory", middle(sweep) / middle(fresh), 0.35, "")
    figures.context("sweep / memcpy", middle(sweep) / middle(copy), "")
    figures.at_most("our memory besides the spool", peak, 64, "MiB")
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
