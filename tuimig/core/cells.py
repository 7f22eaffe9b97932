"""Pages by cell of the strip: what of a source is captured, what of a copy is there. The face of `native/cells.h`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tuimig.core.engine import ffi, lib
from tuimig.core.manifest import Manifest
from tuimig.core.model import PAGE
from tuimig.core.spool import HOLE, ZERO_CONTENT
from tuimig.core.strip import CELLS, Span

Cells = tuple[tuple[int, int, int], ...]


class Counter:
    """Counts for the spans of one plan; a cell is (pages with content, done, of these zero)."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._n = len(spans)
        self._python = spans
        self._spans = ffi.new("struct tm_span[]", [(s.start, s.end, s.cell, 0) for s in spans] or 1)
        self._cells = ffi.new("struct tm_cell[]", CELLS)

    def of_source(self, native: Any) -> Cells:
        self._clear()
        lib.tm_source_cells(native, self._spans, self._n, self._cells)
        return self._result()

    def of_spool(self, sums: memoryview, manifest: Manifest) -> Cells:
        """What a snapshot holds; nothing of it is done yet."""
        cells = [[0, 0, 0] for _ in range(CELLS)]
        for span in self._python:
            entry = manifest.regions[span.region]
            if entry.slot is None:
                continue
            first = (entry.slot + span.start - entry.start) // PAGE
            part = sums[first : first + (span.end - span.start) // PAGE].tolist()
            zero = part.count(ZERO_CONTENT)
            cells[span.cell][0] += len(part) - part.count(HOLE)
            cells[span.cell][2] += zero
        return tuple((total, done, zero) for total, done, zero in cells)

    def of_copy(self, pid: int, before: Cells) -> Cells:
        """Populated pages of a copy against what its source had (`before`). Empty where the copy has ended."""
        self._clear()
        try:
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ()
        try:
            if lib.tm_present_cells(pagemap, self._spans, self._n, self._cells, ffi.NULL):
                return ()  # it is ending: a picture less
        finally:
            os.close(pagemap)
        # Zero pages are never filled: they count as done from the start.
        present = [int(self._cells[index].done) for index in range(CELLS)]
        return tuple(
            (total, min(total, done + zero), zero) for (total, _, zero), done in zip(before, present, strict=True)
        )

    def _clear(self) -> None:
        ffi.memmove(self._cells, bytes(ffi.sizeof(self._cells)), ffi.sizeof(self._cells))

    def _result(self) -> Cells:
        return tuple((int(c.total), int(c.done), int(c.zero)) for c in self._cells)
