"""Recording a migration: what the listener of a session is told, with its times, in a file that only grows.

The file is a line of text with the format's version, then chunks: length, CRC32, and deflated records: length, and
msgpack of `[microseconds since the start, name, body]`. A chunk is written when it is full, when a phase begins and
four times a second, so a crash costs the last moments only. It is bounded: of faults, counters and pictures so many a
second are kept, and none once the file is large; phases and the report always are. `recording.py` reads it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Any, Final, Protocol, Self, get_args

import msgspec

from tuimig import __version__
from tuimig.core.errors import TuimigError, UsageError
from tuimig.core.jobs import Failure, failure_of
from tuimig.core.model import RECORD, Connection, Detail, Event, Faults, Note, Phase, Planned, Progress, Report
from tuimig.core.redact import Redactor

FORMAT: Final = 1
MAGIC: Final = b"tuimig recording "
CHUNK: Final = Struct("=II")  # bytes of the deflated records, their CRC32
LENGTH: Final = Struct("=I")  # of a record
CHUNK_MOST: Final = 1 << 20  # bytes of records in a chunk, before deflating
CHUNK_USUAL: Final = 1 << 16
FAULTS_A_SECOND: Final = 5000  # above it one in so many is kept, and the others are counted
PICTURES_A_SECOND: Final = 20  # counters and pictures, each
EVERY_US: Final = 250_000
MOST_BYTES: Final = 64 << 20  # of records: beyond it neither faults nor pictures are kept
SECOND: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Header:
    """The first record. `started_ns`: CLOCK_MONOTONIC where time 0 is, for the times inside events."""

    format: int
    tuimig: str
    created: str  # ISO 8601, UTC
    started_ns: int
    redacted: bool
    faults_a_second: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """So many fault records of the last moment are not in the file: more came than are kept."""

    faults: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of the migration: the report, or what went wrong."""

    report: Report | None = None
    failure: Failure | None = None


Record = Event | Header | LeftOut | Outcome
TYPES: Final[dict[str, type[Any]]] = {k.__name__: k for k in (*get_args(Event), Header, LeftOut, Outcome)}
Clock = Callable[[], int]


class Sink(Protocol):
    """Where records go: a file, or a list for the report at the end."""

    def __call__(self, time_us: int, record: Record) -> None: ...


class Recorder:
    """A listener that keeps what it is told, at most so much a second. Not for several threads at once."""

    def __init__(
        self,
        sink: Sink,
        *,
        redact: bool = False,
        clock: Clock = time.monotonic_ns,
        pictures_a_second: int = PICTURES_A_SECOND,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._sink = sink
        self._most_bytes = most_bytes
        self._clock = clock
        self._started = clock()
        self._redactor = Redactor() if redact else None
        self._faults = _Rate(FAULTS_A_SECOND)
        self._counters = _Rate(PICTURES_A_SECOND)
        self._pictures = {side: _Rate(pictures_a_second) for side in ("source", "copy")}
        self._waiting: dict[type, Record] = {}  # the latest of its kind that was not kept
        self._bytes = 0
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._put(Header(FORMAT, __version__, created, self._started, redact, FAULTS_A_SECOND))

    def __call__(self, event: Event) -> None:
        now = self._now()
        match event:
            case Faults():
                self._keep_faults(event, now)
            case Progress():
                if not self._full and self._counters.take(1, now):
                    self._put(event)
                else:
                    self._waiting[Progress] = event
            case Detail():
                if not self._full and self._pictures[event.side].take(1, now):
                    self._put(event)
            case Phase():
                self._put_waiting()
                self._put(event)
            case _:
                self._put(event)

    def missed(self, faults: int) -> None:
        """So many came that the listener was never told of."""
        self._put(LeftOut(faults))

    def report(self, report: Report) -> None:
        self._put_waiting()
        self._put(Outcome(report=report))

    def error(self, error: TuimigError) -> None:
        self._put_waiting()
        self._put(Outcome(failure=failure_of(error)))

    # ------------------------------------------------------------ within

    @property
    def _full(self) -> bool:
        return self._bytes > self._most_bytes

    def _now(self) -> int:
        return max(0, self._clock() - self._started) // 1000

    def _keep_faults(self, event: Faults, now: int) -> None:
        came = len(event)
        room = 0 if self._full else self._faults.take(came, now)
        if not came:
            return
        kept = event.records if room >= came else _spread(event.records, came, room)
        if kept:
            self._put(Faults(kept))
        if room < came:
            self._put(LeftOut(came - room))

    def _put_waiting(self) -> None:
        """The last counters of a phase are always there."""
        waiting, self._waiting = self._waiting, {}
        for record in waiting.values():
            self._put(record)

    def _put(self, record: Record) -> None:
        self._waiting.pop(type(record), None)
        if self._redactor is not None:
            record = hidden(record, self._redactor)
        self._bytes += len(record.records) if isinstance(record, Faults) else 200
        if isinstance(record, Detail):
            self._bytes += 4 * len(record.cells) + 4 * len(record.region_done)
        self._sink(self._now(), record)


class _Rate:
    """At most `most` a second, with what a second allows saved up at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._saved = float(most)
        self._last_us = 0

    def take(self, wanted: int, now_us: int) -> int:
        """How many of `wanted` may be kept now."""
        self._saved = min(self._most, self._saved + (now_us - self._last_us) * self._most / SECOND)
        self._last_us = now_us
        taken = min(wanted, int(self._saved))
        self._saved -= taken
        return taken


def _spread(records: bytes, came: int, room: int) -> bytes:
    """`room` of the `came` records, evenly."""
    size = RECORD.size
    return b"".join(records[i * size : (i + 1) * size] for i in (n * came // room for n in range(room)))


def hidden(record: Record, redactor: Redactor) -> Record:
    """The record without command lines and names."""
    match record:
        case Planned():
            return redactor.planned(record)
        case Note():
            return redactor.note(record)
        case Connection():
            return redactor.connection(record)
        case Outcome(report=Report() as report):
            return replace(record, report=redactor.report(report))
        case Outcome(failure=Failure() as failure):
            return replace(record, failure=redactor.failure(failure))
    return record


def encode(time_us: int, record: Record) -> bytes:
    data = msgspec.msgpack.encode((time_us, type(record).__name__, record))
    return LENGTH.pack(len(data)) + data


class FileSink:
    """Owns the file. What cannot be written any more does not stop a migration: `broken` says why."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """`new`: a file that is there already is not written over."""
        self.broken = ""
        self._path = path
        self._buffer = bytearray()
        self._since_us = 0
        try:
            # A recording holds names and addresses of somebody's process.
            how = os.O_EXCL if new else os.O_TRUNC
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write a recording there: {error.strerror}", subject=str(path)) from error
        self._write(MAGIC + b"%d\n" % FORMAT)

    def __call__(self, time_us: int, record: Record) -> None:
        self.put(encode(time_us, record))
        urgent = not isinstance(record, (Faults, Progress, Detail, LeftOut))
        if urgent or len(self._buffer) > CHUNK_USUAL or time_us - self._since_us > EVERY_US:
            self.flush()
            self._since_us = time_us

    def put(self, encoded: bytes) -> None:
        """One record, written when the chunk is full."""
        if len(self._buffer) + len(encoded) > CHUNK_MOST:
            self.flush()
        self._buffer += encoded

    def flush(self) -> None:
        if self._buffer:
            deflated = zlib.compress(self._buffer, 6)
            self._buffer.clear()
            self._write(CHUNK.pack(len(deflated), zlib.crc32(deflated)) + deflated)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self.broken:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as error:
                self.broken = f"{self._path}: {error.strerror}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.flush()
        os.close(self._fd)
