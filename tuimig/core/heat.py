"""Heat: which regions of a process are being written to. Harmless: it runs on, nothing of it is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from tuimig.core import check, procfs
from tuimig.core.engine import check as check_code
from tuimig.core.engine import ffi, lib, new_error
from tuimig.core.errors import Obstacle
from tuimig.core.model import Kind, Options, Treatment
from tuimig.core.policy import Policy
from tuimig.core.source import Source

STEP_S: Final = 0.05
PROTECTABLE: Final = frozenset({Kind.HEAP, Kind.STACK, Kind.ANON})
# What stands in the way of tracking; what only a copy could not have does not.
IN_THE_WAY: Final = frozenset(
    {"zombie", "kernel-thread", "self", "thread", "no-exe", "32-bit", "x32", "traced", "userfaultfd", "seccomp"}
)


def measure(pid: int, options: Options, seconds: float, proceed: Callable[[], None]) -> dict[int, int]:
    """Pages written in `seconds`, by the start of each region that could be watched. `proceed` raises to stop it."""
    with procfs.look(pid, options) as look:
        obstacles: list[Obstacle] = [o for o in check.check_look(look) if o.name in IN_THE_WAY]
        check.refuse(obstacles, options, f"process {pid}")
        plan = Policy().plan(look.regions)
        ranges = [
            (d.region.start, d.region.end, 0, 0, 0)
            for d in plan.decisions
            if d.region.kind in PROTECTABLE and d.treatment is not Treatment.NONE and d.rule != "cannot be protected"
        ]
        native = ffi.new("struct tm_heat[]", ranges or 1)
        with Source(look.identity, f"process {pid}") as source:
            source.attach(track=True)
            error = new_error()
            check_code(lib.tm_source_heat_begin(source.native, native, len(ranges), error), error, source.subject)
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                proceed()
                time.sleep(min(STEP_S, left))
            check_code(lib.tm_source_heat_end(source.native, native, len(ranges), error), error, source.subject)
        return {asked[0]: int(r.written) for asked, r in zip(ranges, native[0 : len(ranges)], strict=True) if r.watched}
