"""Takes the descriptors of a running program through dump and rebuild without the native engine.

The program stands still by itself, so probes read from outside what the engine would read inside a freeze. The copy is
a forked child of ours: descriptors are put under their numbers, calls are made, and a check runs among them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tuimig.core import procfs, rawcall
from tuimig.core.errors import Obstacle
from tuimig.core.manifest import FORMAT, Clocks, Host, Manifest, Process, ThreadEntry
from tuimig.core.model import Options
from tuimig.core.state import descriptors, epoll, eventfd, files, locks, pipes, sockets, terminals, timerfd, unix
from tuimig.core.state.base import OUT, Answer, Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.syscalls import NR

KINDS: tuple[Any, ...] = (
    files.KIND,
    terminals.KIND,
    pipes.KIND,
    sockets.KIND,
    unix.KIND,
    eventfd.KIND,
    eventfd.SIGNALFD,
    timerfd.KIND,
    locks.KIND,
    epoll.KIND,
    descriptors.KIND,
)
PRELUDE = "import ctypes, fcntl, os, select, signal, socket, struct, sys, tempfile, time\n"
_NAMES = {number: name for name, number in NR.items()}


@contextlib.contextmanager
def program(code: str, tmp_path: Path, **popen: Any) -> Iterator[int]:
    """Runs `code`, and yields its id once it stands still at the end of it. Its 0, 1 and 2 are /dev/null and a file."""
    ready = tmp_path / "ready"
    ready.unlink(missing_ok=True)
    end = f"\nos.close(os.open({str(ready)!r}, os.O_CREAT))\nwhile True: signal.pause()\n"
    text = PRELUDE + textwrap.dedent(code) + end
    with open(tmp_path / "errors", "w+b") as errors:
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
        child = subprocess.Popen([sys.executable, "-c", text], **(settings | popen))
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((tmp_path / "errors").read_text())
            select.select([], [], [], 0.005)
        while procfs.read(child.pid, "wchan") in (b"0", b""):
            select.select([], [], [], 0.005)
        yield child.pid
    finally:
        child.kill()
        child.wait()


class Taken:
    """What was dumped, as it comes back from a manifest."""

    def __init__(self, manifest: Manifest, sections: dict[str, Any], obstacles: list[Obstacle]) -> None:
        self.manifest = manifest
        self.sections = sections
        self.obstacles = obstacles

    def names(self) -> list[str]:
        return sorted(obstacle.name for obstacle in self.obstacles)


def find_obstacles(pid: int, options: Options | None = None) -> list[Obstacle]:
    with procfs.look(pid, options or Options()) as look:
        return [obstacle for kind in KINDS for obstacle in kind.obstacles(look)]


def take(pid: int, options: Options | None = None, meanwhile: Callable[[], object] = lambda: None) -> Taken:
    """Look, probe and dump; `meanwhile` happens between the look and T0."""
    with procfs.look(pid, options or Options()) as look:
        obstacles = [obstacle for kind in KINDS for obstacle in kind.obstacles(look)]
        probes = [probe for kind in KINDS for probe in kind.probes(look)]
        meanwhile()
        calls = {probe.key: _answer(look, probe) for probe in probes}
        clocks = Clocks(
            time.clock_gettime_ns(time.CLOCK_REALTIME),
            time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        )
        now = procfs.read_descriptors(pid)
        frozen = Frozen(look, clocks, now, look.regions, look.tids, calls, {})
        sections = {}
        for kind in KINDS:
            data = msgspec.json.encode(kind.dump(frozen))
            sections[kind.name] = msgspec.json.decode(data, type=kind.Section)
        return Taken(_manifest(pid, clocks), sections, obstacles)


def _manifest(pid: int, clocks: Clocks) -> Manifest:
    thread = ThreadEntry(pid, pid, "t", b"", b"", 0, 0, 0, 0, 0, 0, 0, [])
    return Manifest(
        format=FORMAT,
        tuimig="0",
        created="",
        host=Host("x86_64", 4096, "", "", 0),
        clocks=clocks,
        process=Process(pid, pid, 1, pid, pid, "t", [], ""),
        regions=[],
        threads=[thread],
        shared_pending=[],
        pages_size=0,
        state={},
        frozen_us=0,
    )


def _answer(look: Look, probe: Probe) -> Answer:
    try:
        if probe.kind is ProbeKind.FILE:
            with open(probe.path, "rb") as file:
                data = file.read()
            return Answer(len(data), data)
        if probe.kind is ProbeKind.TEE:
            return _tee(probe)
        if probe.kind is ProbeKind.PEEK:
            with socket.socket(fileno=os.dup(probe.fd)) as sock:
                data = sock.recv(probe.out, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return Answer(len(data), data)
        return _call(look, probe)
    except OSError as error:
        return Answer(-(error.errno or 0), b"")


def _tee(probe: Probe) -> Answer:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, pipes.F_SETPIPE_SZ, fcntl.fcntl(probe.fd, pipes.F_GETPIPE_SZ))
        count = rawcall.call("tee", probe.fd, writer, probe.out, 2)  # SPLICE_F_NONBLOCK
        frames = b""
        left = count
        while left > 0:
            piece = os.read(reader, left)
            frames += len(piece).to_bytes(4, "little") + piece
            left -= len(piece)
        return Answer(count, frames)
    finally:
        os.close(reader)
        os.close(writer)


def _call(look: Look, probe: Probe) -> Answer:
    """Probes of descriptors have their number first; our duplicate stands in. Other calls know no descriptor."""
    buffer = ctypes.create_string_buffer(probe.data, 1024)
    args = [ctypes.addressof(buffer) if arg == OUT else arg for arg in probe.args]
    name = _NAMES[probe.nr]
    if name != "clock_gettime":
        fd = rawcall.pidfd_getfd(look.pidfd, args[0])
        try:
            return Answer(rawcall.call(name, fd, *args[1:]), buffer.raw[: probe.out])
        finally:
            os.close(fd)
    return Answer(rawcall.call(name, *args), buffer.raw[: probe.out])


# ---------------------------------------------------------------- the copy


class Copied:
    """The result of the check and the warnings of the rebuild."""

    def __init__(self, value: Any, warnings: list[str]) -> None:
        self.value = value
        self.warnings = warnings


def rebuild(taken: Taken, check: Callable[[], Any], options: Options | None = None) -> Copied:
    """Raises what the rebuild raises; an exception in `check` fails the test with the child's traceback."""
    build = Build(taken.manifest, options or Options())
    try:
        for kind in KINDS:
            kind.rebuild(taken.sections[kind.name], build)
        reader, writer = os.pipe()
        closed, close = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.close(close)
            _child(build, closed, writer, check)
        os.close(writer)
        os.close(closed)
    finally:
        build.close()
    os.close(close)
    try:
        with open(reader, "rb") as file:
            text = file.read()
    finally:
        os.waitpid(pid, 0)
    answer = json.loads(text)
    assert "error" not in answer, answer["error"]
    return Copied(answer["value"], build.warnings)


def _child(build: Build, closed: int, writer: int, check: Callable[[], Any]) -> None:
    """Never returns. `closed` ends when the parent holds nothing of the build any more: no end of a pipe, no lock."""
    writer = fcntl.fcntl(writer, fcntl.F_DUPFD, 900)
    os.read(closed, 1)
    try:
        placed = {
            number: (fcntl.fcntl(fd, fcntl.F_DUPFD, 500), cloexec) for number, (fd, cloexec) in build.placed.items()
        }
        os.closerange(0, 500)
        for number, (fd, cloexec) in placed.items():
            os.dup2(fd, number, inheritable=not cloexec)
        os.closerange(500, 900)
        for stage in (Stage.SETUP, Stage.THREAD, Stage.FINISH):
            for _, call in build.calls.get(stage, []):
                _make(call)
        answer = {"value": check()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    finally:
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)


def _make(call: Call) -> None:
    buffers = [ctypes.create_string_buffer(arg, len(arg)) if isinstance(arg, bytes) else None for arg in call.args]
    args = [
        ctypes.addressof(buffer) if buffer is not None else int(arg)  # type: ignore[arg-type]
        for arg, buffer in zip(call.args, buffers, strict=True)
    ]
    try:
        rawcall.call(_NAMES[call.nr], *args)
    except OSError as error:
        if error.errno not in call.allow:
            raise OSError(error.errno, f"{call.what}: {errno.errorcode.get(error.errno or 0)}") from error


def flags(number: int) -> int:
    return fcntl.fcntl(number, fcntl.F_GETFL)
