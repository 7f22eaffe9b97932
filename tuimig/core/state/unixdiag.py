"""Asks the kernel about unix sockets by inode (NETLINK_SOCK_DIAG): peer, shut down directions, queue, bound file.

Only sockets of our network namespace are seen; what an answer lacks is None.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST: Final = struct.Struct("=IHHIIBBHIII8s")
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_VFS, _PEER, _RQLEN, _SHUTDOWN = 1, 2, 4, 6  # attributes of an answer
_SHOW: Final = 0b11111  # NAME to RQLEN; SHUTDOWN comes always
_ANY_COOKIE: Final = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """`file`: device and inode (low 32 bits) of the socket file it is bound to. `waiting`: connections to accept."""

    inode: int
    state: int
    peer: int | None
    shutdown: int
    waiting: int
    backlog: int
    file: tuple[int, int] | None


def by_inode(inode: int) -> UnixSocket | None:
    """None where it is gone, or belongs to another network namespace."""
    try:
        return next(_ask(inode, 0), None)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def bound_to(status: os.stat_result) -> UnixSocket | None:
    """The socket that is bound to a socket file."""
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    wanted = (device, status.st_ino & 0xFFFFFFFF)
    return next((found for found in _ask(0, _NLM_F_DUMP) if found.file == wanted), None)


def _ask(inode: int, flags: int) -> Iterator[UnixSocket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
        link.send(
            _REQUEST.pack(
                _REQUEST.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 1, 0,
                socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _SHOW, _ANY_COOKIE,
            )
        )  # fmt: skip
        while True:
            for kind, body in _messages(link.recv(1 << 18)):
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, os.strerror(code), "sock_diag")
                yield _parse(body)
                if not flags:
                    return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = struct.unpack_from("=IH", data)
        yield kind, data[16:length]
        data = data[length + 3 & ~3 :]


def _parse(body: bytes) -> UnixSocket:
    _, _, state, _, inode = struct.unpack_from("=BBBBI", body)
    attributes: dict[int, bytes] = {}
    rest = body[16:]
    while len(rest) >= 4:
        length, kind = struct.unpack_from("=HH", rest)
        attributes[kind] = rest[4:length]
        rest = rest[length + 3 & ~3 :]
    peer = attributes.get(_PEER)
    file = attributes.get(_VFS)
    waiting, backlog = struct.unpack("=II", attributes.get(_RQLEN, bytes(8)))
    file_inode, device = struct.unpack("=II", file) if file else (0, 0)
    return UnixSocket(
        inode=inode,
        state=state,
        peer=struct.unpack("=I", peer)[0] if peer else None,
        shutdown=attributes.get(_SHUTDOWN, b"\0")[0],
        waiting=waiting,
        backlog=backlog,
        file=(device, file_inode) if file else None,
    )
