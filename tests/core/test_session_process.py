"""Migrations in a session process, as a console has them: what arrives, and whose end does what to whom."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.destinations import Listening
from harness.pictures import undisturbed
from harness.targets import Target, ask, end

from tuimig.core import client
from tuimig.core.client import LiveSession, Update
from tuimig.core.errors import Cancelled, EngineError, TargetGone
from tuimig.core.jobs import Job
from tuimig.core.model import RECORD, Connection, Detail, Frozen, Options, Phase, Planned, Report, decode_faults

LIMIT_S = 60.0
LONG_MB = 1500  # a capture of so much lasts about a second
MANY = 10**12
OFF = Options(precopy="off")


@pytest.fixture(autouse=True)
def _root(need: Callable[..., None]) -> None:
    need(root=True)


@pytest.fixture
def sessions(quiet: Path) -> Iterator[Callable[..., LiveSession]]:
    made: list[LiveSession] = []

    def start(job: Job, **more: Any) -> LiveSession:
        made.append(LiveSession(job, **more))
        return made[-1]

    yield start
    for session in made:
        session.close()


def follow(session: LiveSession, until: Callable[[list[Update]], bool]) -> list[Update]:
    """Polls until `until` is true of all that came."""
    updates: list[Update] = []
    limit = time.monotonic() + LIMIT_S
    while not until(updates):
        assert time.monotonic() < limit, [u.events for u in updates]
        assert not over(updates), updates[-1].error or "it was over too soon"
        client.wait(session, 0.02)
        updates.append(session.poll())
    return updates


def over(updates: list[Update]) -> bool:
    return bool(updates) and updates[-1].over


def in_phase(name: str) -> Callable[[list[Update]], bool]:
    return lambda updates: name in phases(updates)


def phases(updates: list[Update]) -> list[str]:
    return [event.name for update in updates for event in update.events if isinstance(event, Phase)]


def report_of(updates: list[Update]) -> Report:
    last = updates[-1]
    assert last.report is not None, last.error
    return last.report


def hammered(targets: Callable[..., Target], megabytes: int) -> Target:
    target = targets("ballast", "--mb", megabytes)
    target.ask(f"begin {MANY}")
    return target


def lost(updates: list[Update]) -> list[Connection]:
    found = (event for update in updates for event in update.events if isinstance(event, Connection))
    return [event for event in found if event.state == "lost"]


def sound(target: Target) -> None:
    """It writes on, holds what it should, and nothing of ours is in it."""
    before = target.ask("end")["writes"]
    assert target.ask("hammer 1000")["writes"] == before + 1000
    assert target.ask("check")["problems"] == 0
    undisturbed(target.pid)


def test_a_snapshot_arrives_whole(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    target = hammered(targets, 256)
    updates = follow(sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF)), over)
    report = report_of(updates)
    assert (report.verb, report.directory, report.pid) == ("snapshot", f"{place}/snap", target.pid)
    assert (place / "snap" / "manifest.json").is_file()
    assert phases(updates) == ["look", "attach", "freeze", "capture", "commit"]
    events = [event for update in updates for event in update.events]
    assert [e.frozen_us for e in events if isinstance(e, Frozen)] == [report.frozen_us]
    plan = next(e.plan for e in events if isinstance(e, Planned))
    last = next(u.state for u in reversed(updates) if u.state)
    assert last.progress.wp_faults == report.wp_faults > 0
    assert last.progress.pages_done == last.progress.pages_total == report.bytes // 4096
    records = b"".join(u.faults.records for u in updates)
    missed = sum(u.faults.missed for u in updates)
    assert len(records) // RECORD.size + missed + report.faults_dropped == report.wp_faults
    regions = [d.region for d in plan.decisions]
    assert all(any(r.start <= f.address < r.end for r in regions) for f in decode_faults(records[: 500 * RECORD.size]))
    detail = last.details["source"]
    assert isinstance(detail, Detail)
    assert detail.histogram.count == report.wp_faults
    assert detail.region_done == detail.region_pages
    assert sum(detail.region_faults) == report.wp_faults
    assert all(done == total for total, done, _ in detail.cells)
    counted = sum(total for total, _, _ in detail.cells)
    assert 0 <= report.bytes // 4096 - counted < 64, "but for a stack that has grown since the plan was made"
    sound(target)


def test_a_clone_runs_and_its_cells_fill(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path, copies: Any
) -> None:
    target = targets("ballast", "--mb", 64)
    options = Options(precopy="off", map_paths=((str(target.control), f"{place}/copy.control"),))
    updates = follow(sessions(Job("clone", target.pid, "local", options=options)), over)
    report = report_of(updates)
    copies.add({"new_pid": report.new_pid, "init_pid": report.init_pid})
    assert phases(updates) == ["look", "attach", "freeze", "capture", "restore", "fill"]
    assert ask(place / "copy.control", "check")["problems"] == 0
    detail = next(u.state for u in reversed(updates) if u.state).details["copy"]
    assert all(done == total for total, done, _ in detail.cells)
    assert target.ask("check")["problems"] == 0


def test_the_end_is_told_once(targets: Callable[..., Target], sessions: Callable[..., LiveSession]) -> None:
    target = targets("ballast", "--mb", 1)
    target.stop()
    session = sessions(Job("clone", target.pid, "local"))
    updates = follow(session, over)
    assert isinstance(updates[-1].error, TargetGone)
    assert session.poll() == Update()
    session.cancel()
    session.close()
    session.close()


def test_cancel(targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path) -> None:
    target = hammered(targets, LONG_MB)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    follow(session, in_phase("capture"))
    session.cancel()
    assert isinstance(follow(session, over)[-1].error, Cancelled)
    assert not (place / "snap").exists()
    sound(target)


def test_the_end_of_the_console_cancels(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    """As if it had been killed: its socket closes, and no word is said."""
    target = hammered(targets, LONG_MB)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    follow(session, in_phase("capture"))
    session._sock.close()
    assert session._process.wait(LIMIT_S) == 0
    assert not (place / "snap").exists()
    sound(target)


def test_in_the_background_it_goes_on(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    target = hammered(targets, LONG_MB)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    follow(session, in_phase("freeze"))
    worker = os.pidfd_open(session.pid)
    session.to_background(place / "reports" / "one.json")
    begin = time.monotonic()
    session.close()
    waited_s = time.monotonic() - begin
    os.waitid(os.P_PIDFD, worker, os.WEXITED)
    os.close(worker)
    assert waited_s < 0.5, "the console waited for it"
    report = json.loads((place / "reports" / "one.json").read_text())
    assert (report["verb"], report["directory"]) == ("snapshot", f"{place}/snap")
    assert (place / "snap" / "manifest.json").is_file()
    assert [path.name for path in (place / "reports").iterdir()] == ["one.json"]
    sound(target)


def test_what_goes_wrong_in_the_background_is_written_too(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    target = hammered(targets, LONG_MB)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    follow(session, in_phase("freeze"))
    worker = os.pidfd_open(session.pid)
    session.to_background(place / "one.json")
    session.close()
    signal.pidfd_send_signal(worker, signal.SIGTERM)
    os.waitid(os.P_PIDFD, worker, os.WEXITED)
    os.close(worker)
    told = json.loads((place / "one.json").read_text())
    assert told["kind"] == "Cancelled"
    assert not (place / "snap").exists()
    sound(target)


def test_the_session_process_is_killed(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    target = hammered(targets, LONG_MB)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    follow(session, in_phase("capture"))
    os.kill(session.pid, signal.SIGKILL)
    error = follow(session, over)[-1].error
    assert isinstance(error, EngineError)
    assert "ended by signal 9" in str(error)
    assert f"process {target.pid}" in str(error)
    sound(target)


def test_nobody_polls(targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path) -> None:
    """More events than the socket holds and more faults than the board does: the migration ends all the same."""
    target = hammered(targets, 512)
    session = sessions(Job("snapshot", target.pid, f"{place}/snap", options=OFF))
    limit = time.monotonic() + LIMIT_S
    while not (place / "snap" / "manifest.json").exists():
        assert time.monotonic() < limit
        assert session._process.poll() is None
        time.sleep(0.01)  # between two looks at a file
    assert report_of(follow(session, over)).wp_faults > 0
    sound(target)


def test_a_session_leaves_words_in_the_log(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path
) -> None:
    target = targets("ballast", "--mb", 1)
    session = sessions(Job("dance", target.pid), log=place / "log" / "tuimig.log")
    error = follow(session, over)[-1].error
    assert isinstance(error, EngineError)
    assert "internal error" in str(error)
    assert "no such verb: dance" in (place / "log" / "tuimig.log").read_text()
    end(session.pid)


def test_a_lost_connection_has_its_whole_time_again(
    targets: Callable[..., Target], sessions: Callable[..., LiveSession], place: Path, quiet: Path
) -> None:
    """When somebody asks for it. The destination is gone for good here, so each attempt fails."""
    target = hammered(targets, 100)
    there = Listening(place, quiet)
    try:
        paths = ((str(target.control), f"{place}/copy.control"),)
        options = Options(precopy="off", reconnect_s=20.0, bandwidth=10 << 20, map_paths=paths)
        session = sessions(Job("clone", target.pid, place=there.text, options=options))
        follow(session, in_phase("capture"))
        for receiver in there.receivers():
            end(receiver.pid)
    finally:
        there.close()
    follow(session, lambda updates: any(event.left_s < 18 for event in lost(updates)))
    session.reconnect()
    seen = follow(session, lambda updates: any(event.left_s > 19 for event in lost(updates)))
    assert not over(seen)
    session.cancel()
    assert isinstance(follow(session, over)[-1].error, Cancelled)
    sound(target)
