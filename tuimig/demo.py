"""`tuimig demo`: starts a workload of its own, clones it, shows that both run on from T0, and ends both.

The workloads are in `tuimig/demos/`. Each can tell whether its memory is whole; the demo fails where one is not.
The console uses the same list: `find(name).start(memory)` gives a `Running` with a process id, the options to clone it
with, and its check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from tuimig.core.errors import RebuildFailed, UsageError
from tuimig.core.model import Options, Report
from tuimig.core.policy import Policy
from tuimig.demos.driving import WORKLOAD, Running, State, Stepping, ask, end_copy, free_port, moved_on
from tuimig.demos.picture import Canvas
from tuimig.demos.servers import Kv, Redis, redis_missing

MIB: Final = 1 << 20
__all__ = [
    "WORKLOADS",
    "Cloner",
    "Running",
    "State",
    "Workload",
    "ask",
    "end_copy",
    "find",
    "free_port",
    "moved_on",
    "run",
    "workload",
]


def _nothing_missing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Workload:
    """One line of `tuimig demo --list`. `watch`: what to look at, a sentence or two; `memory`: bytes, if not said
    otherwise; `missing`: why it cannot run here, or nothing."""

    name: str
    what: str
    watch: str
    memory: int
    start: Callable[[int], Running]
    missing: Callable[[], str] = _nothing_missing


WORKLOADS: Final = (
    Workload(
        "counter",
        "threads that count, each into pages of its own",
        "The copy goes on from the numbers of T0, and so does the source: from then on their counts differ. "
        "Each write-protect fault is a page that was written before it was swept.",
        128 * MIB,
        lambda memory: Stepping("counter", memory),
    ),
    Workload(
        "canvas",
        "a process that draws a picture into memory, page by page",
        "The copy has the picture of T0, half of one frame and half of the next, while the source draws on. "
        "The faults run through its memory in the order in which it draws.",
        64 * MIB,
        Canvas,
    ),
    Workload(
        "kv",
        "a key-value server, and a client that writes and checks",
        "No acknowledged write is lost: the copy holds all that were acknowledged before the freeze and none that was "
        "sent after it. The longest answer is what the freeze, and the faults after it, cost the client at most.",
        64 * MIB,
        Kv,
    ),
    Workload(
        "churn",
        "a process that maps, unmaps and empties memory all the time",
        "Memory that is freed after T0 and before it was captured is gone. The proof at the end finds that, and the "
        "attempt is repeated under the guard: see the attempts and the guard's stops.",
        64 * MIB,
        lambda memory: Stepping("churn", memory),
    ),
    Workload(
        "hog",
        "a process that writes all of its memory, over and over",
        "Every page is written again before a round of pre-copy has copied it, so rounds never end by themselves: see "
        "them given up. What is left is captured on the first write after T0, and the freeze stays short.",
        64 * MIB,
        lambda memory: Stepping("hog", memory, "auto"),
    ),
    Workload(
        "redis",
        "a real Redis under a client that writes and checks",
        "The same proof as for kv, on a server that you know. The client's connection belongs to the source; the copy "
        "has it closed (--tcp close) and listens on a port of its own (--map-port).",
        128 * MIB,
        Redis,
        redis_missing,
    ),
)


class Cloner(Protocol):
    """What the demo needs of a session."""

    def clone(self, pid: int, policy: Policy, options: Options) -> Report: ...


def find(name: str) -> Workload:
    for known in WORKLOADS:
        if known.name == name:
            return known
    raise UsageError(f"no such workload: {name}", cure="See tuimig demo --list")


def run(session: Cloner, running: Running, say: Callable[[str], None]) -> Report:
    """The whole demo on a workload that runs. Raises where the copy is not exact; ends the copy in any case."""
    for line in running.before():
        say(line)
    report = session.clone(running.pid, running.policy, running.options)
    if report.new_pid is None:
        raise RebuildFailed("the clone names no process", subject=WORKLOAD)
    try:
        for line in running.check(report):
            say(line)
    finally:
        end_copy(report)
    say("\nBoth ran on from T0, each on its own; both have been ended.\n")
    return report


@contextlib.contextmanager
def workload(memory: int, name: str = "counter") -> Iterator[tuple[int, int]]:
    """A workload: its process id and its port. Ended at the end."""
    running = find(name).start(memory)
    try:
        yield running.pid, running.port
    finally:
        running.stop()
