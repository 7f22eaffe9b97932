"""Pipes with both ends in the process: content at T0, capacity, flags. One that leads out is --stdio's or an obstacle.

The content is duplicated inside the freeze by tee(2) from our own descriptor of the read end; the source loses nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state.base import OUT, Build, Descriptor, Frozen, Look, Probe, ProbeKind
from tuimig.core.state.descriptors import (
    Group,
    OpenFile,
    find,
    groups,
    place,
    raise_obstacles,
    refuse_new,
    set_flags,
)
from tuimig.core.state.terminals import CURE, Outside, outside, stand_in
from tuimig.core.syscalls import NR

F_SETPIPE_SZ: Final = 1031
F_GETPIPE_SZ: Final = 1032
FIONREAD: Final = 0x541B


class Pipe(Strict, frozen=True):
    """`ends`: every open file of it; each reads or writes by its flags. A side without an end is closed."""

    link: str
    ends: list[OpenFile]
    capacity: int  # bytes
    packets: list[bytes]  # its content, as single reads give it: one piece, or the packets of packet mode


class Pipes(Strict, frozen=True):
    pipes: list[Pipe]
    outside: list[Outside]


def _reads(group: Group) -> bool:
    return group.first.flags & os.O_ACCMODE != os.O_WRONLY


def _writes(group: Group) -> bool:
    return group.first.flags & os.O_ACCMODE != os.O_RDONLY


def _by_pipe(look: Look, descriptors: Mapping[int, Descriptor]) -> dict[str, list[Group]]:
    pipes: dict[str, list[Group]] = {}
    for group in groups(look, descriptors, "pipes"):
        pipes.setdefault(group.link, []).append(group)
    return pipes


def _leads_out(look: Look, ends: list[Group]) -> bool:
    """One side only, and somebody else holds the other. Where nobody does the kernel reports a hang-up or an error."""
    if any(map(_reads, ends)) and any(map(_writes, ends)):
        return False
    fd = find(look, ends[0].first)
    if fd is None:
        return False
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)


class PipesKind:
    name: ClassVar[str] = "pipes"
    Section: ClassVar[type[msgspec.Struct]] = Pipes

    def obstacles(self, look: Look) -> list[Obstacle]:
        return self._obstacles(look, look.descriptors)

    def _obstacles(self, look: Look, descriptors: Mapping[int, Descriptor]) -> list[Obstacle]:
        return [
            Obstacle("pipe", group.where, f"the other end of {group.link} is in another process", CURE)
            for ends in _by_pipe(look, descriptors).values()
            if _leads_out(look, ends)
            for group in ends
            if not group.standard
        ]

    def probes(self, look: Look) -> list[Probe]:
        probes = []
        for ends in _by_pipe(look, look.descriptors).values():
            reader = next(filter(_reads, ends), None)
            fd = find(look, reader.first) if reader else None
            if reader is None or fd is None or _leads_out(look, ends):
                continue
            most = fcntl.fcntl(fd, F_GETPIPE_SZ)
            key = f"pipes.content.{reader.number}"
            size = Probe(
                f"pipes.size.{reader.number}", ProbeKind.CALL, NR["ioctl"], (reader.number, FIONREAD, OUT), out=4
            )
            probes += [size, Probe(key, ProbeKind.TEE, fd=fd, out=most)]
        return probes

    def dump(self, frozen: Frozen) -> Pipes:
        raise_obstacles(self._obstacles(frozen.look, frozen.descriptors))
        section = Pipes([], [])
        for link, ends in _by_pipe(frozen.look, frozen.descriptors).items():
            if _leads_out(frozen.look, ends):
                section.outside.extend(map(outside, ends))
                continue
            reader = next(filter(_reads, ends), None)
            fd = find(frozen.look, ends[0].first)
            if fd is None:
                raise refuse_new(ends[0], "the pipe was made or closed around the freeze")
            capacity = fcntl.fcntl(fd, F_GETPIPE_SZ)
            packets = self._content(frozen, reader) if reader else []
            section.pipes.append(Pipe(link, [group.file for group in ends], capacity, packets))
        return section

    def _content(self, frozen: Frozen, reader: Group) -> list[bytes]:
        before = frozen.look.descriptors.get(reader.number)
        content = frozen.calls.get(f"pipes.content.{reader.number}")
        size = frozen.calls.get(f"pipes.size.{reader.number}")
        if before is None or before.link != reader.link or size is None or content is None or size.ret < 0:
            raise refuse_new(reader, "the pipe was made during the freeze")
        queued = struct.unpack("=i", size.data[:4])[0]
        packets = list(_frames(content.data))
        if queued and (content.ret < 0 or sum(map(len, packets)) < queued):
            raise refuse_new(reader, f"it held {queued} bytes, of which {content.ret} could be read")
        return packets

    # ------------------------------------------------------------ destination

    def rebuild(self, section: Pipes, build: Build) -> None:
        for pipe in section.pipes:
            reader, writer = (build.own(fd) for fd in os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECT))
            self._resize(pipe, writer, build)
            if len(pipe.packets) < 2:  # a piece longer than a packet may be must not be cut
                fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
            if any(os.write(writer, packet) != len(packet) for packet in pipe.packets):
                raise RebuildFailed("the pipe does not hold what it held", subject=pipe.ends[0].where)
            unused = {os.O_RDONLY: reader, os.O_WRONLY: writer}
            for end in pipe.ends:
                access = end.flags & os.O_ACCMODE
                fd = unused.pop(access, -1)
                # Further ends are opened, to have flags of their own. A side without an end is closed with the build.
                fd = os.dup(fd) if fd >= 0 else os.open(f"/proc/self/fd/{reader}", access | os.O_NONBLOCK)
                set_flags(place(build, end, fd), end.flags)
        for entry in section.outside:
            stand_in(entry, build)

    def _resize(self, pipe: Pipe, fd: int, build: Build) -> None:
        try:
            fcntl.fcntl(fd, F_SETPIPE_SZ, pipe.capacity)
        except OSError as error:
            where = pipe.ends[0].where
            if error.errno != errno.EPERM or fcntl.fcntl(fd, F_GETPIPE_SZ) < sum(map(len, pipe.packets)):
                raise RebuildFailed(
                    "the pipe cannot have its capacity",
                    subject=where,
                    syscall="fcntl",
                    errno=error.errno or 0,
                    cure="Raise /proc/sys/fs/pipe-max-size",
                ) from error
            build.warnings.append(
                f"{where}: the pipe keeps the default capacity, {pipe.capacity} bytes are not allowed"
            )


KIND = PipesKind()


def _frames(data: bytes) -> Iterator[bytes]:
    """What a TEE probe brings: a u32 size and as many bytes, again and again."""
    while data:
        size = int.from_bytes(data[:4], "little")
        yield data[4 : 4 + size]
        data = data[4 + size :]
