"""What a receiver makes of messages that come close behind each other."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import msgspec
import pytest
from core.test_hostile_source import NO_WAIT, OPEN

from tuimig.core import dump, wire
from tuimig.core.control import Control
from tuimig.core.door import Caller
from tuimig.core.errors import ConnectionLost
from tuimig.core.manifest import Clocks, Outline, Process, RegionEntry
from tuimig.core.receive import Receiver
from tuimig.core.remote import _Relay

IMAGE = wire.Image(2, b"{}", b"", b"", go=False)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver(OPEN, -1, -1, _settings=NO_WAIT)


@pytest.mark.parametrize(("epoch", "go"), [(2, True), (1, False)])
def test_the_word_to_run_right_behind_its_image(receiver: Receiver, epoch: int, go: bool) -> None:
    receiver._message(IMAGE)
    receiver._message(wire.Go(epoch))
    assert receiver._next is not None
    assert receiver._next.go is go


def test_an_image_that_is_taken_back_at_once(receiver: Receiver) -> None:
    receiver._message(IMAGE)
    receiver._message(wire.Abandon(2, "lost"))
    assert receiver._next is None


def test_the_source_learns_when_its_streams_have_joined(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[wire.Message] = []
    monkeypatch.setattr(Receiver, "_send", lambda _, message: said.append(message))
    come = [*streams(1, 1), *streams(2, 3)]
    for caller, _ in come:
        receiver._called(caller)
    assert said == [wire.Joined(1, 1), wire.Joined(2, 1), wire.Joined(2, 2), wire.Joined(2, 3)]
    receiver._dismiss(receiver._streams)
    for _, theirs in come:
        theirs.close()


def test_a_source_that_gives_up_and_closes_is_heard(receiver: Receiver) -> None:
    """Though the receiver says something itself first, and finds the connection closed."""
    near, far = socket.socketpair()
    far.sendall(wire.frame(wire.End()))
    far.close()
    receiver._control = Control(near.fileno(), near.fileno(), receiver._inbox, large=True)
    receiver._send(wire.Built(1))
    with pytest.raises(ConnectionLost, match="the source ended the session"):
        receiver._serve()
    receiver._control.close()
    near.detach()


def arrived(sent: int, expected: int = 0) -> SimpleNamespace:
    progress = SimpleNamespace(sent=sent, expected=expected)
    trips = SimpleNamespace(buckets=(), most_ns=0)
    return SimpleNamespace(arrival=SimpleNamespace(progress=lambda: progress, round_trips=lambda: trips))


def test_figures_before_the_copy_runs(receiver: Receiver) -> None:
    """Before T0 the process's pages are what is known; some may come that it did not have when it was looked at."""
    assert receiver._figures("precopy") == wire.Figures("precopy")
    receiver._known = 10
    for sent, total in ((0, 10), (4, 10), (12, 12)):
        receiver._early = arrived(sent)  # type: ignore[assignment]
        assert receiver._figures("precopy") == wire.Figures("precopy", total, sent, sent)
    receiver._early = None
    receiver._attempt = SimpleNamespace(copy=None, pages=arrived(5, 9))  # type: ignore[assignment]
    assert receiver._figures("restore") == wire.Figures("restore", 9, 5, 5)


def streams(epoch: int, number: int = 17) -> list[tuple[Caller, socket.socket]]:
    """With the other end of what holds the process that brought it."""
    made = []
    for n in range(number):
        ours, theirs = socket.socketpair()
        null = os.open(os.devnull, os.O_RDONLY)
        opened = wire.Open("ef" * 32, "pages" if n else "demand", False, epoch, "1.0")
        made.append((Caller(opened, null, os.dup(null), ours), theirs))
    return made


def test_streams_of_an_attempt_that_is_over_are_let_go_of(receiver: Receiver) -> None:
    """Sixteen and the demands' one, twice: those of the lost attempt, and those made for the next."""
    old, new = streams(1), streams(2)
    for caller, _ in [*old, *new]:
        receiver._called(caller)
    taken: list[int] = []

    def add(fd_in: int, fd_out: int, kind: int) -> None:
        os.close(fd_in)
        os.close(fd_out)
        taken.append(kind)

    arrival = SimpleNamespace(add=add)
    receiver._attempt = SimpleNamespace(pages=SimpleNamespace(epoch=IMAGE.epoch, arrival=arrival))  # type: ignore[assignment]
    receiver._adopt_streams()
    assert len(taken) == len(new)
    assert receiver._streams == [caller for caller, _ in new]
    for _, theirs in old:
        assert theirs.recv(1) == b""  # the process that brought it may end
    receiver._dismiss(receiver._streams)
    for _, theirs in [*old, *new]:
        theirs.close()


@pytest.mark.parametrize("twice", [False, True])
def test_regions_that_were_read_while_they_changed_make_no_sketch(monkeypatch: pytest.MonkeyPatch, twice: bool) -> None:
    """A region that moved meanwhile may be listed twice; the destination would refuse such an outline."""
    entry = RegionEntry(0x10000, 0x14000, "rw-p", 0, "00:00", 0, "", "anon", "none", "test", [], None, True, 0, "")
    process = Process(7, 7, 1, 7, 7, "churn", ["churn"], "/churn")
    found = Outline(Clocks(1, 1, 1), process, [entry] * (1 + twice), [7], [0])
    monkeypatch.setattr(dump, "outline", lambda *_: (found, 5))
    relay = SimpleNamespace(_sketch=None, _epoch=1, _peer=SimpleNamespace(clock_offset_ns=2))
    _Relay.outlined(relay, None, None)  # type: ignore[arg-type]
    assert relay._sketch == (None if twice else wire.Sketch(1, msgspec.json.encode(found), 7))
