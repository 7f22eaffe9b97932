"""What all kinds of descriptors share: which module claims which open file, groups of dup'ed numbers, signal owners.

Each open file description belongs to exactly one module, told by its link. What nobody claims is an obstacle here,
never dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle, Unsupported
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Call, Descriptor, Frozen, Look, Probe, Stage
from tuimig.core.syscalls import NR

STANDARD: Final = (0, 1, 2)
AGAIN: Final = "Try again"
GONE: Final = "gone"  # a socket that was closed before anyone could tell what it was
_FAMILIES: Final = {int(socket.AF_UNIX): "unix", int(socket.AF_INET): "sockets", int(socket.AF_INET6): "sockets"}
_ANONYMOUS: Final = {
    "anon_inode:[eventfd]": "eventfd",
    "anon_inode:[timerfd]": "timerfd",
    "anon_inode:[eventpoll]": "epoll",
    "anon_inode:[signalfd]": "signalfd",
}
_TERMINAL: Final = re.compile(r"/dev/(pts/\d+|tty\w*|console|pty\w+)$")
# Links of descriptors that no module can rebuild: the word for the obstacle and what the person can do about it.
_REFUSED: Final = (
    ("anon_inode:[io_uring]", "io_uring", "Start the program without io_uring"),
    ("anon_inode:[userfaultfd]", "userfaultfd", "It handles its own page faults: it cannot be migrated"),
    ("anon_inode:[fanotify]", "fanotify", "Stop the watch first"),
    ("anon_inode:inotify", "inotify", "Start the program without file watches"),
    ("anon_inode:[perf_event]", "perf_event", "Stop the measurement first"),
    ("anon_inode:bpf", "bpf", "It owns kernel programs or maps: it cannot be migrated"),
    ("anon_inode:[pidfd]", "pidfd", "It refers to another process: close it first"),
    ("pidfd:", "pidfd", "It refers to another process: close it first"),
    ("mnt:", "namespace", "It holds a namespace open: close it first"),
    ("net:", "namespace", "It holds a namespace open: close it first"),
)
O_ASYNC: Final = 0o20000
_FIOASYNC: Final = 0x5452
_F_SETOWN_EX: Final = 15
_F_GETOWN_EX: Final = 16
_F_SETSIG: Final = 10
_F_GETSIG: Final = 11
_OWNER_GROUP: Final = 2


class Slot(Strict, frozen=True):
    """One number in the descriptor table."""

    number: int
    cloexec: bool


class OpenFile(Strict, frozen=True):
    """One open file description and the numbers that refer to it, lowest first. `flags` are without O_CLOEXEC."""

    slots: list[Slot]
    flags: int

    @property
    def number(self) -> int:
        return self.slots[0].number

    @property
    def where(self) -> str:
        return f"descriptor {self.number}"


@dataclass(frozen=True, slots=True)
class Group:
    """The same, while it is being looked at: with the descriptor that shows it."""

    first: Descriptor
    slots: tuple[Slot, ...]

    @property
    def number(self) -> int:
        return self.first.number

    @property
    def link(self) -> str:
        return self.first.link

    @property
    def where(self) -> str:
        return f"descriptor {self.number}"

    @property
    def standard(self) -> bool:
        """Whether --stdio decides about it: one of its numbers is 0, 1 or 2."""
        return any(slot.number in STANDARD for slot in self.slots)

    @property
    def file(self) -> OpenFile:
        return OpenFile(list(self.slots), self.first.flags & ~os.O_CLOEXEC)


def groups(look: Look, descriptors: Mapping[int, Descriptor], kind: str) -> list[Group]:
    """The open files among `descriptors` that belong to the module `kind`, in order of number."""
    slots: dict[int, list[Slot]] = {}
    for number in sorted(descriptors):
        descriptor = descriptors[number]
        slots.setdefault(descriptor.same_as, []).append(Slot(number, descriptor.cloexec))
    return [
        Group(descriptors[numbers[0].number], tuple(numbers))
        for numbers in slots.values()
        if kind_of(look, descriptors[numbers[0].number]) == kind
    ]


def kind_of(look: Look, descriptor: Descriptor) -> str | None:
    """The name of the module that claims a descriptor, None where nobody does."""
    link = descriptor.link
    if link in _ANONYMOUS:
        return _ANONYMOUS[link]
    if link.startswith("pipe:["):
        return "pipes"
    if link.startswith("socket:["):
        known = family(look, descriptor)
        return GONE if known is None else _FAMILIES.get(known)
    if _TERMINAL.match(link):
        return "terminals"
    if link.startswith("/memfd:") or (link.startswith("/") and not link.startswith("/anon_hugepage")):
        return "files"
    return None


@contextlib.contextmanager
def borrow(look: Look, descriptor: Descriptor) -> Iterator[int | None]:
    """Our own descriptor of the file that `descriptor` shows, for a moment; None where the target has closed it.

    Only for a moment: while we hold a connection, its peer does not see that the target closes it.
    """
    try:
        fd = rawcall.pidfd_getfd(look.pidfd, descriptor.number)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ESRCH):
            raise
        yield None
        return
    try:
        yield fd if os.readlink(f"/proc/self/fd/{fd}") == descriptor.link else None
    finally:
        os.close(fd)


def find(look: Look, descriptor: Descriptor) -> int | None:
    """The same, kept until the look ends: for what must be read inside the freeze."""
    try:
        fd = look.duplicate(descriptor.number)
        return fd if os.readlink(f"/proc/self/fd/{fd}") == descriptor.link else None
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ESRCH):
            raise
    return None


def family(look: Look, descriptor: Descriptor) -> int | None:
    """Address family of a socket, None where it is gone. Remembered by inode, which a socket has for life."""
    key = f"descriptors.family.{descriptor.link}"
    if key not in look.notes:
        with borrow(look, descriptor) as fd:
            if fd is None:
                return None
            with socket.socket(fileno=os.dup(fd)) as probe:
                look.notes[key] = int(probe.family)
    return int(look.notes[key])


def place(build: Build, file: OpenFile, fd: int) -> int:
    """`fd`, from now on owned by the build, becomes every number of `file`."""
    build.own(fd)
    for slot in file.slots:
        build.place(slot.number, fd, cloexec=slot.cloexec)
    return fd


def set_flags(fd: int, flags: int) -> None:
    """The status flags that can be set later, but O_ASYNC: that waits until the owner is known."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & (os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME))


def refuse_new(group: Group, why: str) -> Unsupported:
    """What `dump` raises for a state that came up between the look and the freeze."""
    return Unsupported(why, subject=f"{group.where} ({group.link})", cure=AGAIN)


def raise_obstacles(found: Iterable[Obstacle]) -> None:
    obstacles = list(found)
    if obstacles:
        raise Unsupported("the process holds state that cannot be migrated", obstacles, cure=AGAIN)


# ---------------------------------------------------------------- what no other module covers


class Owner(Strict, frozen=True):
    """Who gets SIGIO of an open file. `host` is the source's host id of the process or thread."""

    number: int
    kind: int
    host: int
    signal: int
    asynchronous: bool


class Owners(Strict, frozen=True):
    owners: list[Owner]


def _unclaimed(descriptor: Descriptor) -> Obstacle:
    where = f"descriptor {descriptor.number}"
    for prefix, name, cure in _REFUSED:
        if descriptor.link.startswith(prefix):
            return Obstacle(name, where, f"{descriptor.link} cannot be rebuilt in a copy", cure)
    if descriptor.link.startswith("socket:["):
        return Obstacle("socket-family", where, "only unix, IPv4 and IPv6 sockets can be migrated", "Close it first")
    return Obstacle("descriptor", where, f"{descriptor.link} is of a kind that cannot be migrated", "Close it first")


class Descriptors:
    """The rest: descriptors that no module claims, and SIGIO owners of all of them."""

    name: ClassVar[str] = "descriptors"
    Section: ClassVar[type[msgspec.Struct]] = Owners

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        for descriptor in look.descriptors.values():
            if descriptor.same_as == descriptor.number and kind_of(look, descriptor) is None:
                found.append(_unclaimed(descriptor))
        return found + [
            Obstacle(
                "signal-owner",
                f"descriptor {owner.number}",
                f"its SIGIO goes to {owner.host}, which is not this process",
                "Take the signal owner away first",
            )
            for owner in self._owners(look, look.descriptors)
            if not self._own(look, owner)
        ]

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> Owners:
        look = frozen.look
        closing = look.options.tcp == "close"  # then what is gone already counts as a connection, state/sockets.py
        raise_obstacles(
            _unclaimed(descriptor)
            for descriptor in frozen.descriptors.values()
            if kind_of(look, descriptor) in ((None,) if closing else (None, GONE))
        )
        return Owners([owner for owner in self._owners(look, frozen.descriptors) if self._own(look, owner)])

    def rebuild(self, section: Owners, build: Build) -> None:
        inner = {thread.host_tid: thread.tid for thread in build.manifest.threads}
        for owner in section.owners:
            if owner.kind == _OWNER_GROUP:
                build.warnings.append(f"descriptor {owner.number}: SIGIO to the process group is not kept")
                continue
            target = struct.pack("=ii", owner.kind, inner.get(owner.host, 0))
            what = f"restore the signal owner of descriptor {owner.number}"
            build.call(Stage.FINISH, Call(what, NR["fcntl"], (owner.number, _F_SETOWN_EX, target)))
            if owner.signal:
                build.call(Stage.FINISH, Call(what, NR["fcntl"], (owner.number, _F_SETSIG, owner.signal)))
            if owner.asynchronous:
                build.call(Stage.FINISH, Call(what, NR["ioctl"], (owner.number, _FIOASYNC, struct.pack("=i", 1))))

    def _owners(self, look: Look, descriptors: Mapping[int, Descriptor]) -> list[Owner]:
        owners = []
        for descriptor in descriptors.values():
            if descriptor.same_as != descriptor.number or descriptor.flags & os.O_PATH:
                continue
            with borrow(look, descriptor) as fd:
                if fd is None:
                    continue
                kind, host = struct.unpack("=ii", fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8)))
                signal = fcntl.fcntl(fd, _F_GETSIG)
            asynchronous = bool(descriptor.flags & O_ASYNC)
            if host or signal or asynchronous:
                owners.append(Owner(descriptor.number, kind, host, signal, asynchronous))
        return owners

    def _own(self, look: Look, owner: Owner) -> bool:
        if owner.kind == _OWNER_GROUP or owner.host == 0:
            return True
        return owner.host in look.tids or owner.host == look.pid


KIND = Descriptors()
