"""The stub process in Python: spawn it, make system calls in it, write its memory, let it run as the copy.

A thin face of `native/stub.h`. ptrace belongs to the thread that spawned the stub, so all of a stub's methods are
called from that one thread. Until `release` the stub dies with us; `close` before it ends everything that was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from tuimig.core.engine import check, ffi, lib, new_error
from tuimig.core.errors import RebuildFailed, TuimigError
from tuimig.core.spool import Spool
from tuimig.core.state.base import Call
from tuimig.core.syscalls import NR

SCRATCH: Final = int(lib.TM_STUB_SCRATCH)  # bytes that must be free in our layout and in the copy's
DATA_OFFSET: Final = 4096  # where in the scratch the data of an injected call lies
_NAMES: Final[dict[int, str]] = {number: name for name, number in NR.items()}
_ALIGN: Final = 16
_MOST_ALLOWED: Final = 6


@dataclass(frozen=True, slots=True)
class Place:
    """Our descriptor `fd` becomes `number` in the copy."""

    number: int
    fd: int
    cloexec: bool


@dataclass(frozen=True, slots=True)
class Content:
    """Stored pages to be written before the copy runs: to `address` of its memory, or of our file `fd` if not -1."""

    address: int
    first_page: int
    n_pages: int
    fd: int = -1


@dataclass(frozen=True, slots=True)
class Image:
    """The final state of one thread: host id, register images, signal mask."""

    tid: int
    regs: bytes
    xstate: bytes
    sigmask: int


@dataclass(frozen=True, slots=True)
class Spec:
    """What the stub is to be. `setup` calls are made by the stub itself, after placement, with all privileges."""

    pid: int  # in its innermost PID namespace
    new_namespace: bool
    init_fd: int  # the program tuimig-init, -1 where no namespace is made
    scratch: int
    places: Sequence[Place]
    setup: Sequence[Call]
    uffd_number: int = 0
    uffd_features: int = 0  # 0: no userfaultfd wanted
    time_offsets: str = ""  # text for timens_offsets; empty: the clocks as they are


@dataclass(slots=True)
class _Packed:
    """An array of `struct tm_call` and what it points to."""

    array: Any
    kept: list[Any] = field(default_factory=list)


def pack(calls: Sequence[tuple[int, Call]]) -> _Packed:
    """Pairs of host thread id (0: the leader) and call."""
    packed = _Packed(ffi.new("struct tm_call[]", max(len(calls), 1)))
    for native, (tid, call) in zip(packed.array, calls, strict=False):
        data = bytearray()
        native.nr = call.nr
        native.tid = tid
        for i, argument in enumerate(call.args):
            if isinstance(argument, int):
                native.args[i] = argument & ((1 << 64) - 1)
                continue
            native.args[i] = len(data)
            native.pointers |= 1 << i
            data += argument
            data += bytes(-len(data) % _ALIGN)
        if len(call.allow) > _MOST_ALLOWED:
            raise ValueError(f"{call.what}: more than {_MOST_ALLOWED} errnos allowed")
        for i, errno in enumerate(call.allow):
            native.allow[i] = errno
        if data:
            buffer = ffi.new("uint8_t[]", bytes(data))
            packed.kept.append(buffer)
            native.data, native.size = buffer, len(data)
    return packed


class Stub:
    """The stub from its spawning to its release. A context manager: leaving it before `release` ends the stub."""

    def __init__(self, spec: Spec, subject: str) -> None:
        self._subject = subject
        self.scratch = spec.scratch
        self.uffd_number = spec.uffd_number
        self.new_namespace = spec.new_namespace
        self._native: Any = ffi.NULL
        self._info: Any = ffi.new("struct tm_stub_info *")
        self._tids: dict[int, int] = {}
        setup = pack([(0, call) for call in spec.setup])
        ordered = sorted(spec.places, key=lambda place: place.number)
        stages = _stages(ordered)
        places = ffi.new("struct tm_stub_place[]", [(p.number, p.fd, next(stages), p.cloexec) for p in ordered] or 1)
        offsets = ffi.new("char[]", spec.time_offsets.encode()) if spec.time_offsets else ffi.NULL
        native = ffi.new(
            "struct tm_stub_spec *",
            {
                "pid": spec.pid,
                "new_namespace": spec.new_namespace,
                "init_fd": spec.init_fd,
                "uffd_number": spec.uffd_number,
                "uffd_features": spec.uffd_features,
                "time_offsets": offsets,
                "scratch": spec.scratch,
                "places": places,
                "n_places": len(spec.places),
                "n_setup": len(spec.setup),
                "setup": setup.array,
            },
        )
        out, error = ffi.new("struct tm_stub **"), new_error()
        code = lib.tm_stub_spawn(native, out, self._info, error)
        if code and ffi.string(error.where) == b"setup":
            raise _failed(spec.setup[self._info.failed_setup], int(error.err), self._subject)
        _check(code, error, subject)
        self._native = out[0]
        self._tids[spec.pid] = self.pid

    @property
    def pid(self) -> int:
        """As this process sees it."""
        return int(self._info.pid)

    @property
    def pidfd(self) -> int:
        return int(self._info.pidfd)

    @property
    def init_pid(self) -> int | None:
        """The first process of the PID namespace that was made, where one was."""
        return int(self._info.init_pid) or None

    @property
    def init_pidfd(self) -> int:
        return int(self._info.init_pidfd)

    def take_uffd(self) -> int:
        """Our descriptor of the stub's userfaultfd; from now on the caller's to close."""
        return int(lib.tm_stub_take_uffd(self._native))

    @property
    def time_errno(self) -> int:
        """Why the time offsets were refused; 0: they were not."""
        return int(self._info.time_errno)

    @property
    def xstate_size(self) -> int:
        return int(self._info.xstate_size)

    @property
    def first_ns(self) -> int:
        """CLOCK_MONOTONIC just before the copy's first instruction."""
        return int(self._info.first_ns)

    @property
    def host_tids(self) -> Mapping[int, int]:
        """Thread ids in the copy's namespace to those in ours."""
        return self._tids

    def run(self, calls: Sequence[tuple[int, Call]]) -> list[int]:
        """Make calls in threads given by their inner id (0: the leader), in order; returns what they returned."""
        packed = pack([(self._tids[tid] if tid else 0, call) for tid, call in calls])
        failed, error = ffi.new("uint32_t *"), new_error()
        code = lib.tm_stub_calls(self._native, packed.array, len(calls), failed, error)
        if code:
            call = calls[failed[0]][1]
            if packed.array[failed[0]].ret < 0:
                raise _failed(call, int(error.err), self._subject)
            _check(code, error, f"{self._subject}, {call.what}")
        return [int(packed.array[i].ret) for i in range(len(calls))]

    def add_thread(self, tid: int) -> int:
        """Start a thread with this id in the copy's namespace, stopped; returns its id in ours."""
        out, error = ffi.new("int32_t *"), new_error()
        _check(lib.tm_stub_thread(self._native, tid, out, error), error, self._subject)
        self._tids[tid] = int(out[0])
        return int(out[0])

    def write(self, spool: Spool, contents: Sequence[Content]) -> None:
        """Pages with a sum are written, others left as they are."""
        array = ffi.new(
            "struct tm_stub_content[]",
            [{"address": c.address, "first_page": c.first_page, "n_pages": c.n_pages, "fd": c.fd} for c in contents]
            or 1,
        )
        error = new_error()
        check(lib.tm_stub_write(self._native, spool.native, array, len(contents), error), error, self._subject)

    def pin(self, together: bool) -> None:
        """All its threads and this one on one processor, where injected calls are fastest; or as before."""
        lib.tm_stub_pin(self._native, together)

    def release(self, images: Sequence[Image]) -> None:
        """Unmap the scratch, set every thread's final state, let the copy run."""
        kept = []
        array = ffi.new("struct tm_stub_image[]", max(len(images), 1))
        for native, image in zip(array, images, strict=False):
            regs, xstate = ffi.from_buffer(image.regs), ffi.from_buffer(image.xstate)
            kept += [regs, xstate]
            native.tid, native.sigmask = image.tid, image.sigmask
            native.regs, native.regs_size = regs, len(image.regs)
            native.xstate, native.xstate_size = xstate, len(image.xstate)
        error = new_error()
        _check(lib.tm_stub_release(self._native, array, len(images), error), error, self._subject)
        lib.tm_stub_info(self._native, self._info)

    def close(self) -> None:
        """Before `release`: end everything that was made. After it: only let go of the descriptors."""
        if self._native != ffi.NULL:
            lib.tm_stub_destroy(self._native)
            self._native = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stages(places: Sequence[Place]) -> Iterator[int]:
    """Numbers that are no place's number and no place's descriptor, lowest first: limits of open files are kept."""
    used = {place.number for place in places} | {place.fd for place in places}
    return (number for number in itertools.count() if number not in used)


def _failed(call: Call, errno: int, subject: str) -> RebuildFailed:
    return RebuildFailed(f"cannot {call.what}", subject=subject, syscall=_NAMES.get(call.nr, str(call.nr)), errno=errno)


def _check(code: int, error: Any, subject: str) -> None:
    """As `engine.check`; what has no better class is a failed rebuild."""
    try:
        check(code, error, subject)
    except TuimigError as problem:
        if code == lib.TM_SYS or code == lib.TM_GONE:
            raise RebuildFailed(
                problem.what, subject=subject, syscall=problem.syscall, errno=problem.errno, cure=problem.cure
            ) from None
        raise
