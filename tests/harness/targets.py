"""C targets: compiled once per source, started with a readiness handshake, asked over their control socket.

A target owns its process; `stop` (or the `targets` fixture) ends it. Nothing here sleeps to synchronise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROGRAMS = HERE / "programs"
CACHE = HERE.parent / "build" / "test-programs"
NOT_HERE = 77  # exit code of a target that lacks a kernel feature
FLAGS = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-pthread")


def compiled(name: str) -> Path:
    """The program `name`, from every programs/NAME*.c; compiled if its text is new."""
    sources = sorted([PROGRAMS / f"{name}.c", *PROGRAMS.glob(f"{name}_*.c")])
    texts = b"".join(path.read_bytes() for path in [*sources, *sorted(PROGRAMS.glob("*.h"))])
    program = CACHE / f"{name}-{hashlib.blake2b(texts, digest_size=6).hexdigest()}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", *FLAGS, *map(str, sources), "-o", str(fresh)], check=True)
        fresh.rename(program)
    return program


def ask(path: Path | str, command: str, timeout_s: float = 60) -> dict[str, Any]:
    """One question over a control socket; returns once the target has closed its side."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(command.encode() + b"\n")
        text = b""
        while piece := sock.recv(65536):
            text += piece
    answer: dict[str, Any] = json.loads(text)
    return answer


def end(pid: int) -> None:
    """SIGKILL to one process and wait until it is gone, whether it is a child of ours or not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.suppress(ProcessLookupError):  # gone already
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], 20)
    os.close(pidfd)
    with contextlib.suppress(ChildProcessError):  # not ours to reap
        os.waitpid(pid, 0)


class NotHereError(Exception):
    """The target cannot make its state on this host."""


class Target:
    """A process under test. `control` is the path of its control socket, where it has one."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        directory: Path,
        control: Path | None = None,
        handshake: bool = True,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.control = control
        self.output = directory / f"output-{Path(argv[0]).name}-{os.urandom(3).hex()}"
        reader, writer = os.pipe()
        try:
            with self.output.open("wb") as output:
                self.process = subprocess.Popen(
                    [str(a) for a in argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {}), **({"READY_FD": str(writer)} if handshake else {})},
                    pass_fds=[writer] if handshake else [],
                    user=user,
                    group=user,
                    extra_groups=[] if user is not None else None,
                    cwd=cwd,
                    start_new_session=True,
                )
            os.close(writer)
            writer = -1
            if handshake:
                self._wait_ready(reader)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    def _wait_ready(self, reader: int, timeout_s: float = 60) -> None:
        text = b""
        while select.select([reader], [], [], timeout_s)[0]:  # until it has closed its end too
            piece = os.read(reader, 6)
            text += piece
            if not piece:
                break
        if text != b"ready\n":
            if not text and self.process.wait(timeout_s) == NOT_HERE:
                raise NotHereError(f"{self.process.args!r}: this kernel does not have it, or does not allow it")
            self.stop()
            raise RuntimeError(f"{self.process.args!r} did not come up: {self.output.read_text()}")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, command: str, timeout_s: float = 60) -> dict[str, Any]:
        assert self.control is not None
        return ask(self.control, command, timeout_s)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Stopped meanwhile, so that somebody else has the CPUs."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """A TCP port that nobody listens on; the kernel does not hand the same one out again soon."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port
