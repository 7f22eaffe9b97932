"""The journals of moves that are over: what is read of them, what is said, what may be removed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuimig.core import check, journals, procfs
from tuimig.core.errors import UsageError
from tuimig.core.journal import Journal
from tuimig.core.model import Options

SESSION = "0123456789ab"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's journals are, and no others."""
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = tmp_path / "tuimig"
    monkeypatch.setattr("tuimig.core.journal.places", lambda: [found])
    return found


@pytest.fixture
def stopped() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    yield process.pid
    process.kill()
    process.wait()


def written(role: str, *states: str, pid: int = 0, keep: bool = True) -> Journal:
    about = {"pid": pid, "started": procfs.start_time(pid), "to": "ssh://far", "command": "sleep 60"} if pid else {}
    made = Journal(SESSION + "rest", role, **about)
    for state in states:
        made.write(state)
    if keep:
        made.close(keep=True)
    return made


def test_none(here: Path) -> None:
    assert journals.kept() == []
    assert not here.exists()
    with pytest.raises(UsageError, match="no move of that session"):
        journals.clear("../../etc/passwd", accepted=True)


def test_a_source_in_doubt(here: Path, stopped: int) -> None:
    made = written("source", "frozen", "handing-over", "doubt", pid=stopped)
    (left,) = journals.kept()
    assert (left.session, left.role, left.state, left.path) == (SESSION, "source", "doubt", made.path)
    assert (left.pid, left.process, left.moving, left.destination) == (stopped, "stopped", False, "ssh://far")
    assert f"kill -CONT {stopped}" in left.todo
    assert f"kill -9 {stopped}" in left.todo
    (obstacle,) = (o for o in check.check_process(stopped, Options()) if o.name == "move-in-doubt")
    assert obstacle.asks
    assert str(made.path) in obstacle.where
    with pytest.raises(UsageError, match="is stopped, and this is all that says why"):
        journals.clear(SESSION, accepted=False)
    assert made.path.exists()
    assert [one.path for one in journals.clear(SESSION, accepted=True)] == [made.path]
    assert not here.exists()
    assert check.check_process(stopped, Options()) == []


def test_a_source_that_was_let_run_on(here: Path, stopped: int) -> None:
    written("source", "frozen", "handing-over", pid=stopped)
    os.kill(stopped, signal.SIGCONT)
    os.waitid(os.P_PID, stopped, os.WCONTINUED)
    assert check.check_process(stopped, Options()) == []
    (left,) = journals.kept()
    assert (left.process, left.todo) == ("running", "the source runs: clear it")
    assert journals.clear(SESSION, accepted=False)


def test_a_process_that_is_stopped_for_another_reason(here: Path, stopped: int) -> None:
    """Before the hand-over it runs on by itself; another process may have its id by now."""
    written("source", "frozen", pid=stopped)
    other = Journal("f" * 12, "source", pid=stopped, started=1)
    other.write("doubt")
    other.close(keep=True)
    assert check.check_process(stopped, Options()) == []
    assert {one.session: one.process for one in journals.kept()} == {SESSION: "stopped", "f" * 12: "gone"}


def test_a_move_that_runs(here: Path, stopped: int) -> None:
    made = written("source", "frozen", "handing-over", pid=stopped, keep=False)
    try:
        (left,) = journals.kept()
        assert left.moving
        assert journals.stops(stopped) is None
        with pytest.raises(UsageError, match="still runs"):
            journals.clear(SESSION, accepted=True)
    finally:
        made.close(keep=True)
    assert not journals.kept()[0].moving


@pytest.mark.parametrize(
    ("state", "todo"),
    [("built", "kill -CONT the source"), ("running", "docs/moving.md"), ("filled", "kill -9 the source")],
)
def test_a_destination(here: Path, state: str, todo: str) -> None:
    written("destination", state)
    (left,) = journals.kept()
    assert (left.role, left.process) == ("destination", "unknown")
    assert todo in left.todo
    assert journals.clear(SESSION, accepted=False)


def test_a_journal_that_a_crash_has_cut(here: Path) -> None:
    made = written("destination", "built")
    with made.path.open("a") as file:
        file.write('{"state": "runn')
    (here / "move-x-nobody.json").write_text("[1]")
    (here / "move-y-source.json").write_text('{"pid": "x", "state": 5}\n[]\n')
    found = {one.session: one for one in journals.kept()}
    assert found[SESSION].state == "built"
    assert (found["y"].pid, found["y"].state) == (0, "5")
    assert "x" not in found
