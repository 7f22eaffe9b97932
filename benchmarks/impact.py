"""What the clients of a loaded Redis feel: of a clone, of BGSAVE on the same data, and of nothing at all.

Requests per second and latencies over the whole time of the action, as a client of our own meets them. Asked: at least
BGSAVE's throughput, at most its p99; and at 4 GB at most a third of its pause.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common import Figures, arguments, directory, ended
from freeze import VALUE_BYTES, server_of
from harness import redis
from harness.command import tuimig

KEYS = 50_000
CLIENTS = 4
REST_S = 3.0


@dataclass
class Seen:
    """One client's requests: how long each took, seconds, and how long it went on."""

    took: list[float] = field(default_factory=list)
    span_s: float = 0.0


@dataclass(frozen=True)
class Felt:
    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


class Load:
    """Clients that SET one key after the other, as fast as they get answers."""

    def __init__(self, port: int) -> None:
        self._over = threading.Event()
        self._seen = [Seen() for _ in range(CLIENTS)]
        self._threads = [
            threading.Thread(target=self._run, args=(port, number, seen), daemon=True)
            for number, seen in enumerate(self._seen)
        ]

    def _run(self, port: int, number: int, seen: Seen) -> None:
        source, value = random.Random(number), "x" * VALUE_BYTES
        with redis.Client(port) as client:
            begin = time.monotonic()
            while not self._over.is_set():
                before = time.monotonic()
                client("SET", f"key:{source.randrange(KEYS)}", value)
                seen.took.append(time.monotonic() - before)
            seen.span_s = time.monotonic() - begin

    def during(self, action: Callable[[], None]) -> Felt:
        for thread in self._threads:
            thread.start()
        try:
            action()
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()
        took = sorted(t for seen in self._seen for t in seen.took)

        def at(part: float) -> float:
            return took[min(len(took) - 1, int(part * len(took)))] * 1000

        rate = len(took) / max(seen.span_s for seen in self._seen)
        return Felt(rate, at(0.5), at(0.99), at(0.999), took[-1] * 1000)


def background_save(server: redis.Redis) -> None:
    with server.client() as client:
        client("BGSAVE")
        while client.info("persistence")["rdb_bgsave_in_progress"] == "1":
            time.sleep(0.02)


def clone(server: redis.Redis) -> None:
    ports = f"{server.port}:{redis.free_port()}"
    report = tuimig("clone", server.pid, "--tcp", "close", "--map-port", ports, timeout_s=600).report
    ended(report)


def main() -> int:
    options = arguments(__doc__ or "", sizes="1000,4000")
    figures = Figures("what clients feel")
    for megabytes in map(int, options.sizes.split(",")):
        with directory() as place, server_of(place, megabytes) as server:
            felt = {
                "nothing": Load(server.port).during(lambda: time.sleep(REST_S)),
                "BGSAVE": Load(server.port).during(lambda: background_save(server)),
                "clone": Load(server.port).during(lambda: clone(server)),
            }
        for name, f in felt.items():
            label = f"{megabytes} MB, {name}"
            figures.context(f"{label}: requests", f.per_second, "1/s")
            figures.context(f"{label}: p50", f.p50_ms, "ms")
            figures.context(f"{label}: p99", f.p99_ms, "ms")
            figures.context(f"{label}: p99.9", f.p999_ms, "ms")
            figures.context(f"{label}: max", f.max_ms, "ms")
        ours, theirs = felt["clone"], felt["BGSAVE"]
        figures.at_least(f"{megabytes} MB: throughput, clone / BGSAVE", ours.per_second / theirs.per_second, 1.0, "")
        figures.at_most(f"{megabytes} MB: p99, clone / BGSAVE", ours.p99_ms / theirs.p99_ms, 1.0, "")
        if megabytes == 4000:
            figures.at_most(f"{megabytes} MB: max, clone / BGSAVE", ours.max_ms / theirs.max_ms, 1 / 3, "")
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
