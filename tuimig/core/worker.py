"""The session process of a console: runs one migration, shows it on the board, takes commands over a socket.

A process of its own, so that nothing the console does, its repaints or its end, reaches a freeze or a fault. Nothing
here waits for the console: events go through a thread, counters over shared memory. Where the console goes away the
migration is cancelled, unless it was told to go on in the background.

    python -m tuimig.core.worker SOCKET BOARD     (numbers of inherited descriptors)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Final

from tuimig.core import procfs, transport
from tuimig.core.board import Board
from tuimig.core.errors import Cancelled, TargetGone, TuimigError
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
    Waiting,
    encode,
    error_of,
    failure_of,
    frame,
    write_outcome,
)
from tuimig.core.model import Detail, Event, Faults, Heat, Progress
from tuimig.core.record import FileSink, Recorder
from tuimig.core.remote import RemoteSession

log = logging.getLogger("tuimig.session")


GATE_LOOK_S: Final = 0.3  # while a key is waited for: whether the process still lives


def _has_ended(pid: int) -> bool:
    try:
        return procfs.read_status(pid).get("State", "")[:1] in ("Z", "X")
    except TargetGone:
        return True


class Sender(threading.Thread):
    """Sends what is put in the queue; a console that does not read holds up nobody else."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(name="tm-sender", daemon=True)
        self._sock = sock
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: object) -> None:
        self._queue.put(frame(message))

    def finish(self) -> None:
        """Until all is sent, or the console is gone."""
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        while (data := self._queue.get()) is not None:
            try:
                self._sock.sendall(data)
            except OSError:  # the console is gone; what that means is decided where its end is read
                return


class Worker:
    """One migration. `run` returns when it is over, whatever way."""

    def __init__(self, sock: socket.socket, board: Board) -> None:
        self._sock = sock
        self._board = board
        self._sender = Sender(sock)
        self._session = RemoteSession(self._listen, detail=True)
        self._progress = Progress("look")
        self._remote: Progress | None = None
        self._details: dict[str, Detail] = {}
        self._report_to: Path | None = None
        self._over = False
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._recorder: Recorder | None = None

    def run(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's end is the console's business
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._leave())
        self._sender.start()
        threading.Thread(target=self._read, name="tm-commands", daemon=True).start()
        job = self._jobs.get()
        if job is None:
            return
        outcome = self._recorded(job) if job.record else self._outcome(job)
        with self._lock:
            self._over = True  # from now on nothing more is promised
        if self._report_to is not None:
            write_outcome(self._report_to, outcome)
        self._sender.send(outcome)
        self._sender.finish()

    def _recorded(self, job: Job) -> Done | Failure | Heat:
        """The same with a recording of it."""
        try:
            with FileSink(Path(job.record)) as sink:
                self._recorder = Recorder(sink)
                outcome = self._outcome(job)
                match outcome:
                    case Done(report=report):
                        self._recorder.report(report)
                    case Failure():
                        self._recorder.error(error_of(outcome))
                self._recorder = None
        except TuimigError as error:
            return failure_of(error)
        if sink.broken:
            log.warning("the recording was not written to its end: %s", sink.broken)
        return outcome

    def _gate(self, pid: int, phase: str) -> None:
        self._sender.send(Waiting(phase))
        while True:
            with contextlib.suppress(queue.Empty):
                self._go.get(timeout=GATE_LOOK_S)
                return
            if pid and _has_ended(pid):
                return  # the next step says so

    def _leave(self) -> None:
        """End what runs, or what waits."""
        self._session.cancel()
        self._go.put(None)

    def _outcome(self, job: Job) -> Done | Failure | Heat:
        try:
            return self._do(job)
        except TuimigError as error:
            return failure_of(error)
        except Exception as error:
            log.exception("%s of process %d", job.verb, job.pid)
            what = f"internal error: {type(error).__name__}: {error}"
            return Failure("EngineError", what, f"process {job.pid}", "", 0, "Please report it with the log")

    def _do(self, job: Job) -> Done | Heat:
        session, place = self._session, Path(job.place)
        pid = 0 if job.verb == "restore" else job.pid
        session.gate = functools.partial(self._gate, pid) if job.step else None
        match job.verb:
            case "snapshot":
                return Done(session.snapshot(job.pid, place, job.policy, job.options))
            case "clone" if not job.remote:
                return Done(session.clone(job.pid, job.policy, job.options))
            case "clone":
                return Done(session.clone_to(job.pid, transport.parse(job.place), job.policy, job.options))
            case "move":
                return Done(session.move_to(job.pid, transport.parse(job.place), job.policy, job.options))
            case "restore":
                return Done(session.restore(place, job.options))
            case "heat":
                return session.heat(job.pid, job.options, job.seconds)
        raise ValueError(f"no such verb: {job.verb}")

    def _listen(self, event: Event) -> None:
        if self._recorder is not None:
            self._recorder(event)
        match event:
            case Faults():
                self._board.log(event.records)
            case Progress(side="destination"):
                self._remote = event
                self._show()
            case Progress():
                self._progress = event
                self._show()
            case Detail():
                self._details[event.side] = event
                self._show()
            case _:
                self._sender.send(event)

    def _show(self) -> None:
        self._board.show(encode(State(self._progress, self._details, self._remote)))

    def _read(self) -> None:
        """Commands, until the console is gone."""
        frames = Frames()
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                break
            for message in frames.feed(data):
                self._take(message)
        self._jobs.put(None)
        if self._report_to is None:
            self._leave()

    def _take(self, message: Any) -> None:
        match message:
            case Job():
                self._jobs.put(message)
            case Cancel():
                self._leave()
            case Go():
                self._go.put(None)
            case Reconnect():
                self._session.reconnect()
            case Background():
                with self._lock:
                    if not self._over:
                        self._report_to = Path(message.report)
                        self._sender.send(Kept())
                self._session.gate = None  # nobody is left who could press a key
                self._go.put(None)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    board = Board(int(sys.argv[2]))
    for fd in (sock.fileno(), board.fd):
        os.set_inheritable(fd, False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s session %(process)d %(message)s")
    with contextlib.suppress(Cancelled):
        Worker(sock, board).run()


if __name__ == "__main__":
    main()
