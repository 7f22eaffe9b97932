"""The exception tree: what failed, on what, by which system call, and the cure.

Every error a user can meet derives from :class:`TuimigError`. `exit_code` is the command's exit code
(documented in the manual); only `tuimig/cli.py` acts on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that stands in the way of a migration.

    `name`: a short stable word (`io_uring`, `sysv-shm`); `where`: the descriptor, region or thread;
    `why`: one sentence; `cure`: what the person can do; `asks`: the person may accept it (`--yes`).
    """

    name: str
    where: str
    why: str
    cure: str
    asks: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.where}): {self.why}. {self.cure}"


class TuimigError(Exception):
    """Base of all. `what` is a full clause; `subject` the process, region or file; `cure` a sentence."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        subject: str = "",
        syscall: str = "",
        errno: int = 0,
        cure: str = "",
    ) -> None:
        self.what = what
        self.subject = subject
        self.syscall = syscall
        self.errno = errno
        self.cure = cure
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.subject}: {self.what}" if self.subject else self.what
        if self.errno:
            call = f"{self.syscall}: " if self.syscall else ""
            text += f" ({call}{os.strerror(self.errno)}, errno {self.errno})"
        elif self.syscall:
            text += f" ({self.syscall})"
        return f"{text}. {self.cure}" if self.cure else text


class UsageError(TuimigError):
    """A bad option, policy file, or combination of them."""

    exit_code = 2


class PrivilegeError(TuimigError):
    """A privilege or a kernel feature is missing."""

    exit_code = 3


class TargetGone(TuimigError):
    """The target ended, or is not the process it was."""

    exit_code = 4


class Unsupported(TuimigError):
    """The target holds state that cannot be migrated; nothing was started."""

    exit_code = 5

    def __init__(self, what: str, obstacles: Sequence[Obstacle] = (), **kwargs: object) -> None:
        self.obstacles = tuple(obstacles)
        super().__init__(what, **kwargs)  # type: ignore[arg-type]


class CaptureLost(TuimigError):
    """A page of T0 was lost before it could be captured; the source runs as before."""


class FreezeFailed(TuimigError):
    """Not all threads could be stopped in time; the source runs as before."""


class SpoolFull(TuimigError):
    """No room for the captured pages; the source runs as before."""


class SnapshotDamaged(TuimigError):
    """A snapshot is unfinished, cut, flipped, foreign or of another format."""


class RebuildFailed(TuimigError):
    """The copy could not be built; what was built of it has been ended."""


class EngineError(TuimigError):
    """A system call failed where it should not have; the source runs as before."""


class ProtocolError(TuimigError):
    """The other side of a connection does not keep to the protocol."""


class ConnectionLost(TuimigError):
    """The connection could not be made, or was lost and not made again in time; the source runs as before."""


class DestinationRefused(Unsupported):
    """The destination cannot take this process; nothing was stopped. Exit code 3 where it lacks a privilege, else 5."""

    def __init__(self, what: str, obstacles: Sequence[Obstacle] = (), *, exit_code: int = 5, **kwargs: object) -> None:
        super().__init__(what, obstacles, **kwargs)
        self.exit_code = exit_code


class RemoteFailed(TuimigError):
    """The destination could not build or keep the copy; the source runs as before."""


class HandOverFailed(TuimigError):
    """A move failed after its hand-over: the source stays stopped, and `what` says what each side is."""

    exit_code = 6


class Cancelled(TuimigError):
    """The person, or a signal, asked to stop; the source runs as before."""

    exit_code = 130
