"""CPython with threads, asyncio and its timers, sqlite, a socket pair, a pipe and unflushed buffers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.command import tuimig
from harness.pictures import undisturbed
from harness.targets import Target, ask


@pytest.fixture
def interpreter(place: Path, quiet: Path) -> Iterator[Target]:
    control = place / "python.control"
    argv = [sys.executable, Path(__file__).with_name("interpreter.py"), place, control]
    target = Target(argv, directory=place, control=control)
    yield target
    target.stop()


def goes_on(question: Callable[[str], dict[str, Any]]) -> None:
    before = question("check")
    assert before["wrong"] == []
    for _ in range(2000):
        now = question("counts")
        if now["ticks"] > before["ticks"] + 3 and min(now["counts"]) > max(before["counts"]):
            break
    else:
        pytest.fail(f"stands still: {before} {now}")
    assert question("check")["wrong"] == []


@pytest.mark.parametrize("fill", ["lazy", "full"])
def test_restored_beside_its_source(interpreter: Target, place: Path, quiet: Path, copies: Any, fill: str) -> None:
    tuimig("snapshot", interpreter.pid, place / "snap", "--verify", temporary=quiet)
    undisturbed(interpreter.pid)
    other = place / "copy.control"
    options = ["--map-path", f"{interpreter.control}={other}", *(["--full"] if fill == "full" else [])]
    report = tuimig("restore", place / "snap", *options, temporary=quiet).report
    copies.add(report)
    goes_on(lambda command: ask(other, command))
    goes_on(interpreter.ask)


def test_clone(interpreter: Target, place: Path, quiet: Path, copies: Any) -> None:
    other = place / "copy.control"
    report = tuimig("clone", interpreter.pid, "--map-path", f"{interpreter.control}={other}", temporary=quiet).report
    copies.add(report)
    goes_on(lambda command: ask(other, command))
    goes_on(interpreter.ask)
