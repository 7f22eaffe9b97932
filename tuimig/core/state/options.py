"""Socket options as data: which exist at which level, read from a socket, set on another where they differ.

They are read before and after the freeze: what is the same on both sides of T0 was so at T0.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from tuimig.core.errors import RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build

SO_BUF_LOCK: Final = 72
_LOCKED_SNDBUF, _LOCKED_RCVBUF = 1, 2
SO_REUSEADDR: Final = "SO_REUSEADDR"

# Level and number by name. Numbers are written where Python's socket module has no name for them.
_GENERIC: Final[Mapping[str, int]] = {
    "SO_DONTROUTE": 5,
    "SO_BROADCAST": 6,
    "SO_KEEPALIVE": 9,
    "SO_OOBINLINE": 10,
    "SO_PRIORITY": 12,
    "SO_LINGER": 13,
    "SO_PASSCRED": 16,
    "SO_RCVLOWAT": 18,
    "SO_RCVTIMEO": 20,
    "SO_SNDTIMEO": 21,
    "SO_BINDTODEVICE": 25,
    "SO_TIMESTAMP": 29,
    "SO_PASSSEC": 34,
    "SO_TIMESTAMPNS": 35,
    "SO_MARK": 36,
    "SO_RXQ_OVFL": 40,
    "SO_PEEK_OFF": 42,
    "SO_NOFCS": 43,
    "SO_BUSY_POLL": 46,
    "SO_MAX_PACING_RATE": 47,
    "SO_INCOMING_CPU": 49,
    "SO_ZEROCOPY": 60,
    "SO_PREFER_BUSY_POLL": 69,
    "SO_PASSPIDFD": 76,
}
_REUSE: Final[Mapping[str, int]] = {SO_REUSEADDR: 2, "SO_REUSEPORT": 15}
_IP: Final[Mapping[str, int]] = {
    "IP_TOS": 1,
    "IP_TTL": 2,
    "IP_PKTINFO": 8,
    "IP_MTU_DISCOVER": 10,
    "IP_RECVERR": 11,
    "IP_RECVTTL": 12,
    "IP_RECVTOS": 13,
    "IP_FREEBIND": 15,
    "IP_TRANSPARENT": 19,
    "IP_MINTTL": 21,
    "IP_BIND_ADDRESS_NO_PORT": 24,
    "IP_MULTICAST_IF": 32,
    "IP_MULTICAST_TTL": 33,
    "IP_MULTICAST_LOOP": 34,
    "IP_MULTICAST_ALL": 49,
    "IP_LOCAL_PORT_RANGE": 51,
}
_IPV6: Final[Mapping[str, int]] = {
    "IPV6_UNICAST_HOPS": 16,
    "IPV6_MULTICAST_IF": 17,
    "IPV6_MULTICAST_HOPS": 18,
    "IPV6_MULTICAST_LOOP": 19,
    "IPV6_MTU_DISCOVER": 23,
    "IPV6_RECVERR": 25,
    "IPV6_V6ONLY": 26,
    "IPV6_MULTICAST_ALL": 29,
    "IPV6_RECVPKTINFO": 49,
    "IPV6_RECVHOPLIMIT": 51,
    "IPV6_RECVTCLASS": 66,
    "IPV6_TCLASS": 67,
    "IPV6_TRANSPARENT": 75,
    "IPV6_FREEBIND": 78,
}
_TCP: Final[Mapping[str, int]] = {
    "TCP_NODELAY": 1,
    "TCP_MAXSEG": 2,
    "TCP_CORK": 3,
    "TCP_KEEPIDLE": 4,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 6,
    "TCP_SYNCNT": 7,
    "TCP_LINGER2": 8,
    "TCP_DEFER_ACCEPT": 9,
    "TCP_WINDOW_CLAMP": 10,
    "TCP_CONGESTION": 13,
    "TCP_USER_TIMEOUT": 18,
    "TCP_FASTOPEN": 23,
    "TCP_NOTSENT_LOWAT": 25,
    "TCP_SAVE_SYN": 27,
    "TCP_FASTOPEN_CONNECT": 30,
    "TCP_FASTOPEN_NO_COOKIE": 34,
    "TCP_TX_DELAY": 37,
}
_UDP: Final[Mapping[str, int]] = {
    "UDP_CORK": 1,
    "UDP_ENCAP": 100,
    "UDP_NO_CHECK6_TX": 101,
    "UDP_NO_CHECK6_RX": 102,
    "UDP_SEGMENT": 103,
    "UDP_GRO": 104,
}
# Name, number, number of the form that ignores the host's limit, bit of SO_BUF_LOCK.
_BUFFERS: Final = (
    ("SO_SNDBUF", socket.SO_SNDBUF, 32, _LOCKED_SNDBUF),
    ("SO_RCVBUF", socket.SO_RCVBUF, 33, _LOCKED_RCVBUF),
)
# A socket, or this kernel, that does not have the option.
_ABSENT: Final = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN)


class Option(Strict, frozen=True):
    level: int
    number: int
    name: str
    value: bytes


def _tables(sock: socket.socket) -> Iterable[tuple[int, str, int]]:
    tables: list[tuple[int, Mapping[str, int]]] = [(socket.SOL_SOCKET, _REUSE), (socket.SOL_SOCKET, _GENERIC)]
    if sock.family != socket.AF_UNIX:
        tables.append((socket.IPPROTO_IP, _IP))
        if sock.family == socket.AF_INET6:
            tables.append((socket.IPPROTO_IPV6, _IPV6))
        stream = sock.type == socket.SOCK_STREAM
        tables.append((socket.IPPROTO_TCP, _TCP) if stream else (socket.IPPROTO_UDP, _UDP))
    return ((level, name, number) for level, table in tables for name, number in table.items())


def _get(sock: socket.socket, level: int, number: int) -> bytes | None:
    try:
        return sock.getsockopt(level, number, 64)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def read(sock: socket.socket) -> list[Option]:
    """Every option this socket has; buffer sizes only where the program has fixed them."""
    found = []
    for level, name, number in _tables(sock):
        value = _get(sock, level, number)
        if value is not None:
            found.append(Option(level, number, name, value))
    locked = _get(sock, socket.SOL_SOCKET, SO_BUF_LOCK)
    for name, number, _, bit in _BUFFERS:
        if locked is None or struct.unpack("=i", locked)[0] & bit:
            found.append(Option(socket.SOL_SOCKET, number, name, sock.getsockopt(socket.SOL_SOCKET, number, 4)))
    return found


def apply(sock: socket.socket, options: Iterable[Option], where: str, build: Build) -> None:
    """Set what differs. An option that this host refuses is a failure; a buffer that it caps is a warning."""
    buffers = {number: force for _, number, force, _ in _BUFFERS}
    for option in options:
        if _get(sock, option.level, option.number) == option.value:
            continue
        if option.level == socket.SOL_SOCKET and option.number in buffers:
            _set_buffer(sock, option, buffers[option.number], where, build)
            continue
        try:
            sock.setsockopt(option.level, option.number, option.value)
        except OSError as error:
            raise RebuildFailed(
                f"the socket option {option.name} cannot be set",
                subject=where,
                syscall="setsockopt",
                errno=error.errno or 0,
                cure="The destination's kernel or network lacks what the source has: provide it first",
            ) from error


def _set_buffer(sock: socket.socket, option: Option, force: int, where: str, build: Build) -> None:
    """The kernel doubles what it is given, and gives back the doubled size."""
    wanted = struct.unpack("=i", option.value)[0]
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, wanted // 2)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option.number, wanted // 2)
    if sock.getsockopt(socket.SOL_SOCKET, option.number) < wanted:
        build.warnings.append(f"{where}: {option.name} is less than the {wanted} bytes it was")
