"""How long the target stands still: Redis of several sizes, idle and under writes; a program that writes everything.

Beside it fork() in the same process and, where a working criu (4.1 or newer) is installed, its dump. Asked: idle
at most 2 ms and 0.5 ms a gigabyte, 6 ms at 8 GB; under 20,000 SET/s at 1 GB 10 ms; at 4 GB a fifth of fork().
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import COPIES, SPARE, Figures, arguments, ballast, directory, warm
from harness import redis
from harness.command import tuimig

VALUE_BYTES = 4000
IDLE_MS, IDLE_MS_PER_GB, IDLE_MS_AT_8GB = 2.0, 0.5, 6.0
BUSY_MS = 10.0
FORK_RATIO = 5.0
CRIU_RATIO = 50.0
RATES = {"idle": 0, "1k writes/s": 1000, "20k writes/s": 20_000}


@dataclass(frozen=True)
class Freeze:
    frozen_ms: float
    fork_ms: float
    parts: dict[str, float]  # ms
    ended: str


def fork_ms(server: redis.Redis) -> float:
    """What Redis itself says that its last fork took."""
    with server.client() as client:
        client("BGSAVE")
        while client.info("persistence")["rdb_bgsave_in_progress"] == "1":
            pass
        return int(client.info("stats")["latest_fork_usec"]) / 1000


def frozen(pid: int, place: Path) -> dict[str, Any]:
    report = tuimig("snapshot", pid, place / "snap", "--tcp", "close", timeout_s=600).report
    shutil.rmtree(place / "snap")
    return report


def measure(server: redis.Redis, place: Path, rounds: int) -> Freeze:
    """Medians; fork and freeze take turns, so that both meet the same machine."""
    forks, reports = [], []
    for _ in range(rounds):
        forks.append(fork_ms(server))
        reports.append(frozen(server.pid, place))
    middle = sorted(reports, key=lambda report: report["frozen_us"])[len(reports) // 2]
    parts = {name: us / 1000 for name, us in middle["frozen"].items()}
    return Freeze(middle["frozen_us"] / 1000, statistics.median(forks), parts, middle["precopy"]["ended"])


@contextlib.contextmanager
def writes(server: redis.Redis, rate: int) -> Iterator[None]:
    """SETs of the present keys at that rate, by a client of our own."""
    if not rate:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_write, args=(server.port, rate, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write(port: int, rate: int, over: threading.Event) -> None:
    source, value = random.Random(1), "x" * VALUE_BYTES
    batch = max(1, rate // 200)
    with redis.Client(port) as client:
        begin, sent = time.monotonic(), 0
        while not over.is_set():
            client.pipeline([("SET", f"key:{source.randrange(50_000)}", value) for _ in range(batch)])
            sent += batch
            over.wait(max(0.0, begin + sent / rate - time.monotonic()))


def criu() -> str | None:
    """The program, if it is new enough and says that it works here."""
    program = shutil.which("criu")
    if program is None:
        return None
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", version)
    works = subprocess.run([program, "check"], capture_output=True).returncode == 0
    return program if found and (int(found[1]), int(found[2])) >= (4, 1) and works else None


def criu_frozen_ms(program: str, server: redis.Redis, place: Path) -> float:
    images = place / "images"
    images.mkdir()
    command = [program, "dump", "-t", str(server.pid), "-D", str(images), "--leave-running", "--tcp-close"]
    subprocess.run([*command, "--shell-job", "--display-stats"], check=True, capture_output=True)
    shown = subprocess.run(["crit", "show", str(images / "stats-dump")], capture_output=True, text=True).stdout
    shutil.rmtree(images)
    found = re.search(r'"frozen_time":\s*(\d+)', shown)
    return int(found[1]) / 1000 if found else float("nan")


@contextlib.contextmanager
def server_of(place: Path, megabytes: int) -> Iterator[redis.Redis]:
    warm(COPIES * megabytes + SPARE)
    server = redis.Redis(place / "redis")
    try:
        with server.client() as client:
            keys = int(megabytes * 1e6 / (VALUE_BYTES * 1.2))
            client("DEBUG", "POPULATE", keys, "key", VALUE_BYTES)
        yield server
    finally:
        server.stop()
        shutil.rmtree(place / "redis", ignore_errors=True)


def bounds(figures: Figures, megabytes: int, name: str, found: Freeze) -> None:
    label = f"{megabytes} MB, {name}"
    idle = IDLE_MS + IDLE_MS_PER_GB * megabytes / 1000
    if name == "idle":
        figures.at_most(f"{label}: frozen", found.frozen_ms, min(idle, IDLE_MS_AT_8GB), "ms")
    elif name == "20k writes/s" and megabytes == 1000:
        figures.at_most(f"{label}: frozen", found.frozen_ms, BUSY_MS, "ms")
    else:
        figures.context(f"{label}: frozen", found.frozen_ms, "ms")
    for part, ms in sorted(found.parts.items(), key=lambda item: -item[1])[:4]:
        figures.context(f"{label}: of it {part}", ms, "ms")
    figures.context(f"{label}: fork()", found.fork_ms, "ms")
    if megabytes == 4000 and name == "idle":
        figures.at_least(f"{label}: fork() / frozen", found.fork_ms / found.frozen_ms, FORK_RATIO, "")


def writes_everything(figures: Figures, megabytes: int, place: Path) -> None:
    """Each page is dirtied all the time: it ends in the window."""
    with ballast(place, megabytes) as target:
        target.ask("begin 1000000000")
        try:
            report = frozen(target.pid, place)
        finally:
            target.ask("end")
    label = f"{megabytes} MB, all pages"
    figures.context(f"{label}: frozen", report["frozen_us"] / 1000, "ms")
    figures.context(f"{label}: until all is captured", report["total_us"] / 1000, "ms")


def main() -> int:
    options = arguments(__doc__ or "", sizes="250,1000,4000,8000")
    figures = Figures("frozen time")
    program = criu()
    for megabytes in map(int, options.sizes.split(",")):
        with directory() as place, server_of(place, megabytes) as server:
            idle = None
            for name, rate in RATES.items():
                with writes(server, rate):
                    found = measure(server, place, options.rounds)
                idle = idle or found
                bounds(figures, megabytes, name, found)
            if program and idle:
                dump = criu_frozen_ms(program, server, place)
                figures.context(f"{megabytes} MB: criu dump frozen", dump, "ms")
                if megabytes == 1000:
                    figures.at_least("1000 MB, idle: criu / frozen", dump / idle.frozen_ms, CRIU_RATIO, "")
        with directory() as place:
            writes_everything(figures, megabytes, place)
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
