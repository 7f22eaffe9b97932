"""What a console and a session process say to each other: jobs and commands one way, events and the outcome the other.

Frames on a stream socket: four bytes of length, then msgpack of `[name, body]`. Both ends are ours and of one version,
yet a frame is typed and bounded like anything else that is read.
"""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from tuimig.core import errors
from tuimig.core.errors import Obstacle, TuimigError, Unsupported
from tuimig.core.model import (
    Connection,
    Detail,
    Frozen,
    Handover,
    Heat,
    Note,
    Options,
    Phase,
    Planned,
    Progress,
    Report,
    Round,
)
from tuimig.core.policy import Policy

LENGTH: Final = struct.Struct("=I")
FRAME_MOST: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """One migration to run. `place` is the directory of a snapshot or a restore, or a clone's destination."""

    verb: str  # snapshot | clone | move | restore | heat
    pid: int = 0
    place: str = ""
    policy: Policy = field(default_factory=Policy)
    options: Options = field(default_factory=Options)
    seconds: float = 0.0  # of a heat measurement
    record: str = ""  # the file of a recording
    step: bool = False  # stop before each phase until told to go on

    @property
    def remote(self) -> bool:
        """Whether it goes through a connection."""
        return self.verb == "move" or (self.verb == "clone" and self.place not in ("", "local"))


@dataclass(frozen=True, slots=True)
class Cancel:
    """End it; the source runs on, nothing is left."""


@dataclass(frozen=True, slots=True)
class Go:
    """Step mode: the phase that was waited for may begin."""


@dataclass(frozen=True, slots=True)
class Reconnect:
    """A lost connection is tried now, and has its whole time again."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Step mode: this phase waits for Go. The source runs meanwhile."""

    phase: str


@dataclass(frozen=True, slots=True)
class Background:
    """Go on when the console is gone, and write the report (or the error) to this file."""

    report: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer to Background: it will go on, and the file will be written."""


@dataclass(frozen=True, slots=True)
class State:
    """The latest counters, on the board."""

    progress: Progress
    details: dict[str, Detail]  # by side
    remote: Progress | None = None  # the destination's, where there is one


@dataclass(frozen=True, slots=True)
class Failure:
    """A TuimigError on its way."""

    kind: str
    what: str
    subject: str
    syscall: str
    errno: int
    cure: str
    obstacles: tuple[Obstacle, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The migration succeeded."""

    report: Report


Told = Phase | Note | Planned | Round | Frozen | Connection | Handover | Waiting  # events, as a session has them
Message = Told | Job | Cancel | Go | Reconnect | Background | Heat | Failure | Done | Kept
TYPES: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(Phase, Note, Planned, Round, Frozen, Connection, Handover, Waiting),
        *(Job, Cancel, Go, Reconnect, Background, Heat, Failure, Done, Kept, State),
    )
}


def encode(message: object) -> bytes:
    return msgspec.msgpack.encode((type(message).__name__, message))


def decode(data: bytes) -> Any:
    """Raises ValueError for what is not one of ours."""
    name, body = msgspec.msgpack.decode(data, type=tuple[str, msgspec.Raw])
    if name not in TYPES:
        raise ValueError(f"not a message: {name!r}")
    return msgspec.msgpack.decode(body, type=TYPES[name])


def frame(message: object) -> bytes:
    data = encode(message)
    return LENGTH.pack(len(data)) + data


class Frames:
    """Cuts a stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are whole by now. Raises ValueError for a stream that is not ours."""
        self._buffer += data
        found = []
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > FRAME_MOST:
                raise ValueError(f"a frame of {length} bytes")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(decode(bytes(self._buffer[LENGTH.size : end])))
            del self._buffer[:end]
        return found


def failure_of(error: TuimigError) -> Failure:
    return Failure(
        kind=type(error).__name__,
        what=error.what,
        subject=error.subject,
        syscall=error.syscall,
        errno=error.errno,
        cure=error.cure,
        obstacles=error.obstacles if isinstance(error, Unsupported) else (),
    )


def error_of(failure: Failure) -> TuimigError:
    found = getattr(errors, failure.kind, TuimigError)
    ours = isinstance(found, type) and issubclass(found, TuimigError)
    kind: type[TuimigError] = found if ours else TuimigError
    fields: dict[str, Any] = {
        "subject": failure.subject,
        "syscall": failure.syscall,
        "errno": failure.errno,
        "cure": failure.cure,
    }
    if issubclass(kind, Unsupported):
        return kind(failure.what, failure.obstacles, **fields)
    return kind(failure.what, **fields)


def write_outcome(path: Path, outcome: Done | Failure | Heat) -> None:
    """The report, or what went wrong, as JSON for whoever comes back."""
    body = outcome.report if isinstance(outcome, Done) else outcome
    fresh = path.with_suffix(".part")
    with contextlib.suppress(OSError):  # nobody is left who could be told
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh.write_text(json.dumps(msgspec.to_builtins(body), indent=2) + "\n", encoding="utf-8")
        fresh.rename(path)
