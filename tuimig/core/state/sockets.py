"""TCP and UDP sockets over IPv4 and IPv6: listening, bound, connected UDP, unbound, with their options.

An established TCP connection cannot be in two places: it is refused, or with `--tcp close` the copy
finds its peer gone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
from typing import ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle, RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state import options
from tuimig.core.state.base import Build, Frozen, Look, Probe
from tuimig.core.state.descriptors import (
    GONE,
    Group,
    OpenFile,
    borrow,
    groups,
    place,
    raise_obstacles,
    refuse_new,
    set_flags,
)

SO_GET_FILTER: Final = 26
FIONREAD: Final = 0x541B
IPPROTO_MPTCP: Final = 262
_TCP_CLOSE, _TCP_LISTEN = 7, 10  # states in tcp_info
_PROTOCOLS: Final = {
    socket.SOCK_STREAM: (socket.IPPROTO_TCP, IPPROTO_MPTCP),
    socket.SOCK_DGRAM: (socket.IPPROTO_UDP,),
}


class Address(Strict, frozen=True):
    """Flow and scope are IPv6's; the scope is a network interface's number."""

    host: str
    port: int
    flow: int = 0
    scope: int = 0

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def of(self, sock: socket.socket) -> tuple[str | int, ...]:
        """As the calls of `sock` take it."""
        short = (self.host, self.port)
        return (*short, self.flow, self.scope) if sock.family == socket.AF_INET6 else short


class Picture(Strict, frozen=True):
    """What a socket is. `role`: listening, bound, plain, connected (UDP), closed (an established TCP connection, which
    the copy will find reset) or dead (a TCP connection that was over at T0).
    """

    family: int
    type: int
    protocol: int
    role: str
    local: Address | None = None
    remote: Address | None = None
    backlog: int = 0
    options: tuple[options.Option, ...] = ()


class Inet(Strict, frozen=True):
    file: OpenFile
    picture: Picture
    waiting: int = 0  # connections not accepted yet, or datagrams' bytes not read yet: they stay with the source


class Inets(Strict, frozen=True):
    files: list[Inet]


def ports_of(section: Inets) -> list[tuple[int, str]]:
    """(number, tcp or udp) of what a copy will listen on."""
    found = {
        (entry.picture.local.port, "tcp" if entry.picture.type == socket.SOCK_STREAM else "udp")
        for entry in section.files
        if entry.picture.role in ("listening", "bound") and entry.picture.local is not None
    }
    return sorted(found)


def pictures(look: Look) -> list[Picture]:
    """Of all that a process has open."""
    found = []
    for group in groups(look, look.descriptors, Sockets.name):
        with borrow(look, group.first) as fd:
            if fd is not None:
                found.append(_take(fd)[0])
    return found


def _tcp_role(sock: socket.socket) -> tuple[str, int, int]:
    """Role, backlog, connections that wait to be accepted."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    waiting, backlog = struct.unpack_from("=II", info, 24)
    if info[0] == _TCP_LISTEN:
        return "listening", backlog, waiting
    if info[0] != _TCP_CLOSE:
        return "closed", 0, 0
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if any(events & select.POLLRDHUP for _, events in poll.poll(0)):
        return "dead", 0, 0
    return ("bound" if _bound(sock) else "plain"), 0, 0


def _bound(sock: socket.socket) -> bool:
    host, port = sock.getsockname()[:2]
    return bool(port) or host not in ("0.0.0.0", "::")


def _take(fd: int) -> tuple[Picture, int]:
    """The picture of a socket, and what waits in it."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        backlog = waiting = 0
        remote: Address | None = None
        if sock.type == socket.SOCK_STREAM:
            role, backlog, waiting = _tcp_role(sock)
        else:
            role = "bound" if _bound(sock) else "plain"
            waiting = struct.unpack("=i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]
        try:
            remote = Address(*sock.getpeername())
            role = "connected" if sock.type == socket.SOCK_DGRAM else role
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EINVAL):
                raise
        over = role in ("closed", "dead")
        picture = Picture(
            family=int(sock.family),
            type=int(sock.type),
            protocol=sock.proto,
            role=role,
            local=None if role == "plain" else Address(*sock.getsockname()),
            remote=remote,
            backlog=backlog,
            options=() if over else tuple(options.read(sock)),
        )
        return picture, waiting


def _filtered(fd: int) -> bool:
    """Whether a packet filter is attached; its length comes back where the buffer's would."""
    length = ctypes.c_uint32(0)
    try:
        rawcall.call("getsockopt", fd, socket.SOL_SOCKET, SO_GET_FILTER, 0, ctypes.addressof(length))
    except PermissionError:
        return True  # an eBPF program, which cannot be read
    return length.value > 0


class Sockets:
    name: ClassVar[str] = "sockets"
    Section: ClassVar[type[msgspec.Struct]] = Inets

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        for group in groups(look, look.descriptors, self.name):
            with borrow(look, group.first) as fd:
                if fd is None:
                    continue
                if _filtered(fd):
                    why = "it has a packet filter attached, which cannot be carried over"
                    found.append(Obstacle("socket-filter", group.where, why, "Detach the filter first"))
                picture, waiting = _take(fd)
            found += _obstacles(look, group, picture, waiting)
        return found

    def probes(self, look: Look) -> list[Probe]:
        """Nothing is read inside the freeze: pictures from before and after it are compared."""
        for group in groups(look, look.descriptors, self.name):
            with borrow(look, group.first) as fd:
                if fd is not None:
                    look.notes[f"sockets.picture.{group.link}"] = _take(fd)[0]
        return []

    def dump(self, frozen: Frozen) -> Inets:
        look = frozen.look
        files = [self._inet(frozen, group) for group in groups(look, frozen.descriptors, self.name)]
        gone = Picture(int(socket.AF_INET), int(socket.SOCK_STREAM), int(socket.IPPROTO_TCP), "closed")
        files += [Inet(group.file, gone) for group in groups(look, frozen.descriptors, GONE)]
        return Inets(files)

    def _inet(self, frozen: Frozen, group: Group) -> Inet:
        look = frozen.look
        before = look.notes.get(f"sockets.picture.{group.link}")
        with borrow(look, group.first) as fd:
            after, waiting = (before, 0) if fd is None else _take(fd)
        if after is None:
            raise refuse_new(group, "it was opened and closed around the freeze")
        over = ("closed", "dead")
        if before is None and after.role not in over:
            raise refuse_new(group, "the socket was made during the freeze")
        if before is not None and before != after and not (before.role in over and after.role in over):
            raise refuse_new(group, "the socket changed during the freeze")
        picture = before or after
        raise_obstacles(_obstacles(look, group, picture, 0))
        return Inet(group.file, picture, waiting)

    # ------------------------------------------------------------ destination

    def rebuild(self, section: Inets, build: Build) -> None:
        for entry in section.files:
            if entry.picture.role in ("listening", "bound"):
                _check_free(entry, build)
        for entry in section.files:
            sock = _reset(entry) if entry.picture.role in ("closed", "dead") else _open(entry, build)
            set_flags(place(build, entry.file, sock.detach()), entry.file.flags)


def _obstacles(look: Look, group: Group, picture: Picture, waiting: int) -> list[Obstacle]:
    if picture.protocol not in _PROTOCOLS.get(socket.SocketKind(picture.type), ()):
        why = "only TCP and UDP sockets can be migrated"
        return [Obstacle("socket-protocol", group.where, why, "Close it first")]
    if look.options.tcp == "close":
        return []
    if picture.role == "closed":
        why = f"a TCP connection from {picture.local} to {picture.remote} is established"
        cure = "With --tcp close the copy finds its peer gone"
        return [Obstacle("tcp", group.where, why, cure)]
    if waiting and picture.role == "listening":
        why = f"{waiting} connections to {picture.local} wait to be accepted"
        return [Obstacle("tcp", group.where, why, "With --tcp close they stay with the source alone")]
    return []


def _mapped(address: Address, build: Build) -> Address:
    """The local address of the copy, by --map-port."""
    new = {entry.old: entry.new for entry in build.options.map_ports}
    return msgspec.structs.replace(address, port=new.get(address.port, address.port))


def _fresh(entry: Inet, build: Build) -> socket.socket:
    picture = entry.picture
    try:
        sock = socket.socket(picture.family, picture.type, picture.protocol)
    except OSError as error:
        raise RebuildFailed(
            "a socket of its family or protocol cannot be made here",
            subject=entry.file.where,
            syscall="socket",
            errno=error.errno or 0,
        ) from error
    try:
        options.apply(sock, picture.options, entry.file.where, build)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_free(entry: Inet, build: Build) -> None:
    """Ports are tried before any is taken, without SO_REUSEPORT: that would let the copy share its source's port."""
    local = entry.picture.local
    if local is None or _mapped(local, build).port == 0:
        return
    with _fresh(entry, build) as sock:
        stream = entry.picture.type == socket.SOCK_STREAM
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(stream))
        _bind(sock, entry, _mapped(local, build))


def _bind(sock: socket.socket, entry: Inet, address: Address) -> None:
    try:
        sock.bind(address.of(sock))
    except OSError as error:
        cures = {
            errno.EADDRINUSE: f"Choose another port with --map-port {(entry.picture.local or address).port}:NEW",
            errno.EADDRNOTAVAIL: "Give this host the address first",
            errno.EACCES: "A privilege is missing for this port: run as root",
        }
        raise RebuildFailed(
            f"the address {address} cannot be bound",
            subject=entry.file.where,
            syscall="bind",
            errno=error.errno or 0,
            cure=cures.get(error.errno or 0, ""),
        ) from error


def _open(entry: Inet, build: Build) -> socket.socket:
    picture = entry.picture
    sock = _fresh(entry, build)
    try:
        if picture.local is not None:
            stream = picture.type == socket.SOCK_STREAM
            if stream:  # connections of the source's that linger on the port are no reason not to listen
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            local = _mapped(picture.local, build)
            try:
                _bind(sock, entry, local)
            except RebuildFailed as error:
                if picture.role != "connected" or local != picture.local:
                    raise
                build.warnings.append(f"{entry.file.where}: {error.what}, so it gets another local address")
            if stream:
                reuse = [option for option in picture.options if option.name == options.SO_REUSEADDR]
                options.apply(sock, reuse, entry.file.where, build)
        if picture.role == "listening":
            sock.listen(picture.backlog)
        elif picture.role == "connected" and picture.remote is not None:
            sock.connect(picture.remote.of(sock))
    except OSError as error:
        sock.close()
        raise RebuildFailed(
            "the socket cannot be set up as it was",
            subject=f"{entry.file.where} ({picture.local})",
            syscall="connect" if picture.role == "connected" else "listen",
            errno=error.errno or 0,
            cure=f"Choose another port with --map-port {picture.local.port}:NEW" if picture.local else "",
        ) from error
    except BaseException:
        sock.close()
        raise
    if entry.waiting:
        what = "connections that wait to be accepted" if picture.role == "listening" else "bytes of datagrams not read"
        build.warnings.append(f"{entry.file.where}: {entry.waiting} {what} stay with the source")
    return sock


def _reset(entry: Inet) -> socket.socket:
    """A TCP socket whose peer has just reset it, over loopback; where the source's was over, no error is left."""
    mapped = "::ffff:" if entry.picture.family == socket.AF_INET6 else ""
    sock = socket.socket(entry.picture.family, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            sock.connect((f"{mapped}127.0.0.1", listener.getsockname()[1]))
            peer, _ = listener.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            peer.close()
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        if not poll.poll(1000):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    except OSError as error:
        sock.close()
        raise RebuildFailed(
            "a closed connection cannot be made over loopback",
            subject=entry.file.where,
            syscall="connect",
            errno=error.errno or 0,
            cure="Bring up the loopback interface",
        ) from error
    if entry.picture.role == "dead":
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return sock


KIND = Sockets()
