"""SIGKILL to the command at random moments, under a storm of signals and with threads that come and go.

The target must not notice: it lives, counts every signal, keeps its invariant, and nothing of ours is left in it.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.command import start, tuimig
from harness.pictures import picture, settled
from harness.targets import Target, compiled

KILLS = 50


def duration_s(target: Target, place: Path) -> float:
    """How long an attempt that nobody disturbs takes."""
    begin = time.monotonic()
    tuimig("snapshot", target.pid, place / "whole", "--yes", expect=None)
    shutil.rmtree(place / "whole", ignore_errors=True)
    return time.monotonic() - begin


def kill_in_the_middle(target: Target, directory: Path, delay_s: float, *options: str) -> int:
    attempt = start("snapshot", target.pid, directory, "--yes", *options)
    try:
        attempt.wait(delay_s)  # not a synchronisation: the moment is meant to be random
    except subprocess.TimeoutExpired:
        attempt.kill()
    attempt.communicate()
    shutil.rmtree(directory, ignore_errors=True)
    return attempt.returncode


class Killer:
    """Kills attempts at random moments. One that was over before its moment has shown how long they take by now."""

    def __init__(self, place: Path, seed: int, whole_s: float) -> None:
        self.killed = 0
        self._place = place
        self._chance = random.Random(seed)
        self._whole_s = whole_s

    def strike(self, victim: Target, *options: str) -> None:
        begin = time.monotonic()
        code = kill_in_the_middle(victim, self._place / "k", self._chance.uniform(0.2, 1.05) * self._whole_s, *options)
        assert code in (0, 1, -signal.SIGKILL)  # 1: too busy to be stopped; it runs on
        if code == -signal.SIGKILL:
            self.killed += 1
        else:
            self._whole_s = min(self._whole_s, time.monotonic() - begin)


@pytest.mark.slow
def test_no_signal_is_lost(
    targets: Callable[..., Target], place: Path, quiet: Path, undisturbed: Callable[[int], None]
) -> None:
    target = targets("storm")
    before = picture(target.pid)
    killer = Killer(place, 20, duration_s(target, place))
    sender = subprocess.Popen(
        [str(compiled("storm")), "--send", str(target.pid), "--count", "100000000", "--pace", "200"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for number in range(KILLS):
            killer.strike(target, *(["--guard", "on"] if number % 5 == 4 else []))
            assert target.alive
    finally:
        sender.terminate()
    words, _ = sender.communicate(timeout=120)
    sent = json.loads(words)
    assert killer.killed >= KILLS // 2
    for _ in range(2000):
        now = target.ask("check")
        if now["handled"] >= sent["sent"] and now["waited"] >= sent["sent"]:
            break
    assert now["problems"] == 0, now["first"]
    assert (now["handled"], now["handled_sum"]) == (sent["sent"], sent["sum"])
    assert (now["waited"], now["waited_sum"]) == (sent["sent"], sent["sum"])
    undisturbed(target.pid)
    settled(target.pid, before)


@pytest.mark.slow
def test_churn_goes_on(
    targets: Callable[..., Target], place: Path, quiet: Path, undisturbed: Callable[[int], None]
) -> None:
    target = targets("churn", "--pages", 1500, "--pace", 2000)
    exits = targets("exits")
    killers = {one: Killer(place, 21, duration_s(one, place)) for one in (target, exits)}
    for number in range(KILLS // 2):
        victim = exits if number % 3 == 2 else target
        killers[victim].strike(victim)
        answer = target.ask("check", timeout_s=20)
        assert answer["problems"] == 0, answer["first"]
    assert sum(killer.killed for killer in killers.values()) >= KILLS // 4
    for one in (target, exits):
        before = one.ask("check")
        for _ in range(5000):
            now = one.ask("counts", timeout_s=20)
            if one is exits and now["joined"] > before["joined"] and now["inherited"] > before["inherited"]:
                break
            if one is target and all(now["rounds"][k] > before["rounds"][k] for k in ("thread", "fork", "map")):
                break
        else:
            pytest.fail(f"stands still: {before} {now}")
        undisturbed(one.pid)


def test_a_quiet_process_is_left_as_it_was(targets: Callable[..., Target], place: Path, quiet: Path) -> None:
    """Killed at moments spread evenly over the attempt; descriptors, maps, threads and masks are compared each time.

    Killed between a thread's stop and the repair of its call we leave it what any stop does: EINTR from the calls that
    signal(7) lists. A program that waits in them has to be patient; no other call may show anything.
    """
    target = targets("blocked", "--nap", 600, "--patient", 1)
    before = picture(target.pid)
    whole = duration_s(target, place)
    for number in range(12):
        kill_in_the_middle(target, place / f"k{number}", whole * (0.3 + 0.06 * number))
        settled(target.pid, before)
    assert target.ask("release")["problems"] == 0


def test_an_unfinished_snapshot_says_so(targets: Callable[..., Target], place: Path, quiet: Path) -> None:
    target = targets("churn", "--pages", 40000, "--churn", "map")
    for number in range(6):
        directory = place / f"k{number}"
        attempt = start("snapshot", target.pid, directory)
        for _ in range(100000):
            if (directory / "pages").exists() or attempt.poll() is not None:
                break
        attempt.kill()
        attempt.communicate()
        if attempt.returncode == -signal.SIGKILL and directory.exists():
            break
    else:
        pytest.fail("never killed in the middle")
    done = tuimig("verify", directory, expect=1)
    assert "unfinished" in done.stderr, done.stderr
    done = tuimig("restore", directory, expect=1)
    assert "unfinished" in done.stderr, done.stderr
