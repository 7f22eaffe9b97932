"""How soon a copy runs, and how fast its pages follow: lazy restore of a snapshot that lies in memory."""

from __future__ import annotations

import statistics
import sys

from common import Figures, arguments, ballast, directory, ended, phases
from harness.command import tuimig
from harness.targets import ask


def main() -> int:
    options = arguments(__doc__ or "", mb=1024)
    figures = Figures(f"lazy restore of {options.mb} MB")
    first, fill, whole = [], [], []
    with directory() as place, ballast(place, options.mb) as target:
        tuimig("snapshot", target.pid, place / "snap")
        for number in range(options.rounds):
            control = place / f"copy{number}"
            events = place / f"events{number}"
            mapping = f"{target.control}={control}"
            report = tuimig("restore", place / "snap", "--map-path", mapping, "--events", events).report
            try:
                times = phases(events)
                # counted from the start of the verb; the manifest has been read when the phase `restore` begins
                first.append(report["downtime_us"] / 1000 - (times["restore"] - times["look"]) / 1e6)
                whole.append(report["downtime_us"] / 1000)
                fill.append((options.mb << 20) / 1e9 / (report["fill_us"] / 1e6))
                answer = ask(control, "check")
                if answer["problems"]:
                    raise SystemExit(f"the copy's content is wrong: {answer['first']}")
            finally:
                ended(report)
    middle = statistics.median
    figures.at_most("first instruction after the manifest is read", middle(first), 120, "ms")
    figures.context("first instruction after the verb starts", middle(whole), "ms")
    figures.at_least("fill", middle(fill), 1.5, "GB/s")
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
