"""Snapshots of a process that never sits still: exact under `--verify`, and by its own invariant when restored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.command import tuimig
from harness.progress import goes_on, sound
from harness.targets import Target, ask

CHURN = "map,madvise,remap,brk,fork,vfork,thread,pipe"


def restored(snapshot: Path, target: Target, place: Path, quiet: Path, copies: Any, *options: str) -> Path:
    control = place / "copy.control"
    done = tuimig("restore", snapshot, "--map-path", f"{target.control}={control}", *options, temporary=quiet)
    copies.add(done.report)
    return control


@pytest.mark.slow
def test_twenty_snapshots(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any) -> None:
    target = targets("churn", "--pages", 1500, "--writers", 2, "--churn", CHURN, "--pace", 4000)
    for number in range(20):
        snapshot = place / f"snap{number}"
        report = tuimig("snapshot", target.pid, snapshot, "--verify", "--yes", temporary=quiet).report
        assert report["verified_pages"] >= 1500 * 2
        sound(target.ask("check"))
        with target.resting():
            control = restored(snapshot, target, place, quiet, copies, *(["--full"] if number % 4 == 3 else []))
            goes_on(lambda command, path=control: ask(path, command), CHURN)
            copies.end()
        for name in ("pages", "sums", "manifest.json"):
            (snapshot / name).unlink()
    goes_on(target.ask, CHURN)


@pytest.mark.parametrize("guard", ["on", "auto"])
def test_frees_without_an_event_are_survived(
    targets: Callable[..., Target], place: Path, quiet: Path, copies: Any, guard: str
) -> None:
    """MADV_GUARD_INSTALL throws pages away and tells nobody; the guard must see the call itself."""
    kinds = "map,madvise,guard"
    target = targets("churn", "--pages", 20000, "--churn", kinds, "--pace", 300)
    tuimig("snapshot", target.pid, place / "snap", "--verify", "--precopy", "off", "--guard", guard, temporary=quiet)
    sound(target.ask("check"))
    control = restored(place / "snap", target, place, quiet, copies)
    goes_on(lambda command: ask(control, command), kinds)


def test_without_the_guard_a_loss_fails(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any) -> None:
    """What is lost is said: exit code 1, or nothing was lost and the picture is exact."""
    target = targets("churn", "--pages", 30000, "--churn", "madvise,guard,map", "--pace", 0)
    lost = 0
    for number in range(20):
        snapshot = place / f"snap{number}"
        # all that is freed is protected memory, whatever its size
        options = ("--guard", "off", "--eager-below", "4KiB", "--precopy", "off")
        done = tuimig("snapshot", target.pid, snapshot, *options, expect=None, temporary=quiet)
        if done.code == 1:
            lost += 1
            assert done.report["error"] == "CaptureLost", done.stderr
            assert not (snapshot / "manifest.json").exists()
        elif done.code == 5:  # guard pages at T0 itself
            assert "guard pages" in done.stderr
        else:
            assert done.code == 0, done.stderr
            control = restored(snapshot, target, place, quiet, copies)
            sound(ask(control, "check"))
            copies.end()
        sound(target.ask("check"))
        if lost:
            break
    assert lost, "the churn never met the window: this test proves nothing"


def test_every_treatment_gives_the_same_picture(
    targets: Callable[..., Target], place: Path, quiet: Path, copies: Any
) -> None:
    target = targets("churn", "--pages", 1000, "--churn", "map,thread,pipe")
    for number, policy in enumerate((["--eager-below", "1G"], ["--eager-below", "0"], ["--protect", "stack"])):
        snapshot = place / f"snap{number}"
        report = tuimig("snapshot", target.pid, snapshot, "--verify", *policy, temporary=quiet).report
        assert (report["protected_bytes"] == 0) == (number == 0)
        control = restored(snapshot, target, place, quiet, copies)
        goes_on(lambda command, path=control: ask(path, command), "map,thread,pipe")
        copies.end()


def test_the_end_of_a_capture_holds_up_nobody(targets: Callable[..., Target], place: Path, quiet: Path) -> None:
    """A thread that frees memory right then waits for its event to be read: it was, after 25 seconds."""
    target = targets("churn", "--pages", 30_000, "--churn", "madvise,guard,map", "--pace", 0)
    options = ("--guard", "off", "--eager-below", "4KiB", "--precopy", "off")
    for number in range(6):
        snapshot = place / f"snap{number}"
        done = tuimig("snapshot", target.pid, snapshot, *options, expect=None, temporary=quiet)
        assert done.code in (0, 1, 5), done.stderr  # 1: lost; 5: guard pages at T0 itself
        if done.code == 0:
            assert done.report["total_us"] < 20_000_000
            shutil.rmtree(snapshot)
    sound(target.ask("check"))


def test_more_eager_memory_than_the_buffer_of_the_freeze_holds(
    targets: Callable[..., Target], place: Path, quiet: Path, copies: Any
) -> None:
    target = targets("churn", "--pages", 200, "--churn", "all,flip", "--all-pages", 12_000)
    for number, form in enumerate((["--precopy", "off"], [])):
        snapshot = place / f"snap{number}"
        options = ("--verify", "--eager-below", "1G", *form)
        report = tuimig("snapshot", target.pid, snapshot, *options, temporary=quiet).report
        assert report["eager_bytes"] > 12_000 * 4096
        control = restored(snapshot, target, place, quiet, copies)
        goes_on(lambda command, path=control: ask(path, command), "all,flip")
        copies.end()


def test_robust_mutexes_and_joins(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any) -> None:
    """The kernel's stores when a thread exits reach protected pages of the source and missing pages of the copy."""
    target = targets("exits", "--pace", 100)
    for number in range(4):
        snapshot = place / f"snap{number}"
        form = ["--precopy", ("off", "auto")[number % 2]]
        tuimig("snapshot", target.pid, snapshot, "--eager-below", "0", *form, temporary=quiet)
        control = restored(snapshot, target, place, quiet, copies)
        for question in (target.ask, lambda command, path=control: ask(path, command)):
            before = question("check")
            for _ in range(2000):
                now = question("check")
                if now["joined"] > before["joined"] + 20 and now["inherited"] > before["inherited"] + 20:
                    break
            else:
                pytest.fail(f"a join or a lock hangs: {before} {now}")
            sound(now)
        copies.end()
