"""What a session tells a console besides its counters: histograms, pages by region and by cell of the strip.

Only made where somebody draws it. Reads the engine's counters; nothing waits for it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from tuimig.core.cells import Cells, Counter
from tuimig.core.manifest import Manifest
from tuimig.core.model import Detail, Histogram, Listener, Plan
from tuimig.core.strip import layout

if TYPE_CHECKING:
    from tuimig.core.destination import Copy
    from tuimig.core.source import Source

EVERY_NS: Final = 200_000_000  # a picture five times a second; counting costs a millisecond for 4 GB


class Watch:
    """Says a Detail when it is time for one. `planned` comes first."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._counter = Counter(())
        self._cells: Cells = ()
        self._next_ns = 0

    def planned(self, plan: Plan) -> None:
        self._counter = Counter(layout(plan.decisions))
        self._cells = ()
        self._next_ns = 0

    def stored(self, sums: memoryview, manifest: Manifest) -> None:
        """What a snapshot holds is what its copy will have."""
        self._cells = self._counter.of_spool(sums, manifest)

    def source(self, source: Source, *, last: bool = False) -> None:
        if not (last or self._due()):
            return
        self._cells = self._counter.of_source(source.native)
        starts, pages = source.region_sizes()
        self._listener(
            Detail(
                "source",
                source.ring.histogram,
                self._cells,
                starts,
                pages,
                source.region_done(),
                source.region_faults(),
            )
        )

    def copy(self, copy: Copy, *, last: bool = False) -> None:
        if last or self._due():
            histogram = copy.ring.histogram if copy.ring else Histogram()
            cells = self._counter.of_copy(copy.pid, self._cells) if self._cells else ()
            self._listener(Detail("copy", histogram, cells))

    def _due(self) -> bool:
        now = time.monotonic_ns()
        if now < self._next_ns:
            return False
        self._next_ns = now + EVERY_NS
        return True
