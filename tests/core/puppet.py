"""A process that makes system calls on demand, in any of its threads: it answers probes as a frozen target would, and
carries out a rebuild as the stub does. A fork of the tests, so that code addresses mean the same in all puppets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from snapshots import manifest, region, thread
from tuimig.core import procfs
from tuimig.core.manifest import Clocks, Manifest
from tuimig.core.model import Options
from tuimig.core.state.base import OUT, Answer, Build, Frozen, Look, Probe, ProbeKind, Stage

Request = tuple[int, int, tuple[int | bytes, ...], bytes, int]  # tid, nr, args, data, out
ROOM = 4096


class Puppet:
    def __init__(self, threads: int = 0) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._ours.close()
                _serve(theirs, threads)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self._pidfd = os.pidfd_open(self.pid)
        self.tids: list[int] = pickle.loads(self._ours.recv(1 << 16))

    def call(self, nr: int, *args: int | bytes, tid: int = 0, data: bytes = b"", out: int = 0) -> Answer:
        """What the call returned in that thread (0: the leader), and what is in the buffer then."""
        request: Request = (tid or self.pid, nr, args + (0,) * (6 - len(args)), data, out)
        self._ours.send(pickle.dumps(request))
        reply = self._ours.recv(1 << 16)
        assert reply, "the puppet has died"
        ret, back = pickle.loads(reply)
        return Answer(ret, back)

    def end(self) -> None:
        self._ours.close()
        with contextlib.suppress(OSError):  # it may have ended already
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)
        with contextlib.suppress(ChildProcessError):  # the test has taken notice of its end
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def puppet(threads: int = 0) -> Iterator[Puppet]:
    made = Puppet(threads)
    try:
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def look(at: Puppet) -> Iterator[Look]:
    with procfs.look(at.pid, Options()) as seen:
        yield seen


def freeze(at: Puppet, seen: Look, probes: Sequence[Probe]) -> Frozen:
    """The answers to the probes, as the engine gives them."""
    calls: dict[str, Answer] = {}
    each: dict[str, dict[int, Answer]] = {}
    for probe in probes:
        if probe.kind is ProbeKind.FILE:
            try:
                with open(probe.path, "rb") as file:
                    data = file.read()
                calls[probe.key] = Answer(len(data), data)
            except OSError as error:
                calls[probe.key] = Answer(-(error.errno or 0), b"")
        elif probe.kind is ProbeKind.CALL:
            calls[probe.key] = at.call(probe.nr, *probe.args, data=probe.data, out=probe.out)
        else:
            assert probe.kind is ProbeKind.CALL_EACH
            each[probe.key] = {
                tid: at.call(probe.nr, *probe.args, tid=tid, data=probe.data, out=probe.out) for tid in at.tids
            }
    return Frozen(
        look=seen,
        clocks=Clocks(realtime_ns=0, monotonic_ns=0, boottime_ns=0),
        descriptors={},
        regions=seen.regions,
        tids=at.tids,
        calls=calls,
        each=each,
    )


def dump(kinds: Sequence[Any], at: Puppet) -> list[Any]:
    """The sections of these kinds."""
    with look(at) as seen:
        for kind in kinds:
            assert kind.obstacles(seen) == []
        frozen = freeze(at, seen, [probe for kind in kinds for probe in kind.probes(seen)])
        return [kind.dump(frozen) for kind in kinds]


def copy_manifest(source: Puppet, copy: Puppet) -> Manifest:
    """As of the source, but the copy's threads have ids of their own."""
    whole = manifest([region(0x10000, 1, None)], 0)
    threads = [thread(mine, host_tid=theirs) for theirs, mine in zip(source.tids, copy.tids, strict=True)]
    process = msgspec.structs.replace(whole.process, pid=copy.pid, host_pid=source.pid)
    return msgspec.structs.replace(whole, threads=threads, process=process)


def rebuild(kinds: Sequence[Any], sections: Sequence[Any], source: Puppet, copy: Puppet) -> list[str]:
    """Carry it out in the copy; returns the warnings."""
    build = Build(copy_manifest(source, copy), Options())
    for kind, section in zip(kinds, sections, strict=True):
        kind.rebuild(section, build)
    for stage in Stage:
        for tid, call in build.calls.get(stage, []):
            answer = copy.call(call.nr, *call.args, tid=tid)
            assert answer.ret >= 0 or -answer.ret in call.allow, f"{call.what}: {os.strerror(-answer.ret)}"
    for _, act in build.actions:
        act({tid: tid for tid in copy.tids})
    build.close()
    return build.warnings


def _serve(channel: socket.socket, threads: int) -> None:
    libc = ctypes.PyDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    orders: dict[int, queue.SimpleQueue[Request]] = {}
    replies: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

    def carry_out(request: Request) -> tuple[int, bytes]:
        _, nr, args, data, out = request
        buffer = ctypes.create_string_buffer(data, ROOM)
        kept = [ctypes.create_string_buffer(arg, len(arg)) if isinstance(arg, bytes) else None for arg in args]
        values = [
            ctypes.addressof(keep) if keep is not None else ctypes.addressof(buffer) if arg == OUT else arg
            for arg, keep in zip(args, kept, strict=True)
        ]
        ret = libc.syscall(ctypes.c_long(nr), *[ctypes.c_ulong(value & OUT) for value in values])
        return (-ctypes.get_errno() if ret == -1 else ret), buffer.raw[:out]

    def work() -> None:
        own = orders[threading.get_native_id()] = queue.SimpleQueue()
        ready.release()
        while True:
            replies.put(carry_out(own.get()))

    ready = threading.Semaphore(0)
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    for _ in range(threads):
        ready.acquire()
    channel.send(pickle.dumps([os.getpid(), *sorted(orders)]))
    while order := channel.recv(1 << 16):
        request: Request = pickle.loads(order)
        if request[0] == os.getpid():
            reply = carry_out(request)
        else:
            orders[request[0]].put(request)
            reply = replies.get()
        channel.send(pickle.dumps(reply))
