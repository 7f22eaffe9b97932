"""What the command line says, for programs: JSON documents, and event lines while a verb runs.

Data goes to stdout or to the file that `--events` names; a reader that goes away does not stop the migration.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec

from tuimig.core.errors import TuimigError, Unsupported, UsageError
from tuimig.core.model import (
    Connection,
    Detail,
    Event,
    FaultKind,
    Faults,
    Frozen,
    Handover,
    Note,
    Phase,
    Planned,
    Progress,
    Report,
    Round,
    Treatment,
)


def plain(value: Any) -> Any:
    """The JSON form of our types: enums by value, bytes in base64, sets sorted, paths as text."""
    if isinstance(value, FaultKind):
        return value.name.lower()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    return os.fspath(value) if isinstance(value, Path) else value


def document(value: Any, out: TextIO | None = None) -> None:
    """One JSON document on stdout."""
    stream = out or sys.stdout
    json.dump(plain(value), stream, indent=2)
    stream.write("\n")
    stream.flush()


def error_fields(error: TuimigError) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "error": type(error).__name__,
        "what": error.what,
        "subject": error.subject,
        "syscall": error.syscall,
        "errno": error.errno,
        "cure": error.cure,
        "exit_code": error.exit_code,
    }
    if isinstance(error, Unsupported):
        fields["obstacles"] = plain(error.obstacles)
    return fields


def event_lines(event: Event) -> list[dict[str, Any]]:
    """The event as JSON lines: one each, one a fault for a batch of faults."""
    match event:
        case Phase():
            return [{"event": "phase", **plain(event)}]
        case Note():
            return [{"event": "note", **plain(event)}]
        case Faults():
            return [{"event": "fault", **plain(fault)} for fault in event.faults]
        case Progress():
            return [{"event": "progress", **plain(event)}]
        case Planned():
            sizes = {treatment.value: event.plan.bytes(treatment) for treatment in Treatment}
            head = {"verb": event.verb, "pid": event.pid, "command": event.command}
            return [{"event": "planned", **head, "regions": len(event.plan.decisions), "bytes": sizes}]
        case Connection():
            return [{"event": "connection", **plain(event)}]
        case Handover():
            return [{"event": "handover", **plain(event)}]
        case Round():
            return [{"event": "round", **plain(event), "dirty_per_second": round(event.dirty_per_second)}]
        case Frozen():
            return [{"event": "frozen", **plain(event)}]
        case Detail():  # for pictures; nothing in it that the others do not say in figures
            return []


class EventWriter:
    """`--events FILE|-`: JSON lines, flushed as they come. Owns the file."""

    def __init__(self, target: str | None) -> None:
        self.broken = ""  # why nothing is written any more
        self._target = target
        self._out: TextIO | None = None
        if target == "-":
            self._out = sys.stdout
        elif target is not None:
            try:
                self._out = open(target, "w", encoding="utf-8")  # noqa: SIM115  closed by __exit__
            except OSError as error:
                raise UsageError(f"cannot write events there: {error.strerror}", subject=target) from error

    def __call__(self, event: Event) -> None:
        self._write(event_lines(event))

    def report(self, report: Report) -> None:
        self._write([{"event": "report", **plain(report)}])

    def error(self, error: TuimigError) -> None:
        self._write([{"event": "error", **error_fields(error)}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._out is None or self.broken:
            return
        try:
            self._out.write("".join(json.dumps(line) + "\n" for line in lines))
            self._out.flush()
        except OSError as error:
            # The migration matters more than who watches it; the command line says so at the end.
            self.broken = f"{self._target}: {error.strerror}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._out is not None and self._target != "-":
            try:
                self._out.close()
            except OSError as failure:
                self.broken = self.broken or f"{self._target}: {failure.strerror}"
