"""The fault ring in Python: records taken in bulk, and the histogram. A thin face of `native/ring.h`."""

from __future__ import annotations

from typing import Any, Final

from tuimig.core.engine import ffi, lib
from tuimig.core.model import RECORD, Faults, Histogram

BATCH: Final = 4096  # records taken at once


class Ring:
    """One ring's consumer. The native ring stays the engine's."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._into = ffi.new("struct tm_fault[]", BATCH)

    def drain(self) -> Faults:
        """Fault records since the last call, at most a batch of them."""
        count = lib.tm_ring_drain(self._native, self._into, BATCH)
        return Faults(bytes(ffi.buffer(self._into, count * RECORD.size)) if count else b"")

    @property
    def dropped(self) -> int:
        """Records lost because nobody took them in time."""
        return int(lib.tm_ring_dropped(self._native))

    @property
    def histogram(self) -> Histogram:
        native = ffi.new("struct tm_histogram *")
        lib.tm_ring_histogram(self._native, native)
        return Histogram(tuple(ffi.unpack(native.bucket, len(native.bucket))), int(native.max_ns))
