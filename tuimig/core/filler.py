"""The lazy filler in Python: brings a copy's missing pages in while it runs. A thin face of `native/fill.h`.

It owns the native filler, whose threads work without Python; the spool it reads from stays the caller's and must
outlive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuimig.core.engine import check, ffi, lib, new_error
from tuimig.core.errors import TuimigError
from tuimig.core.ring import Ring
from tuimig.core.spool import Spool


@dataclass(frozen=True, slots=True)
class Range:
    """A registered region: its addresses, where its pages lie in the spool, its index for fault records."""

    start: int
    end: int
    first_page: int
    region: int
    huge: bool


@dataclass(frozen=True, slots=True)
class FillProgress:
    """Pages with content; zero pages need no fill. Times are CLOCK_MONOTONIC nanoseconds, 0: not yet."""

    pages: int
    filled: int
    gone: int
    demand_faults: int
    demand_pages: int
    zero_faults: int
    background_pages: int
    children: int
    start_ns: int
    end_ns: int
    ended: bool
    poisoned: int = 0  # never came, and will not


class Filler:
    """`uffd` and `pidfd` are of the copy. `uffd` is taken over: with the filler it must be gone everywhere."""

    def __init__(self, uffd: int, pidfd: int, spool: Spool, ranges: Sequence[Range], subject: str) -> None:
        self._subject = subject
        self._spool = spool  # must outlive the native filler
        self._native: Any = ffi.NULL
        array = ffi.new(
            "struct tm_fill_region[]",
            [(r.start, r.end, r.first_page, r.region, lib.TM_FILL_HUGE if r.huge else 0) for r in ranges],
        )
        out, error = ffi.new("struct tm_fill **"), new_error()
        code = lib.tm_fill_create_arriving(uffd, pidfd, spool.native, spool.upstream, array, len(ranges), 0, out, error)
        check(code, error, subject)
        self._native = out[0]
        self.ring = Ring(lib.tm_fill_ring(self._native))

    def fill_now(self, addresses: Sequence[int]) -> None:
        """Before the copy runs: bring in the pages at these addresses; others than registered ones are passed over."""
        error = new_error()
        check(lib.tm_fill_now(self._native, list(addresses), len(addresses), error), error, self._subject)

    def fill_all(self) -> None:
        """Before the copy runs: bring in everything. `start` must follow all the same."""
        error = new_error()
        check(lib.tm_fill_all(self._native, error), error, self._subject)

    def start(self) -> None:
        """The copy may run once this has returned."""
        error = new_error()
        check(lib.tm_fill_start(self._native, error), error, self._subject)

    def progress(self) -> FillProgress:
        p = ffi.new("struct tm_fill_progress *")
        lib.tm_fill_progress(self._native, p)
        return FillProgress(
            pages=p.pages,
            filled=p.filled,
            gone=p.gone,
            demand_faults=p.demand_faults,
            demand_pages=p.demand_pages,
            zero_faults=p.zero_faults,
            background_pages=p.background_pages,
            children=p.children,
            start_ns=p.start_ns,
            end_ns=p.end_ns,
            ended=bool(p.ended),
            poisoned=p.poisoned,
        )

    def wait(self, timeout_s: float) -> bool:
        """Whether the fill has ended within the time. A negative time waits without limit."""
        return bool(lib.tm_fill_wait(self._native, -1 if timeout_s < 0 else int(timeout_s * 1000)))

    def poison_missing(self) -> None:
        """What has not come by now never will: who touches it gets SIGBUS."""
        lib.tm_fill_poison_missing(self._native)

    def failure(self) -> TuimigError | None:
        """Once ended: why the copy did not get all of its pages."""
        error = new_error()
        try:
            check(lib.tm_fill_result(self._native, error), error, self._subject)
        except TuimigError as problem:
            return problem
        return None

    def close(self) -> None:
        """Where the fill has not ended the copy is killed: it cannot live without its pages."""
        if self._native != ffi.NULL:
            lib.tm_fill_destroy(self._native)
            self._native = ffi.NULL
