"""What the console has seen of a run, kept in memory until somebody wants it in a file: `R`, during it or after it.

The same records as `--record` writes, with fewer pictures and a lower bound for the size.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from tuimig.core.client import Update
from tuimig.core.errors import TuimigError
from tuimig.core.jobs import Waiting
from tuimig.core.model import Faults, Phase
from tuimig.core.record import FileSink, Record, Recorder, encode

MOST_BYTES: Final = 16 << 20
PICTURES_A_SECOND: Final = 2


class Tape:
    """Filled by a Run with each update."""

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._at_ns: int | None = None  # when what is taken now has happened; None: just now
        self._last_ns = 0
        self._recorder = Recorder(
            self._keep, clock=self._clock, pictures_a_second=PICTURES_A_SECOND, most_bytes=MOST_BYTES
        )

    def _clock(self) -> int:
        self._last_ns = max(self._last_ns, time.monotonic_ns() if self._at_ns is None else self._at_ns)
        return self._last_ns

    def _keep(self, time_us: int, record: Record) -> None:
        self._records.append(encode(time_us, record))

    def take(self, update: Update) -> None:
        for event in update.events:
            if isinstance(event, Phase):  # we look now and then; the phases say when they began
                self._at_ns = event.time_ns
            if not isinstance(event, Waiting):
                self._recorder(event)
        self._at_ns = None
        if update.state is not None:
            self._recorder(update.state.progress)
            if update.state.remote is not None:
                self._recorder(update.state.remote)
            for detail in update.state.details.values():
                self._recorder(detail)
        if update.faults.records:
            self._recorder(Faults(update.faults.records))
        if update.faults.missed:
            self._recorder.missed(update.faults.missed)
        if update.report is not None:
            self._recorder.report(update.report)
        elif update.error is not None:
            self._recorder.error(update.error)

    def save(self, path: Path) -> None:
        """Into a new file."""
        with FileSink(path, new=True) as sink:
            for record in self._records:
                sink.put(record)
        if sink.broken:
            path.unlink(missing_ok=True)
            raise TuimigError("cannot write the recording", subject=sink.broken, cure="Choose another place")
