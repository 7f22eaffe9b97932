"""What the console asks of the core, in one place: the screens know only this, and tests put another in its stead.

Calls that read `/proc` may take long (smaps walks page tables): screens make them through `App.ask`, on a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from tuimig.core import check, policy, procfs
from tuimig.core.client import Feed, LiveSession
from tuimig.core.errors import Obstacle, TargetGone, TuimigError
from tuimig.core.host import Probe
from tuimig.core.jobs import Job
from tuimig.core.manifest import Manifest
from tuimig.core.model import Options, Region, Report
from tuimig.core.policy import Policy
from tuimig.core.procfs import ProcessLine
from tuimig.core.rates import Rates
from tuimig.tape import Tape


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP or UDP port that a process listens on."""

    number: int
    kind: str  # tcp | udp


class Backend(Protocol):
    """All of it may raise TuimigError."""

    host: str

    def processes(self) -> list[ProcessLine]: ...

    def obstacles(self, pid: int, options: Options) -> list[Obstacle]: ...

    def probes(self) -> list[Probe]: ...

    def regions(self, pid: int, ticks: int) -> list[Region]: ...

    def threads(self, pid: int) -> dict[int, str]: ...

    def ports(self, pid: int) -> list[Port]: ...

    def taken(self, port: Port) -> bool: ...

    def unfit(self, directory: Path) -> str: ...

    def unfit_file(self, file: Path) -> str: ...

    def start(self, job: Job) -> Feed: ...

    def rates(self) -> Rates: ...

    def learn(self, report: Report) -> None: ...

    def adopt(self, report: Report) -> None: ...

    def end_copy(self, report: Report) -> bool: ...

    def inspect(self, directory: Path) -> Manifest: ...

    def stored_ports(self, manifest: Manifest) -> list[Port]: ...

    def load_policy(self, file: Path) -> Policy: ...

    def save_policy(self, file: Path, chosen: Policy) -> None: ...

    def save_report(self, file: Path, text: str) -> None: ...

    def save_tape(self, file: Path, tape: Tape) -> None: ...

    def now(self) -> float: ...


class LiveBackend:
    """The real one. `state`: the directory for measured rates and the log."""

    def __init__(self, state: Path) -> None:
        self.host = socket.gethostname()
        self._state = state
        self._rates: Rates | None = None
        self._copies: dict[int, list[int]] = {}  # new pid -> pidfds of the copy and its init

    def processes(self) -> list[ProcessLine]:
        return [line for line in procfs.processes() if line.pid != os.getpid()]

    def obstacles(self, pid: int, options: Options) -> list[Obstacle]:
        return check.check_process(pid, options)

    def probes(self) -> list[Probe]:
        return check.probe_host()

    def regions(self, pid: int, ticks: int) -> list[Region]:
        """Of the process that started then; another one under its id raises TargetGone."""
        if procfs.start_time(pid) != ticks:
            raise TargetGone("the process that was chosen has ended; another one has its id", subject=f"process {pid}")
        return procfs.read_regions(pid)

    def threads(self, pid: int) -> dict[int, str]:
        """Names by id; a thread that ends meanwhile is left out."""
        names = {}
        for tid in procfs.read_tids(pid):
            with contextlib.suppress(TuimigError):
                names[tid] = procfs.read(pid, f"task/{tid}/comm").decode("utf-8", "replace").rstrip("\n")
        return names

    def ports(self, pid: int) -> list[Port]:
        with procfs.about(pid), contextlib.suppress(psutil.Error):
            found = set()
            for connection in psutil.Process(pid).net_connections("inet"):
                if connection.type == socket.SOCK_STREAM and connection.status == psutil.CONN_LISTEN:
                    found.add(Port(connection.laddr.port, "tcp"))
                elif connection.type == socket.SOCK_DGRAM and not connection.raddr and connection.laddr:
                    found.add(Port(connection.laddr.port, "udp"))
            return sorted(found, key=lambda port: (port.number, port.kind))
        return []

    def taken(self, port: Port) -> bool:
        """Whether somebody on this host has it now."""
        kind = socket.SOCK_STREAM if port.kind == "tcp" else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as probe:
            if port.kind == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port.number))
            except OSError as error:
                return error.errno == errno.EADDRINUSE
        return False

    def unfit(self, directory: Path) -> str:
        """Why a snapshot cannot be made there, as far as can be told before; nothing where it can."""
        if directory.is_dir() and not any(directory.iterdir()):
            return ""
        if directory.exists():
            return "is there already, and not empty"
        return "" if directory.absolute().parent.is_dir() else "its parent does not exist"

    def unfit_file(self, file: Path) -> str:
        """Why a copy cannot write there, as far as can be told before."""
        if file.is_dir():
            return "is a directory"
        return "" if file.parent.is_dir() else "its directory does not exist"

    def start(self, job: Job) -> Feed:
        return LiveSession(job, self._state / "tuimig.log")

    def rates(self) -> Rates:
        if self._rates is None:
            self._rates = Rates.load(self._state / "rates.json")
        return self._rates

    def learn(self, report: Report) -> None:
        self._rates = self.rates().learn(report)
        self._rates.save(self._state / "rates.json")

    def adopt(self, report: Report) -> None:
        """Remember a copy, so that `end_copy` ends this one and never another under its id."""
        if report.new_pid is None:
            return
        held: list[int] = []
        for pid in (report.new_pid, report.init_pid):
            with contextlib.suppress(OSError, TuimigError):  # it has ended already
                if pid:
                    held.append(os.pidfd_open(pid))
                if pid == report.new_pid and procfs.start_time(pid) != report.new_started:
                    os.close(held.pop())
                    return
        self._copies[report.new_pid] = held

    def end_copy(self, report: Report) -> bool:
        """Whether there was a copy to be ended."""
        return self._end(report.new_pid or -1)

    def end_copies(self) -> None:
        """All that were made here and not ended: a demo leaves nothing behind."""
        for pid in list(self._copies):
            self._end(pid)

    def _end(self, pid: int) -> bool:
        ended = False
        for pidfd in self._copies.pop(pid, []):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended = True
            os.close(pidfd)
        return ended

    def inspect(self, directory: Path) -> Manifest:
        from tuimig.core.snapshot import open_snapshot

        with open_snapshot(directory) as snapshot:
            return snapshot.manifest

    def stored_ports(self, manifest: Manifest) -> list[Port]:
        """What a snapshot's process listened on."""
        from tuimig.core import ports

        return [Port(number, kind) for number, kind in ports.stored(manifest)]

    def load_policy(self, file: Path) -> Policy:
        return policy.load(file)

    def save_policy(self, file: Path, chosen: Policy) -> None:
        self.save_report(file, policy.dump(chosen))

    def save_report(self, file: Path, text: str) -> None:
        """A new file; one that is there is not touched."""
        try:
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
                try:
                    out.write(text)
                    out.flush()
                except OSError:
                    file.unlink()
                    raise
        except OSError as error:
            raise TuimigError(
                "cannot write the file",
                subject=str(file),
                syscall="open",
                errno=error.errno or 0,
                cure="Choose another name",
            ) from error

    def save_tape(self, file: Path, tape: Tape) -> None:
        tape.save(file)

    def now(self) -> float:
        return time.monotonic()
