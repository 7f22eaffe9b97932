"""A control connection: messages over two descriptors, a sign of life every second, and the notice of its loss.

One thread a connection reads, beats and watches; what it finds goes into the inbox of the session, in order. `send` may
be called from any thread. Nothing blocks longer than the time after which silence counts as loss. What the other side
said before a loss comes before the loss: a side that gives up says so, closes, and takes nothing any more.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from tuimig.core import wire
from tuimig.core.errors import ConnectionLost, ProtocolError, TuimigError

BEAT_S: Final = 1.0
SILENCE_S: Final = 5.0  # without a sign of life: lost
FIRST_S: Final = 60.0  # the same until the first one: a person may have to type a password
TICK_MS: Final = 200
PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Lost:
    """In an inbox: this connection is no more."""

    control: Control
    error: TuimigError


Inbox = queue.SimpleQueue[Any]


class Control:
    """Takes the descriptors over. `closers` go with it."""

    def __init__(self, fd_in: int, fd_out: int, inbox: Inbox, *, large: bool, already: bytes = b"") -> None:
        self._in, self._out = fd_in, fd_out
        self._inbox = inbox
        self._frames = wire.Frames(large=large)
        self._already = already
        self._lock = threading.Lock()
        self._closed = False
        self._broken: ConnectionLost | None = None  # nothing can be sent any more
        self._broken_at = 0.0
        self._sent_at = self._heard_at = time.monotonic()
        self._silence_s = FIRST_S
        for fd in {fd_in, fd_out}:
            os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._run, name="tm-control", daemon=True)
        self._thread.start()

    def send(self, message: wire.Message) -> None:
        """ConnectionLost where it cannot be brought on its way; the inbox tells the loss, behind what still came."""
        data = memoryview(wire.frame(message))
        with self._lock:
            if self._broken is not None:
                raise self._broken
            try:
                self._write(data)
            except ConnectionLost as error:
                self._breaks(error)
                raise

    def close(self) -> None:
        self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join(2)
        with self._lock:
            for fd in {self._in, self._out}:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._in = self._out = -1

    def _write(self, data: memoryview) -> None:
        moved_at = time.monotonic()
        while data:
            if self._closed:
                raise ConnectionLost("the connection was closed")
            try:
                data = data[os.write(self._out, data) :]
                moved_at = time.monotonic()
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._out, select.POLLOUT)
                poll.poll(TICK_MS)
            except OSError as error:
                raise ConnectionLost("the connection was lost", syscall="write", errno=error.errno or 0) from None
            if time.monotonic() - moved_at > SILENCE_S:
                raise ConnectionLost("the other side takes nothing any more")
        self._sent_at = time.monotonic()

    def _breaks(self, error: ConnectionLost) -> None:
        self._broken_at = time.monotonic()
        self._broken = error

    def _run(self) -> None:
        try:
            self._deliver(self._already)
            poll = select.poll()
            poll.register(self._in, select.POLLIN)
            while not self._closed:
                ready = poll.poll(TICK_MS) if self._broken is None else []
                now = time.monotonic()
                if self._broken is not None:  # perhaps only since the poll: what came before is there by now
                    ready = poll.poll(0)
                    if not ready or now - self._broken_at > SILENCE_S:
                        raise self._broken
                if ready:
                    self._deliver(self._read())
                    self._heard_at, self._silence_s = now, SILENCE_S
                elif now - self._heard_at > self._silence_s:
                    raise ConnectionLost(f"no sign of life from the other side for {self._silence_s:.0f} s")
                self._beat(now)
        except TuimigError as error:
            if not self._closed:
                self._inbox.put(Lost(self, error))
        except (OSError, ValueError) as error:  # a descriptor closed under us, at our own end
            if not self._closed:
                self._inbox.put(Lost(self, ConnectionLost(f"the connection was lost ({error})")))

    def _read(self) -> bytes:
        try:
            data = os.read(self._in, PIECE)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConnectionLost("the connection was lost", syscall="read", errno=error.errno or 0) from None
        if not data:
            raise ConnectionLost("the other side closed the connection")
        return data

    def _deliver(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if not isinstance(message, wire.Beat):
                self._inbox.put((self, message))

    def _beat(self, now: float) -> None:
        if self._broken is not None or now - self._sent_at < BEAT_S or not self._lock.acquire(blocking=False):
            return  # somebody sends something better
        try:
            self._write(memoryview(wire.frame(wire.Beat())))
        except ConnectionLost as error:
            self._breaks(error)
        finally:
            self._lock.release()


def read_first(fd: int, timeout_s: float) -> tuple[wire.Open, bytes]:
    """The Open frame of a new connection, and what came behind it."""
    os.set_blocking(fd, False)
    frames = wire.Frames(large=False)
    until = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    # one byte of the body too many would be lost for a page stream: header first, then exactly the body
    data = _exactly(fd, poll, wire.HEADER.size, until)
    length = wire.HEADER.unpack(data)[3]
    found = frames.feed(data)
    if length > 65536:
        raise ProtocolError("the first message of a connection is too long")
    found = found or frames.feed(_exactly(fd, poll, length, until))
    if len(found) != 1 or not isinstance(found[0], wire.Open):
        raise ProtocolError("a connection began with another message than it must")
    return found[0], frames.rest


def _exactly(fd: int, poll: select.poll, count: int, until: float) -> bytes:
    data = b""
    while len(data) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise ConnectionLost("nothing came over a new connection")
        poll.poll(min(left, 1) * 1000)
        try:
            piece = os.read(fd, count - len(data))
        except BlockingIOError:
            continue
        if not piece:
            raise ConnectionLost("the other side closed the connection")
        data += piece
    return data
