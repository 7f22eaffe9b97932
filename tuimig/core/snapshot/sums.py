"""The table of sums, 4 bytes a page of `pages`, mostly holes: where it is occupied, its digest by region, its file.

A region's digest is the blake2b-16 of those chunks of its slice of the table that are not all zero, each preceded by
its number. A chunk is 1024 sums (4 MiB of the region), counted from the region's first page. So a reserved region of
terabytes costs what its few used chunks cost, on both sides.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence

from tuimig.core.model import PAGE
from tuimig.core.spool import SUM

CHUNK = 1024 * SUM  # bytes of the table
_BLOCK = 1 << 20  # bytes looked at at once
_ZEROS = bytes(_BLOCK)

Run = tuple[int, int]  # bytes [start, end) of a file or table


class Sums:
    """The table with the runs that may hold something; outside of them all sums are known to be zero."""

    def __init__(self, table: memoryview, runs: Sequence[Run]) -> None:
        self.table = table.cast("B")
        self.runs = runs
        self._ends = [end for _, end in runs]

    @classmethod
    def scan(cls, table: memoryview) -> Sums:
        """Find the occupied runs by looking at all of it."""
        return cls(table, _occupied(table.cast("B")))

    @classmethod
    def load(cls, fd: int, table: memoryview) -> Sums:
        """Fill the (zeroed) table from the file, which has its size. Holes are not read."""
        view = table.cast("B")
        runs = list(extents(fd, len(view)))
        for start, end in runs:
            while start < end:
                got = os.preadv(fd, [view[start : min(end, start + _BLOCK)]], start)
                if got == 0:
                    raise EOFError
                start += got
        return cls(table, runs)

    def save(self, fd: int) -> None:
        """Write it as a sparse file of the table's size."""
        os.ftruncate(fd, len(self.table))
        for start, end in self.runs:
            while start < end:
                start += os.pwrite(fd, self.table[start : min(end, start + _BLOCK)], start)

    def region(self, slot: int, size: int) -> tuple[str, int]:
        """Digest of a region, and its number of pages with a sum. `slot`, `size`: bytes of `pages`."""
        digest, pages = hashlib.blake2b(digest_size=16), 0
        first, last = slot // PAGE * SUM, (slot + size) // PAGE * SUM
        for number in self._chunks(first, last):
            start = first + number * CHUNK
            chunk = self.table[start : min(start + CHUNK, last)]
            used = len(chunk) // SUM - chunk.cast("I").tolist().count(0)
            if used:
                digest.update(number.to_bytes(8, "little"))
                digest.update(chunk)
                pages += used
        return digest.hexdigest(), pages

    def stray(self, slots: Sequence[Run]) -> int | None:
        """The first page with a sum that lies in none of these sorted byte ranges of `pages`."""
        at = 0
        for slot, end in [*slots, (len(self.table) // SUM * PAGE, 0)]:
            limit = slot // PAGE * SUM
            for start, stop in self._within(at, limit):
                for index, value in enumerate(self.table[start:stop].cast("I"), start // SUM):
                    if value:
                        return index
            at = end // PAGE * SUM
        return None

    def _chunks(self, first: int, last: int) -> Iterator[int]:
        """Numbers of the chunks of table bytes [first, last) that touch a run, ascending."""
        done = -1
        for start, end in self._within(first, last):
            low, high = (start - first) // CHUNK, (end - first + CHUNK - 1) // CHUNK
            for number in range(max(low, done + 1), high):
                yield number
                done = number

    def _within(self, first: int, last: int) -> Iterator[Run]:
        """The parts of runs inside [first, last), cut to whole sums."""
        for index in range(bisect.bisect_right(self._ends, first), len(self.runs)):
            start, end = self.runs[index]
            if start >= last:
                return
            yield max(start, first) // SUM * SUM, min(end, last)


def extents(fd: int, size: int) -> Iterator[Run]:
    """The byte runs of a sparse file that are not holes, up to `size`."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        if start >= size:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at


def _occupied(table: memoryview) -> list[Run]:
    """Runs of chunks that are not all zero; whole blocks are looked at first, for holes are long."""
    runs: list[Run] = []
    for block in range(0, len(table), _BLOCK):
        data = table[block : block + _BLOCK].tobytes()
        if data == _ZEROS[: len(data)]:
            continue
        for offset in range(0, len(data), CHUNK):
            chunk = data[offset : offset + CHUNK]
            if chunk == _ZEROS[: len(chunk)]:
                continue
            start = block + offset
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + len(chunk))
            else:
                runs.append((start, start + len(chunk)))
    return runs
