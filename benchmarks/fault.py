"""What a writer feels while its memory is captured: 4 KiB pages, random writes, each write timed by the writer itself.

The same loop under fork()'s copy-on-write is the measure for writes a second. A write that takes 2 us or more counts as
a fault, so preemption is counted too.
"""

from __future__ import annotations

import statistics
import sys

from common import Figures, arguments, ballast, directory, phases, rate_between
from harness.command import tuimig

MANY = 10**12


def main() -> int:
    options = arguments(__doc__ or "", mb=1024)
    figures = Figures(f"WP faults as the writer sees them, {options.mb} MB")
    p50, p99, rate, fork_p50, fork_p99, fork_rate, served = [], [], [], [], [], [], []
    with directory() as place, ballast(place, options.mb) as target:
        for number in range(options.rounds):
            events = place / f"events{number}"
            target.ask(f"begin {MANY}")
            tuimig("snapshot", target.pid, place / f"snap{number}", "--events", events)
            answer = target.ask("end")
            times = phases(events)
            window = times["commit"] - times["capture"]
            p50.append(answer["p50_us"])
            p99.append(answer["p99_us"])
            served.append(answer["faults"])
            rate.append(rate_between(answer["each_ms"], answer["begin_ns"], times["capture"], times["commit"]))
            for name in ("pages", "sums", "manifest.json"):
                (place / f"snap{number}" / name).unlink()
            forked = target.ask(f"forked {options.mb * 1024}")
            fork_p50.append(forked["p50_us"])
            fork_p99.append(forked["p99_us"])
            begin = forked["begin_ns"]
            fork_rate.append(rate_between(forked["each_ms"], begin, begin, begin + window))
        if target.ask("check")["problems"]:
            raise SystemExit(f"the target's content is wrong: {target.ask('check')['first']}")
    middle = statistics.median
    figures.at_most("p50", middle(p50), 25, "us")
    figures.at_most("p99", middle(p99), 120, "us")
    figures.context("faults in one capture", middle(served), "")
    figures.context("p50 under fork()", middle(fork_p50), "us")
    figures.context("p99 under fork()", middle(fork_p99), "us")
    figures.context("writes a second in the window", middle(rate), "/s")
    figures.context("writes a second under fork()", middle(fork_rate), "/s")
    figures.context("writes, capture / fork()", middle(rate) / middle(fork_rate), "")
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
