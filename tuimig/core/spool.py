"""The spool in Python: captured pages at fixed places in a sparse file, with a checksum each in memory.

A thin face of `native/spool.h`: it owns the native object, not the file. Puts and gets of distinct pages may run in
several threads at once; the interpreter lock is not held while they do.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from tuimig.core.engine import check, ffi, lib, new_error
from tuimig.core.model import PAGE

Data = bytes | bytearray | memoryview

HOLE = 0  # the sum of a page that is zero, or was never stored
ZERO_CONTENT = 1  # the sum of a zero page that is content: it hides the mapped file's page
SUM = 4  # bytes a sum


class Spool:
    """`n_pages` places of 4 KiB in the file `pages_fd`, which stays the caller's. `subject` names it in errors."""

    def __init__(self, pages_fd: int, n_pages: int, writable: bool, subject: str = "the spool") -> None:
        self._subject = subject
        self._native: Any = ffi.NULL
        out, error = ffi.new("struct tm_spool **"), new_error()
        check(lib.tm_spool_create(pages_fd, n_pages, int(writable), out, error), error, subject)
        self._native = out[0]

    @property
    def native(self) -> Any:
        """The `struct tm_spool *`, for native calls that take one. Null once closed."""
        return self._native

    @property
    def n_pages(self) -> int:
        return int(lib.tm_spool_pages(self._open()))

    @property
    def sums(self) -> memoryview:
        """The sums, one uint32 a page, as they are now and as they change. Dead after `grow` or `close`."""
        n_pages = self.n_pages
        if not n_pages:
            return memoryview(bytearray()).cast("I")
        return memoryview(ffi.buffer(lib.tm_spool_sums(self._open()), n_pages * SUM)).cast("B").cast("I")

    def stored_pages(self) -> int:
        """Pages with content; the others are zero, or were never there."""
        return int(lib.tm_spool_stored(self._open()))

    def track(self) -> None:
        """From now on bitmaps tell which pages are there, and which were given. Before other threads use the spool."""
        error = new_error()
        check(lib.tm_spool_track(self._open(), error), error, self._subject)

    @property
    def room(self) -> int:
        """Pages up to which a tracked spool may grow beside its readers."""
        return int(lib.tm_spool_room(self._open()))

    @property
    def upstream(self) -> Any:
        """The `struct tm_arrival *` that writes it; null: it holds all there is."""
        return ffi.NULL

    def require(self, first: int, n_pages: int) -> None:
        """Returns once the content of these pages is there: at once, unless the spool is still being written."""

    def grow(self, n_pages: int) -> None:
        """Never shrinks. Not while another thread uses the spool."""
        error = new_error()
        check(lib.tm_spool_grow(self._open(), n_pages, error), error, self._subject)

    def put(self, first: int, data: Data) -> int:
        """Store whole pages at page index `first`; returns how many of them were zero and became holes."""
        if len(data) % PAGE:
            raise ValueError(f"{len(data)} bytes are not whole pages")
        zero, error = ffi.new("uint64_t *"), new_error()
        source = ffi.from_buffer(data)
        check(lib.tm_spool_put(self._open(), first, source, len(data) // PAGE, zero, error), error, self._subject)
        return int(zero[0])

    def get(self, first: int, n_pages: int) -> bytes:
        """Read pages and check their sums; `SnapshotDamaged` names the first bad page."""
        data = bytearray(n_pages * PAGE)
        self.get_into(first, data)
        return bytes(data)

    def get_into(self, first: int, data: bytearray | memoryview) -> None:
        """As `get`, into a buffer of whole pages."""
        error = new_error()
        target = ffi.from_buffer(data, require_writable=True)
        check(lib.tm_spool_get(self._open(), first, target, len(data) // PAGE, error), error, self._subject)

    def first_damaged(self, first: int, data: bytearray | memoryview) -> int | None:
        """As `get_into`, but damage is an answer: the index of the first bad page, None where all are sound."""
        error = new_error()
        target = ffi.from_buffer(data, require_writable=True)
        code = lib.tm_spool_get(self._open(), first, target, len(data) // PAGE, error)
        if code == lib.TM_DAMAGED:
            return int(error.address)
        check(code, error, self._subject)
        return None

    def close(self) -> None:
        if self._native != ffi.NULL:
            lib.tm_spool_destroy(self._native)
            self._native = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._native == ffi.NULL:
            raise ValueError("the spool is closed")
        return self._native
