"""Reading a recording. The file is untrusted: every length is bounded, every record typed, and what makes no sense is
an error that says where.

A file that ends in the middle of a chunk is what a crash leaves: all before that is used, and `complete` is false.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tuimig.core.errors import TuimigError, UsageError
from tuimig.core.jobs import Failure
from tuimig.core.model import PAGE, RECORD, Detail, FaultKind, Faults, Planned, Report
from tuimig.core.record import CHUNK, CHUNK_MOST, FORMAT, LENGTH, MAGIC, MOST_BYTES, TYPES, Header, Outcome, Record

FILE_MOST: Final = 256 << 20  # bytes
RECORDS_MOST: Final = 4_000_000
ALL_MOST: Final = 4 * MOST_BYTES  # bytes of records, inflated
CELLS_MOST: Final = 4096
ADDRESS_MOST: Final = 1 << 64
TIME_MOST: Final = 1 << 62
KINDS: Final = frozenset(int(kind) for kind in FaultKind)


class RecordingDamaged(TuimigError):
    """A recording whose bytes have changed, or that an incompatible tuimig has written."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A record and when it was told, microseconds since the start."""

    time_us: int
    record: Record


@dataclass(frozen=True, slots=True)
class Recording:
    """All of a recording. `records` are in order of time, without the header. `cut`: the file ends inside a chunk."""

    header: Header
    records: tuple[Timed, ...]
    cut: bool = False

    @property
    def outcome(self) -> Outcome | None:
        last = self.records[-1].record if self.records else None
        return last if isinstance(last, Outcome) else None

    @property
    def complete(self) -> bool:
        return self.outcome is not None

    @property
    def report(self) -> Report | None:
        return self.outcome.report if self.outcome else None

    @property
    def failure(self) -> Failure | None:
        return self.outcome.failure if self.outcome else None

    @property
    def duration_us(self) -> int:
        return self.records[-1].time_us if self.records else 0


class Collector:
    """A sink that keeps the records, for a report at the end of the same run."""

    def __init__(self) -> None:
        self._records: list[Timed] = []

    def __call__(self, time_us: int, record: Record) -> None:
        self._records.append(Timed(time_us, record))

    def recording(self) -> Recording:
        header = self._records[0].record
        assert isinstance(header, Header)
        return Recording(header, tuple(self._records[1:]))


def load(path: Path) -> Recording:
    """Raises UsageError for what is no recording, RecordingDamaged for what was one."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FILE_MOST:
                raise RecordingDamaged(f"too large for a recording: {size} bytes", subject=str(path))
            data = file.read(FILE_MOST)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", subject=str(path)) from error
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Recording:
    line, newline, _ = data[:64].partition(b"\n")
    if not line.startswith(MAGIC) or not newline:
        raise UsageError("not a recording of tuimig", subject=name, cure="Make one with --record FILE")
    version = line[len(MAGIC) :].decode("ascii", "replace")
    if version != str(FORMAT):
        raise RecordingDamaged(
            f"format {version!r}, and this tuimig reads format {FORMAT}",
            subject=name,
            cure="Use the tuimig that made it",
        )
    reader = _Reader(memoryview(data)[len(line) + 1 :], len(line) + 1, name)
    records = list(reader.records())
    if not records or not isinstance(records[0].record, Header):
        raise RecordingDamaged("has no header", subject=name)
    return Recording(records[0].record, tuple(records[1:]), reader.cut)


class _Reader:
    """`at` is the place in the file of `data`'s first byte, for the words."""

    def __init__(self, data: memoryview, at: int, name: str) -> None:
        self.cut = False
        self._data = data
        self._at = at
        self._name = name
        self._last_us = 0
        self._over = False
        self._count = 0
        self._bytes = 0

    def records(self) -> Iterator[Timed]:
        for chunk in self._chunks():
            self._bytes += len(chunk)
            if self._bytes > ALL_MOST:
                raise self._damaged("more than a recording can hold")
            at = 0
            while at < len(chunk):
                end = at + LENGTH.size
                end += LENGTH.unpack_from(chunk, at)[0] if end <= len(chunk) else 0
                if not at + LENGTH.size < end <= len(chunk):
                    raise self._damaged("a record is longer than its chunk")
                yield self._record(chunk[at + LENGTH.size : end])
                at = end

    def _chunks(self) -> Iterator[bytes]:
        while self._data:
            if len(self._data) < CHUNK.size:
                self.cut = True
                return
            length, crc = CHUNK.unpack_from(self._data)
            if not 0 < length <= CHUNK_MOST + 4096:
                raise self._damaged(f"a chunk of {length} bytes")
            deflated = self._data[CHUNK.size : CHUNK.size + length]
            if len(deflated) < length:
                self.cut = True
                return
            if zlib.crc32(deflated) != crc:
                raise self._damaged("a chunk has changed since it was written")
            yield self._inflate(deflated)
            self._at += CHUNK.size + length
            self._data = self._data[CHUNK.size + length :]

    def _inflate(self, deflated: memoryview) -> bytes:
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(deflated, CHUNK_MOST)
        except zlib.error as error:
            raise self._damaged(f"a chunk cannot be inflated: {error}") from error
        if not inflater.eof:
            raise self._damaged("a chunk is longer than a chunk can be")
        return data

    def _record(self, data: bytes) -> Timed:
        try:
            time_us, name, body = msgspec.msgpack.decode(data, type=tuple[int, str, msgspec.Raw])
            if name not in TYPES:
                raise ValueError(f"no such record: {name!r}")
            record = msgspec.msgpack.decode(body, type=TYPES[name])
            _sensible(record)
        except (ValueError, OverflowError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise self._damaged(f"a record makes no sense: {error}") from error
        self._count += 1
        if self._count > RECORDS_MOST or self._over:
            raise self._damaged("records after the end")
        if not self._last_us <= time_us < TIME_MOST:
            raise self._damaged("time runs backwards")
        if (self._count == 1) != isinstance(record, Header):
            raise self._damaged("the header is not where it belongs")
        self._last_us = time_us
        self._over = isinstance(record, Outcome)
        return Timed(time_us, record)

    def _damaged(self, what: str) -> RecordingDamaged:
        return RecordingDamaged(f"damaged at byte {self._at}: {what}", subject=self._name)


def _sensible(record: Any) -> None:
    """What the types do not say. Raises ValueError."""
    match record:
        case Header():
            _require(record.format == FORMAT, "another format")
            _require(0 <= record.started_ns < TIME_MOST, "a start outside of time")
        case Faults(records=records):
            _require(len(records) % RECORD.size == 0, "half a fault")
            _require(all(fault[6] in KINDS for fault in RECORD.iter_unpack(records)), "a fault of no kind")
        case Planned():
            last = 0
            for decision in record.plan.decisions:
                region = decision.region
                _require(last <= region.start < region.end <= ADDRESS_MOST, "regions out of order")
                _require(region.start % PAGE == region.end % PAGE == 0, "a region of half pages")
                _require(len(region.perms) == 4, "no permissions")
                _require(min(region.rss, region.swap) >= 0, "a region with less than nothing in it")
                last = region.end
        case Detail():
            _require(record.side in ("source", "copy"), "a third side")
            _require(len(record.cells) <= CELLS_MOST, "too many cells")
            lengths = {len(record.starts), len(record.region_pages), len(record.region_done), len(record.region_faults)}
            _require(len(lengths) == 1, "figures of other regions")
            _require(len(record.histogram.buckets) <= 64, "too many buckets")
            _require(min(record.histogram.buckets, default=0) >= 0, "a bucket below zero")
        case Outcome():
            _require((record.report is None) != (record.failure is None), "an end that is neither or both")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
