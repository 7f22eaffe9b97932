"""epoll: every registration, with its events and data. Comes after all other descriptors.

The kernel keys a registration on the caller's number and file, so the copy registers them itself. A file that was
reported by an edge before T0 is reported once more: programs of that style read until EAGAIN and are not disturbed.
"""

from __future__ import annotations

import ctypes
import errno
import re
import select
import struct
from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Call, Descriptor, Frozen, Look, Probe, Stage
from tuimig.core.state.descriptors import Group, OpenFile, groups, place, raise_obstacles
from tuimig.core.syscalls import NR

KCMP_EPOLL_TFD: Final = 7
EPOLL_CTL_ADD: Final = 1
_CONDITIONS: Final = 0x0FFFFFFF  # the bits above say how to report, these say what
_LINE: Final = re.compile(
    r"tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+)\s+pos:-?\d+ ino:([0-9a-f]+) sdev:([0-9a-f]+)"
)


class Registration(Strict, frozen=True):
    number: int
    events: int
    data: int


class Epoll(Strict, frozen=True):
    file: OpenFile
    registrations: list[Registration]


class Epolls(Strict, frozen=True):
    files: list[Epoll]


class _Slot(ctypes.Structure):
    """struct kcmp_epoll_slot"""

    _fields_: ClassVar = [("efd", ctypes.c_uint32), ("tfd", ctypes.c_uint32), ("toff", ctypes.c_uint32)]


def _lines(descriptor: Descriptor) -> list[tuple[Registration, int]]:
    """Registrations with the inode of the registered file."""
    found = []
    for line in descriptor.info.splitlines():
        match = _LINE.match(line)
        if match:
            number, events, data, inode, _ = match.groups()
            found.append((Registration(int(number), int(events, 16), int(data, 16)), int(inode, 16)))
        elif line.startswith("tfd:"):
            raise ValueError(f"fdinfo of epoll descriptor {descriptor.number} has a line of another form: {line}")
    return found


class EpollKind:
    name: ClassVar[str] = "epoll"
    Section: ClassVar[type[msgspec.Struct]] = Epolls

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        for group in groups(look, look.descriptors, self.name):
            found += self._stale(group, look.descriptors)
            found += self._other_files(look, group)
        return found

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> Epolls:
        found = groups(frozen.look, frozen.descriptors, self.name)
        raise_obstacles(obstacle for group in found for obstacle in self._stale(group, frozen.descriptors))
        return Epolls([Epoll(group.file, [entry for entry, _ in _lines(group.first)]) for group in found])

    def rebuild(self, section: Epolls, build: Build) -> None:
        for epoll in section.files:
            place(build, epoll.file, rawcall.call("epoll_create1", 0))
        for epoll in section.files:
            # Fired one-shots first: while nothing else is registered, waiting once takes exactly their event.
            for entry in sorted(epoll.registrations, key=lambda entry: not _fired(entry)):
                self._register(epoll, entry, build)

    def _register(self, epoll: Epoll, entry: Registration, build: Build) -> None:
        what = f"register descriptor {entry.number} with epoll descriptor {epoll.file.number}"
        events = entry.events
        disarm = False
        if _fired(entry):
            disarm = _ready(build.placed[entry.number][0])
            if disarm:
                events |= select.EPOLLIN | select.EPOLLOUT
            else:
                build.warnings.append(
                    f"descriptor {entry.number}: its one-shot registration with epoll descriptor {epoll.file.number} "
                    "may report a hang-up though it has fired already"
                )
        event = struct.pack("=IQ", events, entry.data)
        build.call(Stage.SETUP, Call(what, NR["epoll_ctl"], (epoll.file.number, EPOLL_CTL_ADD, entry.number, event)))
        if disarm:
            build.call(Stage.SETUP, Call(what, NR["epoll_wait"], (epoll.file.number, bytes(12), 1, 0)))

    def _stale(self, group: Group, descriptors: Mapping[int, Descriptor]) -> list[Obstacle]:
        """Registrations whose number is closed, or shows another inode."""
        found = []
        seen = set()
        for entry, inode in _lines(group.first):
            now = descriptors.get(entry.number)
            if now is None or int(now.field("ino", "-1")) != inode or entry.number in seen:
                found.append(_obstacle(group, entry.number))
            seen.add(entry.number)
        return found

    def _other_files(self, look: Look, group: Group) -> list[Obstacle]:
        """Anonymous files share one inode: only kcmp tells whether the number still shows the registered file."""
        found = []
        for entry, _ in _lines(group.first):
            slot = _Slot(group.number, entry.number, 0)
            try:
                same = rawcall.kcmp(look.pid, look.pid, KCMP_EPOLL_TFD, entry.number, ctypes.addressof(slot)) == 0
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EBADF):
                    raise
                continue  # taken out of the set since
            if not same:
                found.append(_obstacle(group, entry.number))
        return found


def _obstacle(group: Group, number: int) -> Obstacle:
    why = f"it has a registration under descriptor {number}, which is closed or another file by now"
    return Obstacle("epoll-stale", group.where, why, "The program must remove registrations before it closes files")


def _fired(entry: Registration) -> bool:
    """A one-shot registration that waits to be armed again: it has no conditions, not even errors."""
    return not entry.events & _CONDITIONS


def _ready(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return bool(poll.poll(0))


KIND = EpollKind()
