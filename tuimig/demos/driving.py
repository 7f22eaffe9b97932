"""A workload seen from outside: started, asked for its state, judged after a clone, ended.

`Running` is what the demo and the console hold. It watches the migration's events (`see`), since when T0 was decides
what must be in the copy.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tuimig.core.errors import TuimigError
from tuimig.core.model import Event, Options, Phase, PortMap, Report
from tuimig.core.policy import Policy

START_S: Final = 60.0
ANSWER_S: Final = 60.0
END_S: Final = 10.0
PATIENCE_S: Final = 5.0  # for a step of every worker on a busy machine
WORKLOAD: Final = "the workload"


class Running(ABC):
    """A workload's process. `options` and `policy` are what a clone of it needs; `port` is the source's, `new_port`
    the copy's."""

    policy = Policy()

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.new_port = free_port()
        self.options = Options(map_ports=(PortMap(port, self.new_port),), tcp="close")
        # T0 lies between these two, CLOCK_MONOTONIC
        self.frozen_ns = 0
        self.thawed_ns = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def see(self, event: Event) -> None:
        """A listener of the session that clones it."""
        if isinstance(event, Phase) and event.name == "freeze":
            self.frozen_ns, self.thawed_ns = event.time_ns, 0
        elif isinstance(event, Phase) and event.name == "capture":
            self.thawed_ns = event.time_ns

    @abstractmethod
    def before(self) -> list[str]:
        """What it is doing now, in lines. Called once, before the clone."""

    @abstractmethod
    def check(self, report: Report) -> list[str]:
        """Source and copy after the clone, in lines. Raises TuimigError where the copy is not the process of T0."""

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


# ---------------------------------------------------------------- workloads that answer `state`


@dataclass(frozen=True, slots=True)
class State:
    """An answer of the workload. `counts`: steps of each worker; `wrong`: pages that do not hold what they should."""

    pid: int
    threads: int
    pages: int
    counts: tuple[int, ...]
    wrong: int
    address: int = 0  # canvas: where its picture lies
    side: int = 0

    def __str__(self) -> str:
        verdict = "all as they should be" if self.wrong == 0 else f"{self.wrong} WRONG"
        return f"{sum(self.counts):>9} steps in {self.threads} threads, {self.pages} pages, {verdict}"


class Stepping(Running):
    """A workload of which every page is known from its count of steps."""

    def __init__(self, module: str, memory: int, precopy: str = "off") -> None:
        """Without pre-copy all of the memory is captured after T0, and there is most to see."""
        super().__init__(*launch(module, memory))
        self.options = replace(self.options, precopy=precopy)
        self._before: State | None = None

    def before(self) -> list[str]:
        self._before = ask(self.port)
        return [_line("source", self.pid, self._before)]

    def check(self, report: Report) -> list[str]:
        assert self._before is not None
        assert report.new_pid is not None
        first, source = moved_on(self.new_port, self._before), moved_on(self.port, self._before)
        second, later = moved_on(self.new_port, first), moved_on(self.port, source)
        judge(self._before, [first, second], [source, later])
        pairs = (("copy", report.new_pid, first), ("source", self.pid, source))
        again = (("copy", report.new_pid, second), ("source", self.pid, later))
        return [_line(*pair) for pair in (*pairs, *again)]


def _line(name: str, pid: int, state: State) -> str:
    return f"{name:<7} {pid:>7}  {state}"


def judge(before: State, copy: Sequence[State], source: Sequence[State]) -> None:
    """Every page as it should be, and every worker goes on from where it was at T0."""
    for name, states in (("the copy", copy), ("the source", source)):
        if any(state.wrong for state in states):
            raise TuimigError(f"{max(s.wrong for s in states)} pages are wrong", subject=name)
        for earlier, later in itertools.pairwise([before, *states]):
            if any(new <= old for old, new in zip(earlier.counts, later.counts, strict=True)):
                raise TuimigError("a worker stands still or went back", subject=name)


# ---------------------------------------------------------------- processes and sockets


def launch(module: str, memory: int) -> tuple[subprocess.Popen[bytes], int]:
    """A workload of ours as a process of its own, once it has said its port."""
    command = [sys.executable, "-m", f"tuimig.demos.{module}", str(max(memory >> 20, 1))]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors_to(),
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise TuimigError(
            "cannot start the workload", subject=sys.executable, syscall="execve", errno=error.errno or 0
        ) from None
    try:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START_S)[0]:
            raise TuimigError(f"did not start within {START_S:.0f} s", subject=WORKLOAD)
        line = process.stdout.readline()
        if not line:
            raise TuimigError(f"ended at once, exit status {process.wait()}", subject=WORKLOAD)
        return process, int(line)
    except BaseException:
        process.kill()
        process.wait()
        raise


def errors_to() -> int | None:
    """A workload's stderr: not ours, or a copy would write there as well."""
    return None if os.environ.get("TUIMIG_DEBUG") else subprocess.DEVNULL


def end_copy(report: Report) -> None:
    """Ends the copy, and the init of its PID namespace where it has one, and waits until they are gone."""
    for pid in (report.new_pid, report.init_pid):
        with contextlib.suppress(ProcessLookupError):  # gone already
            if pid is not None:
                pidfd = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], END_S)
                finally:
                    os.close(pidfd)


def connect(port: int) -> socket.socket:
    """A connection to a workload; waits for a copy that is still being built, at most ANSWER_S."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except ConnectionRefusedError as error:
            if time.monotonic() > deadline:
                raise no_answer(port, error) from error
            time.sleep(0.01)
        except OSError as error:
            raise no_answer(port, error) from error


def ask(port: int) -> State:
    """The workload's state."""
    try:
        with connect(port) as connection:
            connection.sendall(b"state\n")
            line = connection.makefile("r", encoding="ascii").readline()
    except OSError as error:
        raise no_answer(port, error) from error
    if not line:
        raise TuimigError("closed the connection without an answer", subject=f"port {port}")
    fields: dict[str, Any] = json.loads(line)
    return State(**{**fields, "counts": tuple(fields["counts"])})


def moved_on(port: int, earlier: State) -> State:
    """Its state once every worker has made a step since `earlier`, or the last one before patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state = ask(port)
        on = all(new > old for old, new in zip(earlier.counts, state.counts, strict=True))
        if on or state.wrong or time.monotonic() > deadline:
            return state


def no_answer(port: int, error: OSError) -> TuimigError:
    return TuimigError("does not answer", subject=f"port {port}", errno=error.errno or 0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number
