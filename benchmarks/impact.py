"""What the clients of a loaded Redis feel: of a clone, of BGSAVE on the same data, and of nothing at all.

Requests per second and latencies over the whole time of the action, as a client of our own meets them. Asked: at least
BGSAVE's throughput, at most its p99; and at 4 GB at most a third of its pause.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import Figures, arguments, directory, ended
from freeze import VALUE_BYTES, server_of
from harness import redis
from harness.command import tuimig
from harness.targets import Target, compiled

KEYS = 50_000
CLIENTS = 4
REST_S = 3.0


@dataclass(frozen=True)
class Felt:
    """What the clients met from the action's begin to its end."""

    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


@contextlib.contextmanager
def clients(port: int, place: Path) -> Iterator[Target]:
    """Connections that SET one key after the other, as fast as they get answers; a program in C, since one in Python
    would measure its own threads."""
    control = place / "load.control"
    options = {"port": port, "clients": CLIENTS, "keys": KEYS, "value": VALUE_BYTES, "control": control}
    argv = [compiled("load"), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    target = Target(argv, directory=place, control=control)
    try:
        yield target
    finally:
        target.stop()


def during(load: Target, action: Callable[[], None]) -> Felt:
    load.ask("begin")
    try:
        action()
    finally:
        felt = load.ask("end")
    if felt.pop("problems"):
        raise SystemExit(felt["first"])
    felt.pop("first")
    return Felt(**felt)


def median(rounds: list[Felt]) -> Felt:
    return Felt(*(statistics.median(getattr(felt, name) for felt in rounds) for name in Felt.__dataclass_fields__))


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
        with directory() as place, server_of(place, megabytes) as server, clients(server.port, place) as load:
            actions: dict[str, Callable[[], None]] = {
                "nothing": partial(time.sleep, REST_S),
                "BGSAVE": partial(background_save, server),
                "clone": partial(clone, server),
            }
            rounds = [{name: during(load, action) for name, action in actions.items()} for _ in range(options.rounds)]
        felt = {name: median([found[name] for found in rounds]) for name in actions}
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
