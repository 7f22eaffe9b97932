"""What is kept of a run besides its events: the recording (`--record`) and the HTML page (`--report`).

A file that cannot be opened is an error before anything starts; one that cannot be written to the end does not stop a
migration, and is told afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuimig.core.errors import TuimigError, UsageError
from tuimig.core.model import Listener, Report

if TYPE_CHECKING:
    from tuimig.core.record import FileSink, Recorder
    from tuimig.core.recording import Collector


class Keeper:
    """The listeners that the command line asks for. `broken`: what could not be written, in words."""

    def __init__(self, found: argparse.Namespace) -> None:
        self.listeners: list[Listener] = []
        self.broken: list[str] = []
        self._recorders: list[Recorder] = []
        self._stack = contextlib.ExitStack()
        self._file: FileSink | None = None
        self._collected: Collector | None = None
        self._page: Path | None = found.report
        if found.record is None and found.report is None:
            if found.redact:
                raise UsageError("--redact without a recording", cure="Say --record FILE or --report FILE.html as well")
            return
        from tuimig.core.record import FileSink, Recorder
        from tuimig.core.recording import Collector

        if found.record is not None:
            self._file = FileSink(found.record)
            self._recorders.append(Recorder(self._file, redact=found.redact))
        if self._page is not None:
            _writable(self._page)
            self._collected = Collector()
            self._recorders.append(Recorder(self._collected, redact=found.redact))
        self.listeners += self._recorders

    def report(self, report: Report) -> None:
        for recorder in self._recorders:
            recorder.report(report)
        if self._page is not None and self._collected is not None:
            from tuimig.core.summary import summarize
            from tuimig.page import page

            try:
                recording = self._collected.recording()
                self._page.write_text(page(summarize(recording), recording.header), encoding="utf-8")
            except OSError as error:
                self.broken.append(f"the report was not written: {self._page}: {error.strerror}")

    def error(self, error: TuimigError) -> None:
        for recorder in self._recorders:
            recorder.error(error)

    def __enter__(self) -> Self:
        if self._file is not None:
            self._stack.enter_context(self._file)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        if self._file is not None and self._file.broken:
            self.broken.append(f"the recording was not written to its end: {self._file.broken}")


def _writable(path: Path) -> None:
    """Found out before anything is stopped, not after."""
    try:
        path.open("w").close()
    except OSError as error:
        raise UsageError(f"cannot write the report there: {error.strerror}", subject=str(path)) from error
