"""Unix sockets: pairs within the process with what is queued in them, listeners, single ones, datagram clients.

A connection to another process cannot be copied: on 0, 1, 2 `--stdio` decides, elsewhere it is an obstacle.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
import struct
import time
from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state import options, unixdiag
from tuimig.core.state.base import OUT, Build, Descriptor, Frozen, Look, Probe, ProbeKind
from tuimig.core.state.descriptors import Group, OpenFile, borrow, find, groups, raise_obstacles, refuse_new
from tuimig.core.state.terminals import CURE, Outside, outside, stand_in
from tuimig.core.state.unixbuild import Builder, show
from tuimig.core.syscalls import NR

QUEUED_LOOKS: Final = 5
QUEUED_NAP_S: Final = 0.02
FIONREAD: Final = 0x541B
_STATE_LISTEN: Final = 10
_BOTH: Final = 3  # shut down in both directions
_LINK: Final = re.compile(r"socket:\[(\d+)\]")


class Picture(Strict, frozen=True):
    """What a socket is. Names are as bound: a path, an abstract name with its leading zero byte, or empty.

    `role`: pair (its peer is in this process), orphan (its peer is closed), client (of a named datagram socket),
    listening, single (neither connected nor listening), connected (to another process).
    """

    type: int
    role: str
    name: bytes
    peer: int  # inode of the peer of a pair, 0 elsewhere
    peer_name: bytes
    shutdown: int  # bits: 1 receiving, 2 sending
    backlog: int
    broken: bool  # the next call reports an error: an orphan whose peer left something unread
    options: tuple[options.Option, ...]
    file_mode: int = 0  # permission bits of the socket file
    file_owner: tuple[int, int] = (0, 0)


class Unix(Strict, frozen=True):
    file: OpenFile
    inode: int
    picture: Picture
    queued: bytes
    waiting: int  # connections not accepted yet: they stay with the source


class Unixes(Strict, frozen=True):
    files: list[Unix]
    outside: list[Outside]


def _inode(link: str) -> int:
    match = _LINK.fullmatch(link)
    if match is None:
        raise ValueError(f"not a socket: {link}")
    return int(match[1])


def _name(address: str | bytes) -> bytes:
    return address if isinstance(address, bytes) else os.fsencode(address)


def _take(fd: int, inode: int, inside: frozenset[int]) -> tuple[Picture, int] | None:
    """The picture, and how many connections wait. `inside`: inodes of the process's unix sockets."""
    known = unixdiag.by_inode(inode)
    if known is None:
        return None
    with socket.socket(fileno=os.dup(fd)) as sock:
        name = _name(sock.getsockname())
        peer_name = b"" if known.peer is None else _name(sock.getpeername())
        peer = known.peer or 0
        poll = select.poll()
        poll.register(sock, 0)
        broken = any(events & select.POLLERR for _, events in poll.poll(0))
        role = _role(sock, known, peer_name, inside)
        mode, owner = 0, (0, 0)
        if name and name[0]:
            try:
                status = os.stat(name)
                mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
            except OSError:
                mode, owner = 0o777, (0, 0)  # its file is gone: nobody can reach it by name any more
        picture = Picture(
            type=int(sock.type),
            role=role,
            name=name,
            peer=peer if role == "pair" else 0,
            peer_name=peer_name,
            shutdown=known.shutdown,
            backlog=known.backlog if role == "listening" else 0,
            broken=broken,
            options=tuple(options.read(sock)),
            file_mode=mode,
            file_owner=owner,
        )
        return picture, known.waiting if role == "listening" else 0


def _role(sock: socket.socket, known: unixdiag.UnixSocket, peer_name: bytes, inside: frozenset[int]) -> str:
    if known.state == _STATE_LISTEN:
        return "listening"
    if known.peer is None:
        return "single"
    if known.peer in inside:
        other = unixdiag.by_inode(known.peer)
        if other is not None and other.peer == known.inode:
            return "pair"
    if sock.type == socket.SOCK_DGRAM:
        if peer_name:
            return "client"
        return "connected" if known.peer else "orphan"
    return "orphan" if known.peer == 0 and known.shutdown == _BOTH else "connected"


class UnixKind:
    name: ClassVar[str] = "unix"
    Section: ClassVar[type[msgspec.Struct]] = Unixes

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = groups(look, look.descriptors, self.name)
        inside = frozenset(_inode(group.link) for group in found)
        obstacles = []
        for group in found:
            with borrow(look, group.first) as fd:
                taken = None if fd is None else _take(fd, _inode(group.link), inside)
                if fd is not None and taken is None:
                    why = "it belongs to another network namespace, or the kernel cannot tell its peer"
                    obstacles.append(Obstacle("unix-socket", group.where, why, "Close it first"))
                if fd is not None and taken is not None and taken[0].type == socket.SOCK_DGRAM and _stays_queued(fd):
                    why = "datagrams are queued in it, and how many cannot be seen without taking them out"
                    obstacles.append(Obstacle("unix-datagrams", group.where, why, "Let the process read them first"))
            if taken is not None:
                obstacles += _obstacles(group, taken[0])
        return obstacles

    def probes(self, look: Look) -> list[Probe]:
        """Queues are peeked inside the freeze; the rest is pictured before and after it."""
        found = groups(look, look.descriptors, self.name)
        inside = frozenset(_inode(group.link) for group in found)
        probes = []
        for group in found:
            with borrow(look, group.first) as fd:
                taken = None if fd is None else _take(fd, _inode(group.link), inside)
            if taken is None:
                continue
            look.notes[f"unix.picture.{group.link}"] = taken[0]
            if taken[0].role in ("listening", "connected"):
                continue
            mine = find(look, group.first)
            if mine is None:
                continue
            number = group.number
            probes += [
                Probe(f"unix.size.{number}", ProbeKind.CALL, NR["ioctl"], (number, FIONREAD, OUT), out=4),
                Probe(f"unix.queue.{number}", ProbeKind.PEEK, fd=mine, out=_room(look, taken[0], mine)),
            ]
        return probes

    def dump(self, frozen: Frozen) -> Unixes:
        section = Unixes([], [])
        found = groups(frozen.look, frozen.descriptors, self.name)
        inside = frozenset(_inode(group.link) for group in found)
        for group in found:
            picture, waiting = self._picture(frozen, group, inside)
            raise_obstacles(_obstacles(group, picture))
            if picture.role == "connected":
                section.outside.append(outside(group))
                continue
            queued = b"" if picture.role == "listening" else self._queued(frozen, group, picture)
            section.files.append(Unix(group.file, _inode(group.link), picture, queued, waiting))
        return section

    def _picture(self, frozen: Frozen, group: Group, inside: frozenset[int]) -> tuple[Picture, int]:
        before = frozen.look.notes.get(f"unix.picture.{group.link}")
        mine = None
        if before is not None and before.role not in ("listening", "connected"):
            mine = find(frozen.look, group.first)  # kept since the look, so that it outlives the target's own
        with borrow(frozen.look, group.first) as borrowed:
            fd = borrowed if borrowed is not None else mine
            taken = None if fd is None else _take(fd, _inode(group.link), inside)
        if taken is None:
            if before is None:
                raise refuse_new(group, "it was opened and closed around the freeze")
            return before, 0
        if before is None:
            raise refuse_new(group, "the socket was made during the freeze")
        if before != taken[0]:
            raise refuse_new(group, "the socket changed during the freeze")
        return taken

    def _queued(self, frozen: Frozen, group: Group, picture: Picture) -> bytes:
        """What could be read at T0, all of it or Unsupported."""
        if int(group.first.field("scm_fds", "0")):
            raise refuse_new(group, "descriptors were on their way through the socket")
        size = frozen.calls.get(f"unix.size.{group.number}")
        peeked = frozen.calls.get(f"unix.queue.{group.number}")
        before = frozen.look.descriptors.get(group.number)
        if size is None or peeked is None or size.ret < 0 or before is None or before.link != group.link:
            raise refuse_new(group, "its queue was not read inside the freeze")
        queued = struct.unpack("=i", size.data[:4])[0]
        data = peeked.data[: peeked.ret] if peeked.ret > 0 else b""
        if len(data) != queued or (queued and picture.type == socket.SOCK_DGRAM):
            raise refuse_new(group, "several messages were queued in it, which cannot be read without taking them out")
        return data

    def rebuild(self, section: Unixes, build: Build) -> None:
        Builder(build).make(section.files)
        for entry in section.outside:
            stand_in(entry, build)


def _stays_queued(fd: int) -> bool:
    """Something is there to be read, and still is a moment later: nobody is about to read it."""
    for _ in range(QUEUED_LOOKS):
        if not int(struct.unpack("=i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]):
            return False
        time.sleep(QUEUED_NAP_S)
    return True


def _room(look: Look, picture: Picture, fd: int) -> int:
    """The most bytes that can be queued: what its peer may send, or what is there if nobody can send any more."""
    if picture.role == "orphan":
        return max(1, int(struct.unpack("=i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]))
    sender = _by_inode(look.descriptors).get(picture.peer)
    peer = find(look, sender) if sender is not None else None
    with socket.socket(fileno=os.dup(fd if peer is None else peer)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _by_inode(descriptors: Mapping[int, Descriptor]) -> dict[int, Descriptor]:
    return {
        int(match[1]): descriptor
        for descriptor in descriptors.values()
        if descriptor.same_as == descriptor.number and (match := _LINK.fullmatch(descriptor.link))
    }


def _obstacles(group: Group, picture: Picture) -> list[Obstacle]:
    if picture.role != "connected" or group.standard:
        return []
    name = picture.peer_name or picture.name
    why = "it is connected to another process" + (f" over {show(name)}" if name else "")
    return [Obstacle("unix-connection", group.where, why, CURE)]


KIND = UnixKind()
