"""A stage for the console: a backend with a small world of its own, and feeds that play what an engine once told.

Nothing here needs a privilege. The migrations are recorded from real ones (recordings/, made by record.py).
"""

from __future__ import annotations

import asyncio
import lzma
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from textual.pilot import Pilot

from tuimig.app import Console
from tuimig.backend import Port
from tuimig.core.board import Batch
from tuimig.core.client import Update
from tuimig.core.errors import Obstacle, TargetGone, TuimigError
from tuimig.core.host import Probe
from tuimig.core.jobs import Done, Failure, Job, decode, encode, error_of, failure_of
from tuimig.core.manifest import Manifest
from tuimig.core.maps import kind_of
from tuimig.core.model import Heat, Options, Region, Report
from tuimig.core.policy import Policy, load
from tuimig.core.procfs import ProcessLine
from tuimig.core.rates import Rates
from tuimig.settings import Settings
from tuimig.tape import Tape

MIB = 1 << 20
RECORDINGS = Path(__file__).with_name("recordings")
SMALL, LARGE = (80, 24), (120, 40)


def process(pid: int, command: str, user: str = "root", rss: int = 5 * MIB, **more: Any) -> ProcessLine:
    values: dict[str, Any] = {
        "pid": pid,
        "user": user,
        "command": command,
        "threads": 1,
        "rss": rss,
        "size": 2 * rss,
        "cpu_seconds": 1.0,
        "started": 1000.0,
        "kernel": False,
        "traced": False,
        "readable": True,
        "state": "S",
        "parent": 1,
        "ticks": pid * 10,
    }
    return ProcessLine(**{**values, **more})


PROCESSES = [
    process(1, "/sbin/init", rss=11 * MIB, parent=0),
    process(2, "[kthreadd]", rss=0, kernel=True, parent=0),
    process(412, "/usr/sbin/sshd -D", rss=8 * MIB),
    process(1180, "sshd: ada [priv]", rss=9 * MIB, parent=412, readable=False),
    process(4711, "/usr/bin/redis-server 127.0.0.1:6379", "redis", 355 * MIB, threads=5, state="R"),
    process(4720, "/usr/sbin/nginx -g daemon off;", rss=7 * MIB),
    process(4721, "nginx: worker process", "www-data", 12 * MIB, parent=4720),
    process(5003, "/usr/bin/node server.js --port 8080", "ada", 98 * MIB, threads=11),
    process(5120, "python3 -c import time; [[time]]", "ada", 15 * MIB),
    process(6001, "postgres: checkpointer", "postgres", 140 * MIB),
]

PIDS = {line.pid for line in PROCESSES}

OBSTACLES = {
    5003: [
        Obstacle("io_uring", "descriptor 17", "anon_inode:[io_uring] cannot be rebuilt in a copy", "Start it without")
    ],
    4720: [
        Obstacle("children", "processes 4721", "only the process itself is copied", "Accept with --yes", asks=True),
    ],
}


def region(start: int, size: int, path: str = "", perms: str = "rw-p", rss: int | None = None) -> Region:
    kind = kind_of(path, perms)
    held = size if rss is None else rss
    anonymous = held if not path.startswith("/") else 0
    return Region(start, start + size, perms, 0, "08:01", 17, path, kind, rss=held, anonymous=anonymous)


REGIONS = [
    region(0x555555554000, 380 << 10, "/usr/bin/redis-server", "r--p"),
    region(0x5555555B3000, 1 << 20, "/usr/bin/redis-server", "r-xp"),
    region(0x5555556B3000, 360 << 10, "/usr/bin/redis-server", "rw-p", 360 << 10),
    region(0x555555800000, 2 * MIB, "[heap]"),
    region(0x7FFFD0000000, 256 * MIB, rss=249 * MIB),
    region(0x7FFFE4000000, 96 * MIB, rss=88 * MIB),
    region(0x7FFFF0000000, 8 * MIB, rss=12 << 10),
    region(0x7FFFF0800000, 4 << 10, perms="---p", rss=0),
    region(0x7FFFF0801000, 8 * MIB, rss=8 << 10),
    region(0x7FFFF7000000, 1852 << 10, "/usr/lib/x86_64-linux-gnu/libc.so.6", "r-xp"),
    region(0x7FFFF7300000, 52 << 10),
    region(0x7FFFF7C00000, 16 * MIB, "/dev/shm/cache", "rw-s"),
    region(0x7FFFF7FC0000, 16 << 10, "[vvar]", "r--p", 0),
    region(0x7FFFF7FC4000, 8 << 10, "[vdso]", "r-xp", 4 << 10),
    region(0x7FFFFFFDE000, 132 << 10, "[stack]", rss=40 << 10),
]

PROBES = [
    Probe("architecture", True, "everything", "x86_64, 4096 bytes a page", required=True),
    Probe("userfaultfd", True, "protecting and filling memory", "all features that are needed", required=True),
    Probe(
        "/dev/userfaultfd",
        False,
        "targets of other users",
        "No such file (errno 2)",
        "Load it: mknod, or a newer kernel",
    ),
    Probe("ptrace", True, "everything", "seizes, stops and lets go", required=True),
]


class Recorded:
    """A feed that plays updates; the last one again for as long as nothing more is asked to come."""

    def __init__(self, updates: list[Update], upto: int | None = None) -> None:
        self.updates = updates if upto is None else updates[:upto]
        self.cancelled = False
        self.reconnects = 0
        self.background: Path | None = None
        self.closed = False

    def poll(self) -> Update:
        return self.updates.pop(0) if self.updates else Update()

    def cancel(self) -> None:
        self.cancelled = True

    def reconnect(self) -> None:
        self.reconnects += 1

    def to_background(self, report: Path) -> bool:
        self.background = report
        return True

    def close(self) -> None:
        self.closed = True


class Stage:
    """A Backend. What the console asks for is remembered in `jobs`, `ended`, `saved`."""

    def __init__(self) -> None:
        self.host = "tern"
        self.lines = list(PROCESSES)
        self.memory: list[Region] = list(REGIONS)
        self.in_the_way = dict(OBSTACLES)
        self.feeds: list[Any] = []
        self.jobs: list[Job] = []
        self.ended: list[Report] = []
        self.learnt: list[Report] = []
        self.saved: dict[Path, str] = {}
        self.trouble: TuimigError | None = None  # raised by everything that reads
        self.ports_of: dict[int, list[Port]] = {4711: [Port(6379, "tcp")]}
        self.in_use: set[int] = set()
        self.manifest: Manifest | None = None
        self.time = 100.0

    def _ready(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def processes(self) -> list[ProcessLine]:
        self._ready()
        return list(self.lines)

    def obstacles(self, pid: int, options: Options) -> list[Obstacle]:
        self._ready()
        return list(self.in_the_way.get(pid, []))

    def probes(self) -> list[Probe]:
        return list(PROBES)

    def regions(self, pid: int, ticks: int) -> list[Region]:
        self._ready()
        if not any(line.pid == pid for line in self.lines):
            raise TargetGone("the process is gone", subject=f"process {pid}")
        return list(self.memory)

    def threads(self, pid: int) -> dict[int, str]:
        return {pid: "redis-server", pid + 1: "bio_close_file", pid + 2: "bio_aof"}

    def ports(self, pid: int) -> list[Port]:
        return self.ports_of.get(pid, [])

    def taken(self, port: Port) -> bool:
        return port.number in self.in_use

    def unfit(self, directory: Path) -> str:
        return "is there already" if directory.exists() else ""

    def unfit_file(self, file: Path) -> str:
        return "is a directory" if file.is_dir() else ""

    def save_tape(self, file: Path, tape: Tape) -> None:
        tape.save(file)

    def start(self, job: Job) -> Any:
        self.jobs.append(job)
        return self.feeds.pop(0)

    def rates(self) -> Rates:
        return Rates()

    def learn(self, report: Report) -> None:
        self.learnt.append(report)

    def adopt(self, report: Report) -> None:
        pass

    def end_copy(self, report: Report) -> bool:
        self.ended.append(report)
        return True

    def inspect(self, directory: Path) -> Manifest:
        self._ready()
        assert self.manifest is not None
        return self.manifest

    def stored_ports(self, manifest: Manifest) -> list[Port]:
        return self.ports_of[4711]

    def load_policy(self, file: Path) -> Policy:
        return load(file)

    def save_policy(self, file: Path, chosen: Policy) -> None:
        from tuimig.core.policy import dump

        self.save_report(file, dump(chosen))

    def save_report(self, file: Path, text: str) -> None:
        self.saved[file] = text

    def now(self) -> float:
        self.time += 2.0
        return self.time


Saved = tuple[list[bytes], bytes, bytes, bytes]  # events, state, fault records, outcome; encoded as on the socket


def keep(updates: list[Update], file: Path) -> None:
    """Write updates for `recording`."""

    def outcome(update: Update) -> object:
        if update.error is not None:
            return failure_of(update.error)
        return Done(update.report) if update.report is not None else update.heat

    saved: list[Saved] = [
        (
            [encode(event) for event in u.events],
            encode(u.state) if u.state else b"",
            u.faults.records,
            encode(outcome(u)) if u.over else b"",
        )
        for u in updates
    ]
    file.write_bytes(lzma.compress(msgspec.msgpack.encode(saved)))


def recording(name: str) -> list[Update]:
    """Updates of a real migration, as the console once polled them (tests/tui/record.py)."""
    data = lzma.decompress((RECORDINGS / f"{name}.xz").read_bytes())
    updates = []
    for events, state, records, outcome in msgspec.msgpack.decode(data, type=list[Saved]):
        last = decode(outcome) if outcome else None
        updates.append(
            Update(
                tuple(decode(event) for event in events),
                decode(state) if state else None,
                Batch(records, 0),
                report=last.report if isinstance(last, Done) else None,
                error=error_of(last) if isinstance(last, Failure) else None,
            )
        )
    return updates


def console(stage: Stage, pid: int | None = None, **settings: Any) -> Console:
    return Console(stage, replace(Settings(refresh_s=60.0), **settings), pid, threads=False)


def drive(app: Console, act: Callable[[Pilot[Any]], Awaitable[None]], size: tuple[int, int] = SMALL) -> None:
    """Runs it headless and does `act`."""

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await ready(pilot)
            await act(pilot)

    asyncio.run(run())


async def ready(pilot: Pilot[Any]) -> None:
    """The first screen, or that of the process the console was started for, is there."""
    await pilot.pause()
    while len(pilot.app.screen_stack) < (3 if pilot.app._pid in PIDS else 2):  # type: ignore[attr-defined]
        await pilot.pause()
    await pilot.pause()


def screen_text(app: Console) -> str:
    """What stands on the screen, line by line."""
    lines = []
    for strip in app.screen._compositor.render_strips():
        lines.append("".join(segment.text for segment in strip).rstrip())
    return "\n".join(lines)


def words(app: Console) -> str:
    """The same as one line of words: without boxes and line ends."""
    return " ".join("".join(" " if c in "│╭╮╰╯─" else c for c in screen_text(app)).split())


HEAT = Heat(2.0, {0x7FFFD0000000: 5000, 0x7FFFE4000000: 40, 0x555555800000: 400, 0x7FFFF7300000: 0})
ROOT = os.geteuid() == 0
