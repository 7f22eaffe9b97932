"""Each rule by which a process could be hurt, or a page be silently wrong, as a test of its own on a real process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import missing
from harness.command import start, tuimig
from harness.pictures import picture, settled, status, undisturbed
from harness.progress import sound
from harness.targets import NotHereError, Target, ask

Start = Callable[..., Target]


def in_the_window(target: Target, snapshot: Path, quiet: Path, number: int, *options: str) -> subprocess.Popen[str]:
    """Start a snapshot and send the target a signal as soon as the capture says that it has begun."""
    events = quiet.parent / f"events{os.urandom(3).hex()}"
    os.mkfifo(events)
    attempt = start("snapshot", target.pid, snapshot, "--precopy", "off", "--events", events, *options, temporary=quiet)
    with events.open() as lines:
        for line in lines:
            event = json.loads(line)
            if "capture" in (event.get("name"), event.get("phase")):
                target.signal(number)
                for _ in lines:  # let it write what it likes
                    pass
                break
    return attempt


def restored(snapshot: Path, target: Target, quiet: Path, copies: Any, *options: str | Path) -> Path:
    control = quiet.parent / f"copy{os.urandom(3).hex()}"
    done = tuimig("restore", snapshot, "--map-path", f"{target.control}={control}", *options, temporary=quiet)
    copies.add(done.report)
    return control


# ---------------------------------------------------------------- thread exit, fork, exec, exit in the window


@pytest.mark.parametrize("guard", ["auto", "on"])
def test_threads_that_end_in_the_window(targets: Start, place: Path, quiet: Path, guard: str) -> None:
    """The kernel's own stores at thread exit meet protected pages; lost ones would make a join hang for ever."""
    target = targets("exits", "--pace", 0, "--mutexes", 100000)
    for number in range(3):
        before = target.ask("check")
        snapshot = place / f"snap{number}"
        tuimig(
            "snapshot",
            target.pid,
            snapshot,
            "--precopy",
            "off",
            "--eager-below",
            "0",
            "--guard",
            guard,
            temporary=quiet,
        )
        for _ in range(2000):
            now = target.ask("check", timeout_s=10)
            if now["joined"] > before["joined"] + 50 and now["inherited"] > before["inherited"] + 50:
                break
        else:
            pytest.fail(f"a join or a lock hangs: {before} {now}")
        sound(now)
    undisturbed(target.pid)


@pytest.mark.parametrize("guard", ["auto", "on", "off"])
def test_exec_in_the_window(targets: Start, place: Path, quiet: Path, copies: Any, guard: str) -> None:
    """The new program runs; the picture is the old one, or the attempt says that it failed."""
    target = targets("ballast", "--mb", 600)
    attempt = in_the_window(target, place / "snap", quiet, signal.SIGUSR1, "--guard", guard)
    _, words = attempt.communicate(timeout=60)
    assert attempt.returncode in (0, 1, 4), words
    for _ in range(20000):
        try:
            answer = target.ask("check")
            if answer["reborn"]:
                break
        except (ConnectionError, ValueError):
            assert target.alive
    assert answer["reborn"] == 1
    sound(answer)
    undisturbed(target.pid)
    if attempt.returncode == 0:
        answer = ask(restored(place / "snap", target, quiet, copies), "check")
        sound(answer)
    if guard == "on":
        assert attempt.returncode == 0, words
        assert answer["reborn"] == 0  # the picture is of the program before


@pytest.mark.parametrize("guard", ["auto", "on", "off"])
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_exit_in_the_window(
    targets: Start, place: Path, quiet: Path, copies: Any, guard: str, number: signal.Signals
) -> None:
    target = targets("ballast", "--mb", 600)
    attempt = in_the_window(target, place / "snap", quiet, number, "--guard", guard)
    _, words = attempt.communicate(timeout=60)
    assert attempt.returncode in (0, 1, 4), words
    assert target.process.wait(timeout=20) == (3 if number == signal.SIGUSR2 else -signal.SIGKILL)
    if attempt.returncode == 0:
        done = tuimig("restore", place / "snap", temporary=quiet)
        copies.add(done.report)
        sound(target.ask("check"))
    else:
        assert not (place / "snap" / "manifest.json").exists()


def test_forks_of_a_copy_that_is_being_filled(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """Children see data, not zeros: each checks two megabytes the moment the copy runs."""
    target = targets("churn", "--pages", 40000, "--churn", "fork,vfork", "--pace", 0)
    tuimig("snapshot", target.pid, place / "snap", "--yes", temporary=quiet)
    sound(target.ask("check"))
    answer = ask(restored(place / "snap", target, quiet, copies), "check")
    sound(answer)


def test_memory_calls_of_a_copy_that_is_being_filled(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """munmap, MADV_DONTNEED, mremap, brk, thread exit and new stacks while most pages are missing."""
    target = targets("churn", "--pages", 60000, "--churn", "map,madvise,remap,brk,thread", "--pace", 0)
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    control = place / "copy.control"
    attempt = start("restore", place / "snap", "--map-path", f"{target.control}={control}", temporary=quiet)
    answers = []
    while attempt.poll() is None:
        try:
            answers.append(ask(control, "counts"))
        except (FileNotFoundError, ConnectionError):
            continue
    out, words = attempt.communicate()
    assert attempt.returncode == 0, words
    copies.add(json.loads(out))
    sound(ask(control, "check"))
    assert answers, "no answer came before the fill had ended: this test proves nothing"


def test_states_of_a_copy_that_is_being_filled(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    files = place / "files"
    files.mkdir()
    target = targets("states", "--dir", files, "--only", "all,bulk")
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    control = place / "copy.control"
    attempt = start("restore", place / "snap", "--map-path", f"{target.control}={control}", temporary=quiet)
    answer: dict[str, Any] = {}
    while not answer:
        try:
            answer = ask(control, "check")
        except (FileNotFoundError, ConnectionError):
            assert attempt.poll() in (None, 0)
    out, words = attempt.communicate()
    assert attempt.returncode == 0, words
    copies.add(json.loads(out))
    assert {name: text for name, text in answer.items() if text and name != "pid"} == {}


# ---------------------------------------------------------------- blocked calls, stops, signals


@pytest.mark.parametrize("guard", ["auto", "on"])
def test_blocked_calls_go_on(targets: Start, place: Path, quiet: Path, guard: str) -> None:
    """No call returns early or with EINTR, though every thread is stopped several times; each ends as it should."""
    target = targets("blocked", "--semaphore", 1)
    before = picture(target.pid)
    for number in range(5):
        tuimig("snapshot", target.pid, place / f"snap{number}", "--precopy", "off", "--guard", guard, temporary=quiet)
        answer = target.ask("check")
        early = {name for name in answer["returned"] if "nanosleep" not in name}  # those have a time of their own
        assert early == set(), answer
        sound(answer)
    if not answer["returned"]:
        assert picture(target.pid) == before
    sound(target.ask("release"))


def test_blocked_calls_go_on_in_the_copy(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    target = targets("blocked")
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    listener = f"{target.control}.accept"
    control = restored(place / "snap", target, quiet, copies, "--map-path", f"{listener}={place / 'accept'}")
    answer = ask(control, "check")
    assert {name for name in answer["returned"] if "nanosleep" not in name} == set(), answer
    sound(ask(control, "release"))
    sound(target.ask("release"))


def test_a_restarted_call_goes_on(targets: Start, place: Path, quiet: Path) -> None:
    """After SIGSTOP and SIGCONT the sleeping threads are inside restart_syscall."""
    target = targets("blocked")
    target.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, target.pid, os.WSTOPPED)
    target.signal(signal.SIGCONT)
    os.waitid(os.P_PID, target.pid, os.WCONTINUED)
    woken = target.ask("check")  # what a plain stop alone makes return, by signal(7), is not ours
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    answer = target.ask("check")
    early = {name for name in answer["returned"] if "nanosleep" not in name}
    assert early == set(woken["returned"])
    assert target.ask("release")["problems"] == len(woken["returned"])  # those, and no other


def test_a_stopped_process_stays_stopped(targets: Start, place: Path, quiet: Path) -> None:
    target = targets("churn", "--churn", "map,thread")
    target.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, target.pid, os.WSTOPPED | os.WNOWAIT)
    for number in range(2):
        tuimig("snapshot", target.pid, place / f"snap{number}", temporary=quiet)
        assert status(target.pid)["State"].strip().startswith("T (stopped)")
        assert status(target.pid)["TracerPid"].strip() == "0"
    target.signal(signal.SIGCONT)
    os.waitid(os.P_PID, target.pid, os.WCONTINUED)
    sound(target.ask("check"))


def test_a_stop_in_the_window(targets: Start, place: Path, quiet: Path) -> None:
    """SIGSTOP while pages are captured: it stops then, stays stopped, and goes on with SIGCONT."""
    target = targets("ballast", "--mb", 600)
    attempt = in_the_window(target, place / "snap", quiet, signal.SIGSTOP)
    _, words = attempt.communicate(timeout=60)
    assert attempt.returncode == 0, words
    os.waitid(os.P_PID, target.pid, os.WSTOPPED)
    assert status(target.pid)["State"].strip().startswith("T (stopped)")
    target.signal(signal.SIGCONT)
    sound(target.ask("check"))


def test_killed_around_the_injected_calls(targets: Start, place: Path, quiet: Path) -> None:
    """Death within the first milliseconds of holding the target, again and again: no borrowed register may be left."""
    target = targets("storm")
    before = picture(target.pid)
    chance = random.Random(9)
    killed = 0
    for number in range(25):
        snapshot = place / f"snap{number}"
        events = place / f"events{number}"
        os.mkfifo(events)
        attempt = start("snapshot", target.pid, snapshot, "--events", events, temporary=quiet)
        wanted = ("attach", "freeze")[number % 2]
        with events.open() as lines:
            for line in lines:
                event = json.loads(line)
                if wanted in (event.get("name"), event.get("phase")):
                    for _ in range(chance.randrange(60000)):
                        pass
                    attempt.kill()
                    break
        attempt.communicate()
        killed += attempt.returncode == -signal.SIGKILL
        assert target.alive
        settled(target.pid, before)
        undisturbed(target.pid)
    assert killed >= 15
    work = target.ask("check")["work"]
    while target.ask("check")["work"] <= work:
        assert target.alive
    assert target.ask("check")["problems"] == 0


# ---------------------------------------------------------------- what is refused, by name, before anything is stopped


def refused(target: Target, place: Path, quiet: Path, name: str) -> None:
    checked = tuimig("check", target.pid, expect=5, temporary=quiet)
    assert name in checked.stdout + checked.stderr
    done = tuimig("snapshot", target.pid, place / "snap", expect=5, temporary=quiet)
    assert name in done.stdout + done.stderr
    assert not (place / "snap").exists()
    undisturbed(target.pid)


@pytest.mark.parametrize(("state", "name"), [("uring", "io_uring"), ("aio", "aio")])
def test_kernel_queues_are_refused(targets: Start, place: Path, quiet: Path, state: str, name: str) -> None:
    """They change memory without a fault."""
    try:
        target = targets("states", "--only", state)
    except NotHereError as error:
        missing_feature(error)
    refused(target, place, quiet, name)
    assert target.ask("check")[state] == ""


def test_queued_datagrams_are_refused(targets: Start, place: Path, quiet: Path) -> None:
    """A look takes only the first of them; the others would be dropped in silence."""
    target = targets("states", "--only", "datagrams")
    refused(target, place, quiet, "unix-datagrams")
    assert target.ask("check")["datagrams"] == ""


def test_a_strict_filter_is_refused(targets: Start, place: Path, quiet: Path) -> None:
    """It would kill the target for what is injected; its filter cannot be read without being its tracer."""
    target = targets("strict")
    sound(target.ask("check"))
    refused(target, place, quiet, "seccomp")
    sound(target.ask("check"))
    assert target.alive


def missing_feature(error: Exception) -> None:
    """A kernel without the feature is nothing that continuous integration can promise."""
    pytest.skip(str(error))


def treatment_of(target: Target, quiet: Path, low_mib: int, high_mib: int, shared: bool) -> set[str]:
    """The treatments that the policy gives to regions of this size."""
    report = tuimig("maps", target.pid, "--protect", "anon", temporary=quiet).report
    found = set()
    for decision in report["decisions"]:
        region = decision["region"]
        size = region["end"] - region["start"]
        perms = region["perms"]
        if low_mib << 20 <= size <= high_mib << 20 and perms.startswith("rw") and (perms[3] == "s") == shared:
            found.add(decision["treatment"])
    return found


def test_shared_memory_is_eager(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """Writes through another mapping cause no fault, so it is copied while everything is stopped."""
    target = targets("states", "--only", "shared")
    assert treatment_of(target, quiet, 2, 2, shared=True) == {"eager"}
    tuimig("snapshot", target.pid, place / "snap", "--verify", "--yes", temporary=quiet)
    assert ask(restored(place / "snap", target, quiet, copies), "check")["shared"] == ""


def test_mergeable_memory_is_eager(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """KSM drops the protection of a page that it merges, and stores then cause no fault."""
    try:
        target = targets("states", "--only", "mergeable")
    except NotHereError as error:
        missing_feature(error)
    assert treatment_of(target, quiet, 4, 4, shared=False) == {"eager"}
    tuimig("snapshot", target.pid, place / "snap", "--verify", temporary=quiet)
    assert ask(restored(place / "snap", target, quiet, copies), "check")["mergeable"] == ""


def test_huge_pages_are_not_split(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    target = targets("ballast", "--mb", 256, "--huge", 1)
    before = huge_kib(target.pid)
    if before < 200 * 1024:
        missing("needs transparent huge pages")
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    assert huge_kib(target.pid) >= before - 2048
    sound(ask(restored(place / "snap", target, quiet, copies), "check"))
    sound(target.ask("check"))


def huge_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def test_writers_in_the_window(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """Random writes all over while pages are captured: the picture holds the sum that T0 had."""
    target = targets("ballast", "--mb", 400)
    target.ask(f"begin {10**12}")
    options = ("--verify", "--precopy", "off")  # or there may be no window
    report = tuimig("snapshot", target.pid, place / "snap", *options, temporary=quiet).report
    assert report["wp_faults"] > 100
    target.ask("end")
    sound(target.ask("check"))
    control = restored(place / "snap", target, quiet, copies)
    ask(control, "end")
    sound(ask(control, "check"))
