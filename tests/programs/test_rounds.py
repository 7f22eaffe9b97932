"""Snapshots with pre-copy: exact under `--verify`, and by the program's own invariant when restored."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import redis
from harness.command import start, tuimig
from harness.progress import goes_on, sound
from harness.targets import Target, ask

from tuimig.core.snapshot import open_snapshot

EVERYTHING = "map,madvise,remap,brk,fork,vfork,thread,pipe,flip,huge,stack"


def taken(target: Target, snapshot: Path, quiet: Path, *options: str | int) -> dict[str, Any]:
    report = tuimig("snapshot", target.pid, snapshot, "--verify", "--yes", *options, temporary=quiet).report
    sound(target.ask("check"))
    return report


def copy_goes_on(target: Target, snapshot: Path, place: Path, quiet: Path, copies: Any, kinds: str) -> None:
    """A copy is sound, and every churner and writer of it makes progress."""
    control = place / "copy.control"
    copies.add(tuimig("restore", snapshot, "--map-path", f"{target.control}={control}", temporary=quiet).report)
    goes_on(lambda command: ask(control, command), kinds)
    copies.end()
    control.unlink(missing_ok=True)


def in_a_row(
    number: int, targets: Callable[..., Target], place: Path, quiet: Path, copies: Any, restore_each: int, pace_us: int
) -> None:
    target = targets("churn", "--pages", 600, "--writers", 2, "--churn", EVERYTHING, "--pace", pace_us)
    valid = 0
    for n in range(number):
        snapshot = place / f"snap{n}"
        report = taken(target, snapshot, quiet)
        assert report["precopy"]["rounds"]
        valid += report["precopy"]["valid_pages"]
        if n % restore_each == 0:
            with target.resting():
                copy_goes_on(target, snapshot, place, quiet, copies, EVERYTHING)
        for name in ("pages", "sums", "manifest.json"):
            (snapshot / name).unlink()
    assert valid > 100 * number, "nothing of the rounds was of use: this test proves nothing"


def test_twenty_in_a_row(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any) -> None:
    in_a_row(20, targets, place, quiet, copies, 7, 4000)


@pytest.mark.soak
def test_two_hundred_in_a_row(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any) -> None:
    in_a_row(200, targets, place, quiet, copies, 4, 2000)


@pytest.mark.parametrize("options", [(), ("--precopy", "3"), ("--precopy", "1")])
def test_who_writes_everything_ends_exactly(
    targets: Callable[..., Target], place: Path, quiet: Path, copies: Any, options: tuple[str, ...]
) -> None:
    """Each page is dirtied all the time. It ends, and the writer is not starved meanwhile."""
    target = targets("churn", "--pages", 200, "--churn", "all", "--all-pages", 20_000)
    before = target.ask("counts")["rounds"]["all"]
    report = taken(target, place / "snap", quiet, *options)
    assert report["precopy"]["ended"] in ("freeze", "window")
    assert report["precopy"]["why"]
    if "1" in options:  # one round knows nothing of what is written
        assert report["precopy"]["ended"] == "window"
    assert target.ask("counts")["rounds"]["all"] > before
    copy_goes_on(target, place / "snap", place, quiet, copies, "all")


def test_faults_are_answered_with_the_priority_that_we_have(
    targets: Callable[..., Target], place: Path, quiet: Path
) -> None:
    """Pre-copy is gentle, and what is started after it would inherit that."""
    target = targets("churn", "--pages", 200, "--churn", "all", "--all-pages", 20_000)
    attempt = start("snapshot", target.pid, place / "snap", "--precopy", "1", temporary=quiet)
    seen: dict[str, int] = {}
    while attempt.poll() is None:
        for task in Path(f"/proc/{attempt.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                name = (task / "comm").read_text().strip()
                seen[name] = os.getpriority(os.PRIO_PROCESS, int(task.name))
    assert attempt.wait() == 0
    assert seen["tm-fault"] == seen["tm-sweep"] == os.getpriority(os.PRIO_PROCESS, 0)


def test_an_idle_process_needs_no_window(targets: Callable[..., Target], place: Path, quiet: Path) -> None:
    target = targets("ballast", "--mb", 96)
    report = tuimig("snapshot", target.pid, place / "snap", "--verify", temporary=quiet).report
    assert report["precopy"]["ended"] == "freeze"
    assert report["precopy"]["valid_pages"] > 96 * 250
    with open_snapshot(place / "snap") as snapshot:
        stored = sum(region.pages for region in snapshot.manifest.regions)
    assert report["bytes"] // 4096 - report["zero_pages"] == stored
    assert (report["wp_faults"], report["swept_pages"], report["guard_stops"]) == (0, 0, 0)
    assert "arm" not in report["frozen"] or report["frozen"]["arm"] < 1000
    assert tuimig("verify", place / "snap", temporary=quiet).code == 0


def test_exec_in_the_rounds_is_a_clear_end(targets: Callable[..., Target], place: Path, quiet: Path) -> None:
    target = targets("ballast", "--mb", 256)
    events = place / "events"
    attempt = start("snapshot", target.pid, place / "snap", "--events", events, temporary=quiet)
    while attempt.poll() is None and (not events.exists() or '"precopy"' not in events.read_text()):
        pass
    target.signal(signal.SIGUSR1)  # it executes itself anew
    _, words = attempt.communicate(timeout=60)
    assert attempt.returncode in (1, 4), words
    assert "internal error" not in words
    assert not (place / "snap" / "manifest.json").exists()
    assert target.alive


def test_redis_under_writes(need: Callable[..., None], place: Path, quiet: Path, copies: Any) -> None:
    """Each snapshot under load is exact, and restores to a server that answers with the data of T0."""
    need("redis-server", root=True)
    server = redis.Redis(place / "redis")
    try:
        redis.populate(server.port, 40)
        with redis.load(server.port):
            for n in range(4):
                snapshot = place / f"snap{n}"
                options = ("--tcp", "close", "--verify")
                report = tuimig("snapshot", server.pid, snapshot, *options, temporary=quiet).report
                assert report["precopy"]["valid_pages"] > 5000
        port = redis.free_port()
        ports = f"{server.port}:{port}"
        copies.add(tuimig("restore", place / "snap3", "--map-port", ports, temporary=quiet).report)
        with redis.connect(port) as copy:
            chosen = random.Random(3).sample(range(10_000), 50)
            assert all(copy("GET", f"fill:{n}")[:12] == b"%012d" % n for n in chosen)
    finally:
        server.stop()
