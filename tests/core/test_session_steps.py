"""A session process that records, and one that stops before each phase; the source runs in every stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from harness.destinations import Listening
from harness.targets import free_port

from tuimig import demo
from tuimig.core import client
from tuimig.core.client import LiveSession, Update
from tuimig.core.errors import Cancelled
from tuimig.core.jobs import Job, Waiting
from tuimig.core.model import Options, PortMap
from tuimig.core.recording import load

LIMIT_S = 60.0
OPTIONS = Options(precopy="off", tcp="close")


@pytest.fixture
def source(need: Callable[..., None]) -> Iterator[tuple[int, int]]:
    need(root=True)
    with demo.workload(8 << 20) as (pid, port):
        yield pid, port


def waits(session: LiveSession) -> tuple[str, Update]:
    """The phase that waits; nothing, and the end, once it is over."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        client.wait(session, 0.02)
        update = session.poll()
        found = [event.phase for event in update.events if isinstance(event, Waiting)]
        if found or update.over:
            return (found[0] if found else ""), update
    pytest.fail("it neither waits nor ends")


def stepped(session: LiveSession, port: int) -> tuple[list[str], Update]:
    """Key by key to the end: the phases that waited, while the source ran on, and the end."""
    waited = []
    phase, update = waits(session)
    while phase:
        before = demo.ask(port)
        assert demo.moved_on(port, before).counts > before.counts
        waited.append(phase)
        session.go()
        phase, update = waits(session)
    return waited, update


def test_steps_and_a_recording(source: tuple[int, int], place: Path, quiet: Path) -> None:
    pid, port = source
    job = Job("snapshot", pid, str(place / "snap"), options=OPTIONS, record=str(place / "a.rec"), step=True)
    session = LiveSession(job)
    try:
        waited, update = stepped(session, port)
        assert update.report is not None, update.error
        assert waited[:2] == ["attach", "freeze"]
        assert waited[-1] == "commit"
        assert load(place / "a.rec").report == update.report
    finally:
        session.close()
    assert demo.ask(port).wrong == 0


def test_a_cancel_at_a_stop(source: tuple[int, int], place: Path, quiet: Path) -> None:
    pid, port = source
    session = LiveSession(Job("snapshot", pid, str(place / "snap"), options=OPTIONS, step=True))
    try:
        assert waits(session)[0] == "attach"
        session.go()
        assert waits(session)[0] == "freeze"
        session.cancel()
        assert isinstance(waits(session)[1].error, Cancelled)
    finally:
        session.close()
    assert demo.ask(port).wrong == 0
    assert not (place / "snap").exists()


def test_a_console_that_goes_away_at_a_stop(source: tuple[int, int], place: Path, quiet: Path) -> None:
    pid, port = source
    session = LiveSession(Job("snapshot", pid, str(place / "snap"), options=OPTIONS, step=True))
    assert waits(session)[0] == "attach"
    session.close()  # waits until the session process has ended
    assert demo.ask(port).wrong == 0
    assert not (place / "snap").exists()


@pytest.mark.parametrize(
    ("verb", "phases"),
    [("clone", ["connect", "attach", "freeze", "capture", "send"]), ("move", ["connect", "attach", "freeze"])],
)
def test_steps_to_another_host(
    source: tuple[int, int], place: Path, quiet: Path, copies: Any, verb: str, phases: list[str]
) -> None:
    """A move never stops between T0 and the end of its source: that one stands still."""
    pid, port = source
    listening = Listening(place, quiet)
    options = replace(OPTIONS, map_ports=(PortMap(port, free_port()),))
    session = LiveSession(Job(verb, pid, listening.text, options=options, step=True))
    try:
        waited, update = stepped(session, port)
        assert update.report is not None, update.error
        assert waited == phases
        copies.add(asdict(update.report))
    finally:
        session.close()
        listening.close()
    if verb == "clone":
        assert demo.ask(port).wrong == 0
