"""Frames of the control connection: what is sent comes back, what is mutated or random is refused and costs nothing."""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuimig.core import control, wire
from tuimig.core.control import Control, Lost, read_first
from tuimig.core.errors import ConnectionLost, ProtocolError, UsageError
from tuimig.core.transport import parse

SETTINGS = wire.Settings("move", [(1, 2)], [("/a", "/b")], "auto", "close", "null", False, True, "kill", 60.0)
NEEDS = wire.Needs(
    "x86_64", 4096, "6.18", ["avx2"], [("[vdso]", 8192)], 1 << 30, 7, "redis", [], [("4", 6379, "0.0.0.0")], "none"
)
MESSAGES: list[wire.Message] = [
    wire.Open("ab" * 32, "pages", False, 3, "1.0"),
    wire.Hello(NEEDS, SETTINGS),
    wire.Image(1, b"{}", bytes(16), b"", True),
    wire.Sketch(1, b"{}", 7),
    wire.Abandon(1, "why"),
    wire.Go(1),
    wire.End(),
    wire.Answer("1.0", "6.18", "host", [wire.Fact("port", "p", "w", "c")], False),
    wire.Joined(2, 5),
    wire.Clock(2**60),
    wire.Built(1),
    wire.Running(1, 2, 3, 4, 5, ["warning"]),
    wire.Status(wire.Figures("fill", 1, 2, 3, 4, (1, 2), 9), b"\0" * 40),
    wire.State(1, "running", bytes(32), wire.Running(1, 2, 3, 4, 5, []), None),
    wire.Failed(1, wire.Trouble("RebuildFailed", "what", obstacles=(wire.Fact("a", "b", "c", "d"),)), True),
    wire.Beat(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_in_any_pieces(message: wire.Message) -> None:
    data = wire.frame(message) * 2
    for size in (1, 7, len(data)):
        frames = wire.Frames(large=True)
        found = [m for at in range(0, len(data), size) for m in frames.feed(data[at : at + size])]
        assert found == [message, message]
        assert frames.rest == b""


def feed(data: bytes, *, large: bool = True) -> list[wire.Message]:
    return wire.Frames(large=large).feed(data)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_mutated_frames_are_refused_or_typed(message: wire.Message, data: Any) -> None:
    frame = bytearray(wire.frame(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.integers(0, len(frame)))]
    try:
        found = feed(bytes(frame))
    except ProtocolError:
        return
    assert all(isinstance(m, wire.Message) for m in found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_random_bodies_are_refused_or_typed(body: bytes) -> None:
    frame = wire.HEADER.pack(wire.MAGIC, wire.VERSION, 0, len(body)) + body
    try:
        found = feed(frame)
    except ProtocolError:
        return
    assert all(isinstance(m, wire.Message) for m in found)


def test_a_length_is_not_allocated_before_its_bytes_are_there() -> None:
    header = wire.HEADER.pack(wire.MAGIC, wire.VERSION, 0, wire.LARGE)
    tracemalloc.start()
    frames = wire.Frames(large=True)
    assert frames.feed(header + b"x" * 100) == []
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


@pytest.mark.parametrize(
    ("frame", "large"),
    [
        (wire.HEADER.pack(wire.MAGIC, wire.VERSION, 0, wire.LARGE + 1), True),
        (wire.HEADER.pack(wire.MAGIC, wire.VERSION, 0, wire.SMALL + 1), False),
        (wire.HEADER.pack(wire.MAGIC, wire.VERSION + 1, 0, 1), True),
        (wire.HEADER.pack(wire.MAGIC, wire.VERSION, 1, 1), True),
        (b"HTTP/1.1 400 Bad Request\r\n", True),
    ],
)
def test_bad_headers(frame: bytes, large: bool) -> None:
    with pytest.raises(ProtocolError):
        feed(frame, large=large)


def test_only_an_image_may_be_large() -> None:
    fat = wire.Status(wire.Figures("fill"), bytes(1 << 20))
    assert feed(wire.frame(fat)) == [fat]
    data = wire.frame(wire.Image(1, bytes(wire.SMALL), b"", b"", False))
    assert len(feed(data)) == 1
    with pytest.raises(ProtocolError):
        feed(data, large=False)


def test_silence_and_ends_are_told() -> None:
    near, far = socket.socketpair()
    inbox: Any = queue.SimpleQueue()
    connection = Control(near.detach(), os.dup(far.fileno()), inbox, large=False)
    far.sendall(wire.frame(wire.Built(4)))
    assert inbox.get(timeout=10) == (connection, wire.Built(4))
    far.shutdown(socket.SHUT_WR)
    lost = inbox.get(timeout=10)
    assert isinstance(lost, Lost)
    assert isinstance(lost.error, ConnectionLost)
    connection.close()
    far.close()


def test_what_was_said_comes_before_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side has closed: the first beat fails while most of its words are still to be read."""
    monkeypatch.setattr(control, "BEAT_S", 0.0)
    monkeypatch.setattr(control, "PIECE", 64)
    near, far = socket.socketpair()
    far.sendall(b"".join(wire.frame(wire.Built(number)) for number in range(100)))
    far.close()
    inbox: Any = queue.SimpleQueue()
    fd = near.detach()
    connection = Control(fd, fd, inbox, large=False)
    for number in range(100):
        assert inbox.get(timeout=10) == (connection, wire.Built(number))
    assert isinstance(inbox.get(timeout=10), Lost)
    connection.close()


def test_what_was_said_while_nothing_seemed_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was ready; then the other side spoke and closed, and a word of ours failed, before the reader went on."""
    near, far = socket.socketpair()
    inbox: Any = queue.SimpleQueue()
    spoken = threading.Event()

    class Poll:
        def __init__(self) -> None:
            self._poll = select.poll()
            self.register = self._poll.register

        def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
            ready = self._poll.poll(min(timeout_ms, 10))
            if not ready and not spoken.is_set():
                spoken.set()
                far.sendall(wire.frame(wire.End()))
                far.close()
                connection._breaks(ConnectionLost("the connection was lost"))
            return ready

    fd = near.detach()
    with monkeypatch.context() as patch:
        patch.setattr(control, "select", SimpleNamespace(poll=Poll, POLLIN=select.POLLIN, POLLOUT=select.POLLOUT))
        connection = Control(fd, fd, inbox, large=False)
        assert inbox.get(timeout=10) == (connection, wire.End())
        assert isinstance(inbox.get(timeout=10), Lost)
        connection.close()


def test_the_first_frame_is_read_to_its_last_byte_and_no_further() -> None:
    near, far = socket.socketpair()
    opened = wire.Open("cd" * 16, "demand", False, 1, "1.0")
    far.sendall(wire.frame(opened) + b"page stream")
    assert read_first(near.fileno(), 10) == (opened, b"")
    assert near.recv(100) == b"page stream"
    far.sendall(wire.frame(wire.Go(1)))
    with pytest.raises(ProtocolError):
        read_first(near.fileno(), 10)
    near.close()
    far.close()


@pytest.mark.parametrize(
    "text", ["", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://h:99999", "tcp:1", "unix:"]
)
def test_destinations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_destinations() -> None:
    assert parse("local").is_local
    assert parse("unix:/run/x").path == "/run/x"
    there = parse("ssh://me@host.example:2222")
    assert (there.user, there.host, there.port) == ("me", "host.example", 2222)
    assert parse("ssh://[fe80::1]").host == "fe80::1"
