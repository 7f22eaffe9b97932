"""eventfd and signalfd: all of their state is in fdinfo, read at T0."""

from __future__ import annotations

import ctypes
import os
from typing import ClassVar

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Frozen, Look, Probe
from tuimig.core.state.descriptors import OpenFile, groups, place, set_flags


class Counter(Strict, frozen=True):
    file: OpenFile
    count: int
    semaphore: bool


class EventFds(Strict, frozen=True):
    files: list[Counter]


class EventFd:
    name: ClassVar[str] = "eventfd"
    Section: ClassVar[type[msgspec.Struct]] = EventFds

    def obstacles(self, look: Look) -> list[Obstacle]:
        return []

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> EventFds:
        return EventFds(
            [
                Counter(
                    group.file,
                    int(group.first.field("eventfd-count"), 16),
                    group.first.field("eventfd-semaphore", "0") == "1",
                )
                for group in groups(frozen.look, frozen.descriptors, self.name)
            ]
        )

    def rebuild(self, section: EventFds, build: Build) -> None:
        for entry in section.files:
            fd = place(build, entry.file, os.eventfd(0, os.EFD_SEMAPHORE if entry.semaphore else 0))
            if entry.count:  # the initial value of eventfd() has 32 bits only
                os.eventfd_write(fd, entry.count)
            set_flags(fd, entry.file.flags)


class Signals(Strict, frozen=True):
    file: OpenFile
    mask: int


class SignalFds(Strict, frozen=True):
    files: list[Signals]


class SignalFd:
    """Which process's signals a signalfd reads is decided by who reads it: nothing of the source clings to it."""

    name: ClassVar[str] = "signalfd"
    Section: ClassVar[type[msgspec.Struct]] = SignalFds

    def obstacles(self, look: Look) -> list[Obstacle]:
        return []

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> SignalFds:
        found = groups(frozen.look, frozen.descriptors, self.name)
        return SignalFds([Signals(group.file, int(group.first.field("sigmask"), 16)) for group in found])

    def rebuild(self, section: SignalFds, build: Build) -> None:
        for entry in section.files:
            mask = ctypes.c_uint64(entry.mask)
            fd = rawcall.call("signalfd4", -1, ctypes.addressof(mask), ctypes.sizeof(mask), 0)
            set_flags(place(build, entry.file, fd), entry.file.flags)


KIND = EventFd()
SIGNALFD = SignalFd()
