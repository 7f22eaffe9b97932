"""Fixtures for tests on real processes: targets, copies, and the proof that nothing is left of either.

This process is the subreaper of all it starts, so a copy that outlives the command that built it is found and ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import pictures
from harness.targets import Target, compiled, end

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """What is started in the background or by nohup ignores signals, and hands that on to all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def missing(reason: str) -> None:
    """Skips with a reason; fails where continuous integration promises that everything is there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to provide this: {reason}")
    pytest.skip(reason)


@pytest.fixture
def need() -> Callable[..., None]:
    """`need("redis-server", root=True)`: skip, or fail under CI=true, where it is not there."""

    def check(*programs: str, root: bool = False) -> None:
        if root and os.geteuid() != 0:
            missing("needs root")
        for program in programs:
            if not shutil.which(program):
                missing(f"needs the program {program}")

    return check


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path (unix socket names are short) that every user may enter; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="mig-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Copies:
    """The copies that a test has made; ended with their init when it is over."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def add(self, report: dict[str, Any]) -> int:
        self.reports.append(report)
        pid: int = report["new_pid"]
        return pid

    def end(self) -> None:
        for report in self.reports:
            for key in ("new_pid", "init_pid"):
                if report.get(key):
                    end(report[key])
        self.reports.clear()


@pytest.fixture
def copies(quiet: Path) -> Iterator[Copies]:
    made = Copies()  # `quiet` comes first, so that it looks last
    yield made
    made.end()


@pytest.fixture
def targets(place: Path, quiet: Path) -> Iterator[Callable[..., Target]]:
    """`targets("churn", "--pages", 100)`: a C target with a control socket, running and ready."""
    started: list[Target] = []

    def start(name: str, *args: str | int, **kwargs: Any) -> Target:
        control = place / f"{name}{len(started)}.control"
        argv = [compiled(name), *map(str, args), "--control", str(control)]
        target = Target(argv, directory=place, control=control, **kwargs)
        started.append(target)
        return target

    yield start
    for target in started:
        target.stop()


@pytest.fixture
def quiet(place: Path) -> Iterator[Path]:
    """A directory for the command's temporary files. Afterwards no file, process or namespace may be left."""
    temporary = place / "temporary"
    temporary.mkdir()
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    space = os.readlink("/proc/self/ns/pid")
    yield temporary
    assert list(temporary.iterdir()) == [], "temporary files are left behind"
    left = []
    for process in psutil.Process().children(recursive=True):
        if process.pid in mine:
            continue
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)  # an orphan that came to us; it is over
                continue
            with contextlib.suppress(psutil.TimeoutExpired):  # a target's own child may be on its way out
                process.wait(2)
                continue
            left.append(f"{process.pid} {process.name()} {process.cmdline()}")
            if os.readlink(f"/proc/{process.pid}/ns/pid") != space:
                left.append(f"{process.pid} keeps a PID namespace")
        except (psutil.NoSuchProcess, FileNotFoundError, ChildProcessError):
            continue
        end(process.pid)
    assert left == [], "processes are left behind"


@pytest.fixture
def undisturbed() -> Callable[[int], None]:
    return pictures.undisturbed
