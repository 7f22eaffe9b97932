"""Page streams in Python: the source's sender and the destination's arrival. Thin faces of `native/stream.h`.

The work is done by native threads. Descriptors given to `add` are taken over. A spool that is still being written,
`ArrivingSpool`, waits for the pages that it is asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from tuimig.core.engine import check, ffi, lib, new_error
from tuimig.core.errors import ProtocolError, TuimigError
from tuimig.core.model import PAGE, Histogram
from tuimig.core.source import Source
from tuimig.core.spool import Spool

Runs = bytes  # pairs of little endian 64-bit words: first page, number of pages
RUN: Final = 16
RUNS_MOST: Final = 200_000  # of a State: it has to fit a message
NO_MEMORY: Final = (1 << 64) - 1

PAGES: Final = int(lib.TM_STREAM_PAGES)
DEMAND: Final = int(lib.TM_STREAM_DEMAND)
ENCODINGS: Final = {"none": int(lib.TM_RAW), "lz4": int(lib.TM_LZ4), "zstd": int(lib.TM_ZSTD)}
SLICE_MS: Final = 2  # of a wait for pages, between two looks at what else there is: the streams may only just be coming


@dataclass(frozen=True, slots=True)
class StreamProgress:
    """Counters of all streams of one side, pages of 4 KiB. `lost`: streams that ended without being asked to.

    Before T0 `sent` counts different pages.
    """

    expected: int
    sent: int
    bytes: int
    demand_requests: int
    demand_pages: int
    zero_pages: int
    packed_bytes: int
    unpacked_bytes: int
    stream_bytes: tuple[int, ...]
    lost: int
    broken: bool  # the other side does not keep to the protocol

    @property
    def complete(self) -> bool:
        return self.sent >= self.expected


def check_encoding(name: str) -> None:
    """PrivilegeError where the library is not there."""
    error = new_error()
    check(lib.tm_encoding_check(ENCODINGS[name], error), error, f"--compress {name}", "Install it, or do without")


def content_runs(source: Source, eager_only: bool = False) -> Runs:
    """The pages with content of a freeze whose eager pages are stored."""
    return _gather(lambda out, room: int(lib.tm_source_content(source.native, int(eager_only), out, room)))


def _gather(call: Callable[[Any, int], int]) -> Runs:
    room = 1 << 12
    while True:
        out = ffi.new("struct tm_run[]", room)
        count = call(out, room)
        if count == NO_MEMORY:
            raise MemoryError
        if count <= room:
            return bytes(ffi.buffer(out)[: count * RUN])
        room = count + 1024  # more may come meanwhile


def _native(runs: Runs) -> tuple[Any, int]:
    """An array of `struct tm_run`, and its length. The bytes must outlive it."""
    if len(runs) % RUN:
        raise ProtocolError("a list of pages is cut")
    return ffi.cast("struct tm_run *", ffi.from_buffer(runs)), len(runs) // RUN


def count_pages(runs: Runs) -> int:
    return sum(n for _, n in struct.iter_unpack("<QQ", runs))


def _progress(native: Any) -> StreamProgress:
    return StreamProgress(
        expected=int(native.expected),
        sent=int(native.sent),
        bytes=int(native.bytes),
        demand_requests=int(native.demand_requests),
        demand_pages=int(native.demand_pages),
        zero_pages=int(native.zero_pages),
        packed_bytes=int(native.packed_bytes),
        unpacked_bytes=int(native.unpacked_bytes),
        stream_bytes=tuple(int(native.stream_bytes[i]) for i in range(native.n_streams)),
        lost=int(native.lost),
        broken=native.code not in (0, lib.TM_SYS, lib.TM_CANCELLED),
    )


class Sender:
    """Gives the pages of a tracked spool that has pages, or room for them. Nothing is given until it is told what."""

    def __init__(
        self, spool: Spool, *, epoch: int, encoding: str = "none", bandwidth: int = 0, streams: int = 1
    ) -> None:
        self._keep: list[object] = [spool]
        self._native: Any = ffi.NULL
        options = ffi.new(
            "struct tm_sender_options *",
            {"epoch": epoch, "encoding": ENCODINGS[encoding], "bandwidth": bandwidth, "n_streams": streams},
        )
        out, error = ffi.new("struct tm_sender **"), new_error()
        check(lib.tm_sender_create(spool.native, options, out, error), error)
        self._native = out[0]

    def early(self, most: int) -> None:
        """Before T0: give what the spool holds, and again what is stored again; at most so many different pages."""
        lib.tm_sender_early(self._native, most)

    def backlog(self) -> int:
        """Pages that are there and not given."""
        return int(lib.tm_sender_backlog(self._native))

    def halt(self, timeout_s: float) -> bool:
        """Give nothing more. Whether the other side has confirmed all that was given."""
        return bool(lib.tm_sender_halt(self._native, int(timeout_s * 1000)))

    def expect(self, source: Source, expected: Runs, urgent: Runs) -> Runs:
        """T0, and what is given from now on; demands are captured at once. Of it, what had been given and is valid."""
        error, kept = new_error(), ffi.new("struct tm_run const **")
        self._keep.append(source)
        code = lib.tm_sender_expect(self._native, source.native, *_native(expected), *_native(urgent), error)
        check(code, error)
        count = int(lib.tm_sender_kept(self._native, kept))
        return bytes(ffi.buffer(kept[0], count * RUN)) if count else b""

    def add(self, fd_in: int, fd_out: int, kind: int) -> None:
        error = new_error()
        check(lib.tm_sender_stream(self._native, fd_in, fd_out, kind, error), error)

    def had(self, runs: Runs) -> None:
        """What the other side has; the rest is sent again. Only while there are no streams."""
        error = new_error()
        check(lib.tm_sender_had(self._native, *_native(runs), error), error)

    def urgent_only(self, only: bool) -> None:
        """While it is on, no page goes but urgent ones and those that are asked for."""
        lib.tm_sender_urgent_only(self._native, int(only))

    def source_over(self) -> None:
        """Everything is in the spool; the source may be let go of."""
        if self._native != ffi.NULL:
            lib.tm_sender_source_over(self._native)

    def stop(self) -> None:
        lib.tm_sender_stop(self._native)

    def progress(self) -> StreamProgress:
        native = ffi.new("struct tm_stream_progress *")
        lib.tm_sender_progress(self._native, native)
        return _progress(native)

    def failure(self) -> TuimigError | None:
        """Why the first stream was lost."""
        return _failure(lib.tm_sender_result, self._native)

    def close(self) -> None:
        if self._native != ffi.NULL:
            lib.tm_sender_destroy(self._native)
            self._native = ffi.NULL


class Arrival:
    """Takes pages into a tracked, writable spool; before T0 at most `early_most` different ones."""

    def __init__(self, spool: Spool, epoch: int, early_most: int = 0) -> None:
        self._spool = spool
        self._native: Any = ffi.NULL
        out, error = ffi.new("struct tm_arrival **"), new_error()
        check(lib.tm_arrival_create(spool.native, early_most, epoch, out, error), error)
        self._native = out[0]

    def expect(self, n_pages: int, expected: Runs, kept: Runs) -> None:
        """T0, once: the spool's size, what will come, and what of it came early and stays.

        TM_DAMAGED where the lists make no sense.
        """
        error = new_error()
        code = lib.tm_arrival_expect(self._native, n_pages, *_native(expected), *_native(kept), error)
        check(code, error, "the source's message")

    @property
    def native(self) -> Any:
        return self._native

    def add(self, fd_in: int, fd_out: int, kind: int) -> None:
        error = new_error()
        check(lib.tm_arrival_stream(self._native, fd_in, fd_out, kind, error), error)

    def require(self, first: int, n_pages: int, timeout_ms: int) -> bool:
        """Whether these pages are there within the time; they are asked for."""
        return bool(lib.tm_arrival_require(self._native, first, n_pages, timeout_ms))

    def present(self) -> Runs:
        """Pages that are there, in at most RUNS_MOST runs: what is not told comes once more."""
        out = ffi.new("struct tm_run[]", RUNS_MOST)
        count = min(RUNS_MOST, int(lib.tm_arrival_present(self._native, out, RUNS_MOST)))
        return bytes(ffi.buffer(out)[: count * RUN])

    def stop(self) -> None:
        lib.tm_arrival_stop(self._native)

    def progress(self) -> StreamProgress:
        native = ffi.new("struct tm_stream_progress *")
        lib.tm_arrival_progress(self._native, native)
        return _progress(native)

    def round_trips(self) -> Histogram:
        """Demands: from asked to arrived."""
        native = ffi.new("struct tm_histogram *")
        lib.tm_arrival_round_trips(self._native, native)
        return Histogram(tuple(ffi.unpack(native.bucket, len(native.bucket))), int(native.max_ns))

    def failure(self) -> TuimigError | None:
        return _failure(lib.tm_arrival_result, self._native)

    def close(self) -> None:
        if self._native != ffi.NULL:
            lib.tm_arrival_destroy(self._native)
            self._native = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _failure(result: Callable[[Any, Any], None], native: Any) -> TuimigError | None:
    error = new_error()
    result(native, error)
    try:
        check(int(error.code), error)
    except TuimigError as problem:
        return problem
    return None


class ArrivingSpool(Spool):
    """A spool that an arrival writes. `meanwhile` is called while pages are waited for, and may raise to give up."""

    def __init__(self, pages_fd: int, n_pages: int, meanwhile: Callable[[], None]) -> None:
        super().__init__(pages_fd, n_pages, True, "the pages that arrive")
        self._meanwhile = meanwhile
        self.arrival: Arrival | None = None
        self.track()

    @property
    def upstream(self) -> Any:
        return ffi.NULL if self.arrival is None else self.arrival.native

    def require(self, first: int, n_pages: int) -> None:
        assert self.arrival is not None
        while not self.arrival.require(first, n_pages, SLICE_MS):
            self._meanwhile()

    def get_into(self, first: int, data: bytearray | memoryview) -> None:
        self.require(first, len(data) // PAGE)
        super().get_into(first, data)
