"""Check every stored byte of a snapshot against its sum, and that nothing is stored where a hole belongs.

`open_snapshot` has checked manifest and sums by then; what is left are the pages. Two threads read; the reading and
the checksums run outside of the interpreter lock.
"""

from __future__ import annotations

import heapq
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from tuimig.core.errors import Cancelled
from tuimig.core.model import PAGE
from tuimig.core.snapshot.read import Snapshot, open_snapshot
from tuimig.core.snapshot.sums import Sums, extents
from tuimig.core.snapshot.validate import label, slots
from tuimig.core.spool import SUM, ZERO_CONTENT

PIECE = 256  # pages read at once
WORKERS = 2
TICK_S = 0.1
MOST_DAMAGE = 1000  # entries kept; a copy that is all wrong needs no list of a million
_ZERO = bytes(PAGE)

Progress = Callable[[int, int], None]  # pages done, pages in all


@dataclass(frozen=True, slots=True)
class Damage:
    """A run of bad pages. `region` is the index into the manifest's regions, -1 where they belong to none."""

    region: int
    name: str  # the region as a person knows it
    address: int  # of the first bad page in the process (0 where it belongs to no region)
    pages: int
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.pages} page(s) at {self.address:#x}: {self.why}"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """`pages`: pages with content that were compared with their sums. `more`: bad pages beyond those listed."""

    directory: Path
    regions: int
    pages: int
    bytes: int
    damage: tuple[Damage, ...]
    more: int
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.damage


def verify(directory: Path, progress: Progress | None = None, cancel: threading.Event | None = None) -> VerifyResult:
    """Read it all. SnapshotDamaged where it cannot even be opened; damaged pages are listed in the result."""
    stop = cancel or threading.Event()
    with open_snapshot(directory) as snapshot:
        checked, bad = _read_all(snapshot, stop, progress)
        damage = list(_describe(snapshot, bad))
        return VerifyResult(
            directory=directory,
            regions=len(snapshot.manifest.regions),
            pages=checked,
            bytes=checked * PAGE,
            damage=tuple(damage[:MOST_DAMAGE]),
            more=sum(entry.pages for entry in damage[MOST_DAMAGE:]),
            warnings=snapshot.warnings,
        )


def _read_all(snapshot: Snapshot, stop: threading.Event, progress: Progress | None) -> tuple[int, dict[int, str]]:
    """Number of pages compared, and the bad ones: page index -> why."""
    total = sum(region.pages for region in snapshot.manifest.regions)
    pieces, lock = _pieces(snapshot), threading.Lock()
    own_stop = threading.Event()  # ends the workers when one of them, or the caller, fails
    done, bad = [0], dict[int, str]()

    def work() -> None:
        buffer = bytearray(PIECE * PAGE)
        while not (stop.is_set() or own_stop.is_set()):
            with lock:
                number = next(pieces, None)
            if number is None:
                return
            compared, found = _check(snapshot, number * PIECE, buffer)
            with lock:
                done[0] += compared
                bad.update(found)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="tuimig-verify") as pool:
        try:
            workers = [pool.submit(work) for _ in range(WORKERS)]
            running = True
            while running:
                ended, left = wait(workers, timeout=TICK_S)
                running = bool(left) and not any(worker.exception() for worker in ended)
                if progress:
                    progress(done[0], total)
        finally:
            own_stop.set()
    for worker in workers:
        worker.result()
    if stop.is_set():
        raise Cancelled("the verification was cancelled", subject=str(snapshot.directory))
    return done[0], bad


def _pieces(snapshot: Snapshot) -> Iterator[int]:
    """Numbers of the pieces that hold a sum or data, ascending, each once."""
    runs = Sums.scan(snapshot.sums).runs
    size = snapshot.manifest.pages_size
    with_sums = _numbers(((start // SUM, -(-end // SUM)) for start, end in runs))
    with_data = _numbers(((start // PAGE, -(-end // PAGE)) for start, end in extents(snapshot.pages_fd, size)))
    last = -1
    for number in heapq.merge(with_sums, with_data):
        if number != last:
            yield number
        last = number


def _numbers(page_runs: Iterator[tuple[int, int]]) -> Iterator[int]:
    for first, end in page_runs:
        yield from range(first // PIECE, (end - 1) // PIECE + 1)


def _check(snapshot: Snapshot, first: int, buffer: bytearray) -> tuple[int, dict[int, str]]:
    """Compare one piece: pages with a sum, and that the others are zero in the file too."""
    sums = snapshot.sums[first : first + PIECE].tolist()
    bad: dict[int, str] = {}
    at, end = first, first + len(sums)
    while at < end:  # goes on behind each bad page
        page = snapshot.spool.first_damaged(at, memoryview(buffer)[: (end - at) * PAGE])
        if page is None:
            break
        bad[page] = "it is not what was stored"
        at = page + 1
    holes = [i for i, value in enumerate(sums) if value <= ZERO_CONTENT]
    if holes:
        data = os.pread(snapshot.pages_fd, len(sums) * PAGE, first * PAGE)
        for i in holes:
            if data[i * PAGE : (i + 1) * PAGE] != _ZERO:
                bad[first + i] = "there is data where a zero page was stored"
    return len(sums) - sums.count(0), bad


def _describe(snapshot: Snapshot, bad: dict[int, str]) -> Iterator[Damage]:
    """Bad pages as runs by region, in the order of the file."""
    places = slots(snapshot.manifest.regions)
    starts = [start for start, _, _ in places]
    current: Damage | None = None
    last = -1
    for page in sorted(bad):
        place = bisect_right(starts, page * PAGE) - 1
        index = places[place][2] if place >= 0 and page * PAGE < places[place][1] else -1
        if current and page == last + 1 and index == current.region and bad[page] == current.why:
            current = replace(current, pages=current.pages + 1)
        else:
            if current:
                yield current
            if index < 0:
                current = Damage(-1, f"page {page} of the file, which belongs to no region", 0, 1, bad[page])
            else:
                region = snapshot.manifest.regions[index]
                address = region.start + page * PAGE - places[place][0]
                current = Damage(index, label(region), address, 1, bad[page])
        last = page
    if current:
        yield current
