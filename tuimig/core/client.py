"""A migration as a console sees it: start it in a session process of its own, poll it, command it.

`poll` never waits. Everything that came since the last one is handed over at once, so that a slow terminal costs the
engine nothing and loses only what it could not have shown.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tuimig.core.board import Batch, Board
from tuimig.core.errors import EngineError, TuimigError
from tuimig.core.jobs import (
    Background,
    Cancel,
    Done,
    Failure,
    Frames,
    Go,
    Job,
    Kept,
    Reconnect,
    State,
    Told,
    decode,
    error_of,
    frame,
    write_outcome,
)
from tuimig.core.model import Heat, Report

NOTHING: Final = Batch(b"", 0)
PROMISE_S: Final = 5.0  # for a session to say that it goes on


@dataclass(frozen=True, slots=True)
class Update:
    """What is new since the last poll. `state` None: nothing new. At most one of the last three is there, once."""

    events: tuple[Told, ...] = ()
    state: State | None = None
    faults: Batch = NOTHING
    report: Report | None = None
    error: TuimigError | None = None
    heat: Heat | None = None
    restart: bool = False  # a recording was set back: forget what was drawn, this has all up to here

    @property
    def over(self) -> bool:
        return self.report is not None or self.error is not None or self.heat is not None


class Feed(Protocol):
    """What a screen draws a migration from: a live session, or a recording."""

    def poll(self) -> Update: ...

    def cancel(self) -> None: ...

    def go(self) -> None: ...

    def reconnect(self) -> None: ...

    def to_background(self, report: Path) -> bool:
        """Whether it goes on when we are gone; then the outcome will be in `report`."""
        ...

    def close(self) -> None: ...


class LiveSession:
    """One job in a session process. `close` it at the end; what still runs then is cancelled by that."""

    def __init__(self, job: Job, log: Path | None = None) -> None:
        self.job = job
        self._over = False
        self._background = False
        self._frames = Frames()
        self._board = Board.create()
        self._sock, theirs = socket.socketpair()
        output = _log(log)
        try:
            # -P: no module is taken from the directory that the console happens to run in
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tuimig.core.worker", str(theirs.fileno()), str(self._board.fd)],
                pass_fds=(theirs.fileno(), self._board.fd),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            self._sock.close()
            self._board.close()
            raise EngineError(
                "the session process cannot be started",
                subject=f"process {job.pid}",
                syscall="fork",
                errno=error.errno or 0,
                cure="Free some memory or processes, and try again",
            ) from error
        finally:
            theirs.close()
            if output >= 0:
                os.close(output)
        self._command(job)
        self._sock.setblocking(False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> Update:
        if self._over:
            return Update()
        # First what is over, then the counters: so the last ones are there before the end is told.
        messages, ended = self._messages()
        shown = self._board.state()
        state = decode(shown) if shown is not None else None
        faults = self._board.batch()
        events, last = [], Update()
        for message in messages:
            match message:
                case Done():
                    last = Update(report=message.report)
                case Failure():
                    last = Update(error=error_of(message))
                case Heat():
                    last = Update(heat=message)
                case _:
                    events.append(message)
        if ended and not last.over:
            last = Update(error=self._died())
        self._over = last.over
        return Update(tuple(events), state, faults, last.report, last.error, last.heat)

    def cancel(self) -> None:
        self._command(Cancel())

    def go(self) -> None:
        """Step mode: the phase that waits may begin."""
        self._command(Go())

    def reconnect(self) -> None:
        """A lost connection is tried now, and has its whole time again."""
        self._command(Reconnect())

    def to_background(self, report: Path) -> bool:
        """It goes on without us, and the outcome is written to `report`: promised only once the session has said so.

        Nothing is left to poll then. A session that is just over has its outcome written by us.
        """
        if self._over or not self._command(Background(str(report))):
            return False
        until = time.monotonic() + PROMISE_S
        while not self._background and (left := until - time.monotonic()) > 0:
            select.select([self._sock], [], [], left)
            messages, ended = self._messages()
            for message in messages:
                if isinstance(message, Done | Failure):
                    write_outcome(report, message)
                self._background |= isinstance(message, Done | Failure | Kept)
            if ended:
                break
        self._over = self._background
        return self._background

    def close(self) -> None:
        """A migration that still runs is cancelled, and waited for: it lets go of the source within moments.

        One that was sent to the background goes on, and is not waited for.
        """
        if self._board.fd < 0:
            return
        self._sock.close()
        if self._background:
            self._process.returncode = 0  # nobody waits for it here; it is an orphan of ours soon
        elif not self._over or self._process.poll() is None:
            self._reap(timeout_s=None if not self._over else 5)
        self._board.close()

    # ------------------------------------------------------------ within

    def _messages(self) -> tuple[list[Any], bool]:
        found: list[Any] = []
        while True:
            try:
                data = self._sock.recv(1 << 20)
            except BlockingIOError:
                return found, False
            except OSError:
                return found, True
            if not data:
                return found, True
            try:
                found += self._frames.feed(data)
            except ValueError:
                return found, True

    def _command(self, message: object) -> bool:
        """Whether it was taken. A session that has ended takes nothing; `poll` tells how it ended."""
        try:
            self._sock.setblocking(True)
            self._sock.sendall(frame(message))
            self._sock.setblocking(False)
        except OSError:
            return False
        return True

    def _reap(self, timeout_s: float | None) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    def _died(self) -> EngineError:
        self._process.wait()
        code = self._process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return EngineError(
            f"the session process ended {how}; the source runs as before",
            subject=f"process {self.job.pid}",
            cure="The log has more",
        )


def _log(file: Path | None) -> int:
    """Where the session's words go; nowhere is no reason not to migrate."""
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return subprocess.DEVNULL


def wait(session: LiveSession, timeout_s: float) -> bool:
    """For programs without a clock of their own: whether something may be there to poll within the time."""
    return bool(select.select([session._sock], [], [], timeout_s)[0])
