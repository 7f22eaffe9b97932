"""Makes a process's unix sockets anew: bound ones first, then what connects to them, then pairs with their queues.

Names are mapped by --map-path. A name that somebody is listening on is refused before anything is bound.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from tuimig.core.errors import RebuildFailed
from tuimig.core.state import options, unixdiag
from tuimig.core.state.base import Build
from tuimig.core.state.descriptors import place, set_flags

if TYPE_CHECKING:
    from tuimig.core.state.unix import Unix

_SHUT_RECEIVING, _SHUT_SENDING = 1, 2
_HOW: Final = {_SHUT_RECEIVING: socket.SHUT_RD, _SHUT_SENDING: socket.SHUT_WR, 3: socket.SHUT_RDWR}


class Builder:
    """Sockets are ours until they are placed; whatever was made when it fails is closed."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._made: dict[int, socket.socket] = {}  # by inode in the source

    def make(self, entries: Sequence[Unix]) -> None:
        bound = [entry for entry in entries if entry.picture.name and entry.picture.role != "pair"]
        for entry in bound:
            if entry.picture.role in ("listening", "single", "client"):
                self._check_free(entry)
        try:
            for entry in entries:
                if entry.picture.role in ("listening", "single", "client"):
                    self._single(entry)
            by_inode = {entry.inode: entry for entry in entries}
            for entry in entries:
                if entry.picture.role == "client":
                    self._connect(entry)
                elif entry.picture.role == "orphan":
                    self._orphan(entry)
                elif entry.picture.role == "pair" and entry.inode not in self._made:
                    self._pair(entry, by_inode[entry.picture.peer])
        except BaseException:
            for sock in self._made.values():
                sock.close()
            raise
        for entry in entries:
            fd = place(self._build, entry.file, self._made[entry.inode].detach())
            set_flags(fd, entry.file.flags)

    # ------------------------------------------------------------ names

    def _mapped(self, name: bytes) -> bytes:
        for old, new in self._build.options.map_paths:
            if name in (os.fsencode(old), b"\0" + os.fsencode(old.removeprefix("@"))):
                return b"\0" + os.fsencode(new[1:]) if new.startswith("@") else os.fsencode(new)
        return name

    def _check_free(self, entry: Unix) -> None:
        name = self._mapped(entry.picture.name)
        taken = self._taken_abstract(name) if not name[0] else self._taken_path(name, entry)
        if taken:
            raise self._failed(entry, f"another process is using {show(name)}", errno.EADDRINUSE, "bind")

    def _taken_abstract(self, name: bytes) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return True
        return False

    def _taken_path(self, name: bytes, entry: Unix) -> bool:
        try:
            status = os.stat(name)
        except FileNotFoundError:
            if os.path.isdir(os.path.dirname(name) or b"."):
                return False
            raise self._failed(entry, f"the directory of {show(name)} is missing", errno.ENOENT, "bind") from None
        if not stat.S_ISSOCK(status.st_mode):
            raise self._failed(entry, f"{show(name)} is in the way and not a socket", errno.EEXIST, "bind")
        if unixdiag.bound_to(status) is not None:
            return True
        # Sockets of other network namespaces are found only by knocking; there it is refused where nobody lives.
        with socket.socket(socket.AF_UNIX, entry.picture.type) as probe:
            probe.setblocking(False)
            try:
                probe.connect(name)
            except ConnectionRefusedError:
                return False
            except OSError:
                return True
        return True

    def _failed(self, entry: Unix, what: str, code: int, syscall: str) -> RebuildFailed:
        old = show(entry.picture.name or entry.picture.peer_name or b"?")
        cure = f"Choose another place with --map-path {old}=NEW"
        return RebuildFailed(what, subject=entry.file.where, syscall=syscall, errno=code, cure=cure)

    # ------------------------------------------------------------ one socket

    def _single(self, entry: Unix) -> None:
        picture = entry.picture
        sock = self._made[entry.inode] = socket.socket(socket.AF_UNIX, picture.type)
        options.apply(sock, picture.options, entry.file.where, self._build)
        if picture.name:
            self._bind(sock, entry)
        if picture.role == "listening":
            sock.listen(picture.backlog)
        if entry.waiting:
            self._warn(entry, f"{entry.waiting} connections that wait to be accepted stay with the source")
        if picture.shutdown and picture.role != "listening":
            sock.shutdown(_HOW[picture.shutdown])

    def _bind(self, sock: socket.socket, entry: Unix) -> None:
        name = self._mapped(entry.picture.name)
        if name[0] and not name.startswith(b"/"):
            self._warn(entry, f"the relative name {show(name)} becomes an absolute one")
            name = os.path.join(os.fsencode(self._directory()), name)
        try:
            if name[0] and os.path.lexists(name):
                os.unlink(name)  # checked before: nobody lives there
            sock.bind(name)
            if name[0]:
                os.chown(name, *entry.picture.file_owner)
                os.chmod(name, entry.picture.file_mode)
        except OSError as error:
            raise self._failed(entry, f"{show(name)} cannot be bound", error.errno or 0, "bind") from error

    def _directory(self) -> str:
        """The working directory of the source, where it is known; a relative name means nothing without it."""
        section = self._build.manifest.state.get("attributes")
        if section is None:
            return os.getcwd()
        known = msgspec.json.decode(section)
        return str(known.get("cwd", os.getcwd()))

    def _connect(self, entry: Unix) -> None:
        name = self._mapped(entry.picture.peer_name)
        try:
            self._made[entry.inode].connect(name)
        except OSError as error:
            self._warn(entry, f"it could not be connected to {show(name)} again: {error.strerror}")

    # ------------------------------------------------------------ pairs

    def _pair(self, entry: Unix, other: Unix) -> None:
        first, second = self._connected(entry, other)
        self._made[entry.inode], self._made[other.inode] = first, second
        for sock, of in ((first, entry), (second, other)):
            options.apply(sock, of.picture.options, of.file.where, self._build)
        for sender, to in ((second, entry), (first, other)):
            self._queue(sender, to)
        for sock, of in ((first, entry), (second, other)):
            if of.picture.shutdown:
                sock.shutdown(_HOW[of.picture.shutdown])

    def _connected(self, entry: Unix, other: Unix) -> tuple[socket.socket, socket.socket]:
        """By a listener of the process's own where one end was accepted from it, so that both have the right names."""
        listening = [sock for sock in self._made.values() if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
        names = {sock.getsockname(): sock for sock in listening}
        for accepted, client in ((entry, other), (other, entry)):
            listener = names.get(_address(self._mapped(accepted.picture.name))) if accepted.picture.name else None
            if listener is None or accepted.picture.type == socket.SOCK_DGRAM:
                continue
            mine = socket.socket(socket.AF_UNIX, client.picture.type)
            mine.connect(listener.getsockname())
            theirs, _ = listener.accept()
            known = unixdiag.by_inode(os.fstat(theirs.fileno()).st_ino)
            if known is None or known.peer != os.fstat(mine.fileno()).st_ino:
                mine.close()
                theirs.close()
                raise self._failed(entry, "a stranger connected while the socket was made", errno.EAGAIN, "accept")
            return (theirs, mine) if accepted is entry else (mine, theirs)
        for end in (entry, other):
            if end.picture.name:
                self._warn(end, f"its name {show(end.picture.name)} is not kept")
        return socket.socketpair(socket.AF_UNIX, entry.picture.type)

    def _orphan(self, entry: Unix) -> None:
        sock, peer = socket.socketpair(socket.AF_UNIX, entry.picture.type)
        self._made[entry.inode] = sock
        with peer:
            self._queue(peer, entry)
            if entry.picture.broken:
                sock.send(b"\0")  # closing with something unread is what makes the kernel report the break
        options.apply(sock, entry.picture.options, entry.file.where, self._build)

    def _queue(self, sender: socket.socket, to: Unix) -> None:
        """What was queued at T0 goes in as one message, which takes no more room than the many it may have been."""
        sender.setblocking(False)
        left = memoryview(to.queued)
        try:
            while left:
                left = left[sender.send(left) :]
        except BlockingIOError as error:
            raise self._failed(to, f"{len(to.queued)} queued bytes do not fit", error.errno or 0, "send") from error
        finally:
            sender.setblocking(True)

    def _warn(self, entry: Unix, what: str) -> None:
        self._build.warnings.append(f"{entry.file.where}: {what}")


def _address(name: bytes) -> str | bytes:
    """As getsockname gives it: text for a path, bytes for an abstract name."""
    return os.fsdecode(name) if name[0] else name


def show(name: bytes) -> str:
    text = os.fsdecode(name)
    return text if name[0] else f"@{text[1:]}"
