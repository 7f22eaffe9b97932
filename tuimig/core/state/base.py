"""What a kind of process state has to provide, and what it is given: the protocol of `tuimig/core/state/`.

A kind is one module with dump and rebuild side by side, and one entry in the registry (`state/__init__.py`).
The order of its calls: `obstacles` and `probes` while the target runs; the native engine takes the probes inside the
freeze; `dump` after the thaw, from what they returned; `rebuild` on the destination, from the section that `dump` made.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import msgspec

from tuimig.core.errors import Obstacle
from tuimig.core.manifest import Clocks, Manifest
from tuimig.core.model import Options, Region

OUT = (1 << 64) - 1  # as an argument of a call: the address of the call's buffer in the process


# ---------------------------------------------------------------- probes: read inside the freeze


class ProbeKind(enum.IntEnum):
    """Values are the native engine's (enum tm_probe_kind in source.h)."""

    CALL = 1  # inject a system call into the leader
    CALL_EACH = 2  # inject it into every thread
    FILE = 3  # read a /proc file whole
    TEE = (
        4  # duplicate a pipe's content without consuming it (our descriptor of its read end): frames of u32 size, bytes
    )
    PEEK = 5  # recv(MSG_PEEK) of what a socket has queued (our descriptor)


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to read at T0. `key` names the result.

    CALL, CALL_EACH: system call `nr` with `args` (OUT stands for the buffer), `data` is put in the buffer first, `out`
    bytes of it (at most 1024) come back. FILE: `path`. TEE, PEEK: `fd`, and `out` as the most bytes wanted.
    """

    key: str
    kind: ProbeKind
    nr: int = 0
    args: tuple[int, ...] = ()
    data: bytes = b""
    out: int = 0
    path: str = ""
    fd: int = -1


@dataclass(frozen=True, slots=True)
class Answer:
    """A probe's result: `ret` is the call's return value or -errno; `data` the bytes read."""

    ret: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One descriptor of the target. `link`: readlink of /proc/PID/fd/N; `info`: fdinfo's text, `key:\\tvalue` lines.

    `same_as`: the lowest descriptor with the same open file description (kcmp), itself where none is lower.
    """

    number: int
    link: str
    info: str
    same_as: int

    def field(self, key: str, default: str = "") -> str:
        """First fdinfo line with this key."""
        for line in self.info.splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return value.strip()
        return default

    @property
    def flags(self) -> int:
        """Open flags, including O_CLOEXEC where the descriptor has it."""
        return int(self.field("flags", "0"), 8)

    @property
    def position(self) -> int:
        return int(self.field("pos", "0"))

    @property
    def cloexec(self) -> bool:
        return bool(self.flags & os.O_CLOEXEC)


# ---------------------------------------------------------------- source side


@dataclass(slots=True)
class Look:
    """The target while it runs, before the freeze. Everything here may have changed by T0.

    `status`: /proc/PID/status as a dict; `duplicate(n)` gives our own descriptor of the target's open file n
    (pidfd_getfd; cached; closed with the look), raising OSError where it is gone. `notes`: what a kind wants to
    remember from before the freeze until its `dump`, under keys that start with `name.`
    """

    pid: int
    pidfd: int
    options: Options
    status: Mapping[str, str]
    regions: Sequence[Region]
    tids: Sequence[int]
    descriptors: Mapping[int, Descriptor]
    duplicate: Callable[[int], int]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Frozen:
    """What was read at T0 (from inside the freeze), for `dump`.

    `calls[key]`: answers of CALL, FILE, TEE, PEEK probes; `each[key][tid]`: answers of CALL_EACH (host tids).
    `look` is the older picture; where the two differ, this one is right.
    """

    look: Look
    clocks: Clocks
    descriptors: Mapping[int, Descriptor]
    regions: Sequence[Region]
    tids: Sequence[int]
    calls: Mapping[str, Answer]
    each: Mapping[str, Mapping[int, Answer]]


# ---------------------------------------------------------------- destination side


class Stage(enum.IntEnum):
    """When a call of the rebuild is made. Within a stage calls keep the order in which they were added."""

    SETUP = 1  # by the child itself, before its memory is replaced; full privileges, data pointers are free
    THREAD = 2  # injected into the thread `tid` once memory and threads stand
    FINISH = 3  # injected into the leader after every THREAD call
    CREDENTIALS = 4  # injected into each thread (tid) last of all: no privilege is left after it


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of the rebuild. `args`: integers, or bytes (a pointer is passed; at most 3 KiB if injected).

    Failure (a negative return, unless in `allow` as positive errnos) ends the rebuild with `what` in the error.
    """

    what: str  # "restore the alternate signal stack"
    nr: int
    args: tuple[int | bytes, ...]
    allow: tuple[int, ...] = ()


@dataclass(slots=True)
class Build:
    """What the state modules ask of the destination; destination.py carries it out.

    `place(number, fd)`: our descriptor `fd` becomes the copy's descriptor `number`; ours stays ours (`own` has it
    closed when the build is over). Placement happens before every SETUP call. `tid` is the source's innermost thread
    id; 0 is the leader. `outside(what, act)`: `act` is run by our own process when all injected calls have been made
    and no processor is pinned any more, just before the copy's first instruction, with the copy's thread ids as we see
    them by its own (the source's) ids; an OSError from it ends the rebuild as a failed call does. `clocks_continue`:
    the copy's monotonic and boot time clocks go on from T0 (false where the time namespace is refused). `source_ends`:
    the source does not run beside the copy.
    """

    manifest: Manifest
    options: Options
    placed: dict[int, tuple[int, bool]] = field(default_factory=dict)
    calls: dict[Stage, list[tuple[int, Call]]] = field(default_factory=dict)
    owned: list[int] = field(default_factory=list)  # descriptors of ours to close when the build is over
    warnings: list[str] = field(default_factory=list)
    clocks_continue: bool = True
    source_ends: bool = False
    actions: list[tuple[str, Callable[[Mapping[int, int]], None]]] = field(default_factory=list)

    def own(self, fd: int) -> int:
        self.owned.append(fd)
        return fd

    def place(self, number: int, fd: int, *, cloexec: bool) -> None:
        self.placed[number] = (fd, cloexec)

    def call(self, stage: Stage, call: Call, tid: int = 0) -> None:
        self.calls.setdefault(stage, []).append((tid, call))

    def outside(self, what: str, act: Callable[[Mapping[int, int]], None]) -> None:
        self.actions.append((what, act))

    def close(self) -> None:
        for fd in self.owned:
            os.close(fd)
        self.owned.clear()


# ---------------------------------------------------------------- the protocol


class StateKind(Protocol):
    """One kind of process state. `Section` is its part of the manifest."""

    name: ClassVar[str]
    Section: ClassVar[type[msgspec.Struct]]

    def obstacles(self, look: Look) -> list[Obstacle]:
        """What of this kind cannot be migrated, found while the target runs. Nothing is dropped silently."""
        ...

    def probes(self, look: Look) -> list[Probe]:
        """What must be read inside the freeze. Keys start with `name.`"""
        ...

    def dump(self, frozen: Frozen) -> Any:
        """The section, from T0's answers. Raises Unsupported where T0 holds what `obstacles` did not see."""
        ...

    def rebuild(self, section: Any, build: Build) -> None:
        """Ask the build for what makes the copy have this state."""
        ...
