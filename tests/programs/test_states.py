"""A process with one of every kind of state checks itself: the source after a snapshot, copies after a restore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.command import tuimig
from harness.pictures import picture
from harness.targets import Target, ask

NAMES = {
    "anonymous", "sparse", "huge", "protections", "flags", "break", "stack", "shared", "file",
    "pipes", "socketpairs", "files", "events", "registers", "crew", "leader",
    "actions", "pending", "itimers", "proc", "clocks", "control",
}  # fmt: skip


def problems(answer: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in answer.items() if name != "pid" and text}


@pytest.fixture
def states(targets: Callable[..., Target], place: Path) -> Target:
    files = place / "files"
    files.mkdir()
    files.chmod(0o777)
    return targets("states", "--dir", files)


@pytest.mark.parametrize("fill", ["lazy", "full"])
def test_copy_beside_its_source(
    states: Target, place: Path, quiet: Path, copies: Any, undisturbed: Callable[[int], None], fill: str
) -> None:
    before = picture(states.pid)
    tuimig("snapshot", states.pid, place / "snap", "--verify", temporary=quiet)
    undisturbed(states.pid)
    assert picture(states.pid) == before
    other = place / "copy.control"
    full = ["--full"] if fill == "full" else []
    done = tuimig("restore", place / "snap", "--map-path", f"{states.control}={other}", *full, temporary=quiet)
    copy = copies.add(done.report)
    undisturbed(copy)
    answer = ask(other, "check")
    assert problems(answer) == {}
    assert answer.keys() - {"pid"} == NAMES
    assert answer["pid"] == states.pid  # inside its namespace it has the id it always had
    assert problems(states.ask("check")) == {}


def test_same_id_after_the_source_ended(states: Target, place: Path, quiet: Path, copies: Any) -> None:
    tuimig("snapshot", states.pid, place / "snap", temporary=quiet)
    states.stop()
    report = tuimig("restore", place / "snap", temporary=quiet).report
    assert copies.add(report) == states.pid
    assert report["init_pid"] is None
    assert problems(states.ask("check")) == {}


def test_a_copy_can_be_copied_again(states: Target, place: Path, quiet: Path, copies: Any) -> None:
    control = states.control
    paths = [place / "second.control", place / "third.control"]
    source = states.pid
    for generation, path in enumerate(paths):
        snapshot = place / f"snap{generation}"
        tuimig("snapshot", source, snapshot, "--yes", temporary=quiet)  # a copy has a mount namespace of its own
        done = tuimig("restore", snapshot, "--map-path", f"{control}={path}", temporary=quiet)
        source, control = copies.add(done.report), path
    assert problems(ask(paths[1], "check")) == {}


def test_of_another_user(targets: Callable[..., Target], place: Path, quiet: Path, copies: Any, need: Any) -> None:
    """Without privilege of its own, so its userfaultfd comes from /dev/userfaultfd; the copy has its identity."""
    need(root=True)
    files = place / "files"
    files.mkdir()
    files.chmod(0o777)
    place.chmod(0o777)
    target = targets("states", "--dir", files, "--without", "control", user=65534)
    before = picture(target.pid)
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    assert picture(target.pid) == before
    other = place / "copy.control"
    done = tuimig("restore", place / "snap", "--map-path", f"{target.control}={other}", temporary=quiet)
    copies.add(done.report)
    assert problems(ask(other, "check")) == {}
    assert problems(target.ask("check")) == {}


def test_descriptor_table_full(targets: Callable[..., Target], place: Path, quiet: Path, need: Any) -> None:
    """Another user's process needs descriptors of its own for a moment; with none to be had it must not be harmed."""
    need(root=True)
    place.chmod(0o777)
    target = targets("states", "--only", "anonymous,descriptors_full", user=65534)
    before = picture(target.pid)
    done = tuimig("snapshot", target.pid, place / "snap", expect=None, temporary=quiet)
    assert done.code in (0, 5), done.stderr
    if done.code:
        assert "descriptor" in done.stderr.lower(), done.stderr
    assert picture(target.pid) == before
