"""File locks: flock, open file description locks and POSIX record locks. The copy takes them again.

While the source lives it keeps its write locks, so they ask before the dump; leases cannot be migrated.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Call, Descriptor, Frozen, Look, Probe, Stage
from tuimig.core.state.descriptors import raise_obstacles
from tuimig.core.syscalls import NR

CURE: Final = "Restore after the source has ended, or let the copy run without the lock with --yes"
_F_OFD_SETLK: Final = 37
_LINE: Final = re.compile(r"lock:\s*\d+: (\w+)\s+(\w+)\s+(\w+)\s+-?\d+ [0-9a-f]+:[0-9a-f]+:\d+ (\d+) (\d+|EOF)")


class Lock(Strict, frozen=True):
    number: int
    kind: str  # FLOCK OFDLCK POSIX
    write: bool
    start: int
    length: int  # bytes; 0: to the end of the file, however long


class Locks(Strict, frozen=True):
    locks: list[Lock]


def _locks(descriptors: Mapping[int, Descriptor]) -> list[Lock]:
    found = []
    for descriptor in descriptors.values():
        if descriptor.same_as != descriptor.number:
            continue
        for line in descriptor.info.splitlines():
            match = _LINE.match(line)
            if match:
                kind, _, access, start, end = match.groups()
                length = 0 if end == "EOF" else int(end) - int(start) + 1
                found.append(Lock(descriptor.number, kind, access != "READ", int(start), length))
            elif line.startswith("lock:"):
                raise ValueError(f"fdinfo of descriptor {descriptor.number} has a lock of another form: {line}")
    return found


def _obstacles(descriptors: Mapping[int, Descriptor]) -> list[Obstacle]:
    """Also asks about write locks; `asks` tells the two apart."""
    found = []
    for lock in _locks(descriptors):
        where = f"descriptor {lock.number}"
        link = descriptors[lock.number].link
        if lock.kind not in ("FLOCK", "OFDLCK", "POSIX"):
            found.append(Obstacle("lease", where, f"{link} carries a lease", "Give it up first"))
        elif lock.write:
            why = f"the source keeps its lock on {link}, so a copy beside it cannot have it"
            found.append(Obstacle("file-lock", where, why, CURE, asks=True))
    return found


class LocksKind:
    name: ClassVar[str] = "locks"
    Section: ClassVar[type[msgspec.Struct]] = Locks

    def obstacles(self, look: Look) -> list[Obstacle]:
        return _obstacles(look.descriptors)

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> Locks:
        raise_obstacles(obstacle for obstacle in _obstacles(frozen.descriptors) if not obstacle.asks)
        return Locks(_locks(frozen.descriptors))

    def rebuild(self, section: Locks, build: Build) -> None:
        for lock in section.locks:
            fd = build.placed[lock.number][0]
            access = fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK
            region = struct.pack("=hhxxxxqqixxxx", access, os.SEEK_SET, lock.start, lock.length, 0)
            try:
                self._take(lock, fd, region, build)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                where = f"descriptor {lock.number}"
                if not build.options.yes:
                    raise RebuildFailed("another process holds its lock", subject=where, cure=CURE) from error
                build.warnings.append(f"{where}: the copy runs without its file lock, another process holds it")

    def _take(self, lock: Lock, fd: int, region: bytes, build: Build) -> None:
        if lock.kind == "FLOCK":
            fcntl.flock(fd, (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        elif lock.kind == "OFDLCK":
            fcntl.fcntl(fd, _F_OFD_SETLK, region)
        else:
            holder = fcntl.fcntl(fd, fcntl.F_GETLK, region)
            if struct.unpack_from("=h", holder)[0] != fcntl.F_UNLCK:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            # A record lock belongs to the process: the copy has to take it itself. Closing any descriptor of the file
            # would lose it again, so late, when those of the build are gone.
            call = Call(f"take the lock on descriptor {lock.number}", NR["fcntl"], (lock.number, fcntl.F_SETLK, region))
            build.call(Stage.THREAD, call)


KIND = LocksKind()
