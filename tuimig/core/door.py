"""Where connections come in: the two ways by which a source reaches a host (standard input and output, a listening unix
socket), and a session's own socket, on which the processes of its later connections hand over their descriptors.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from tuimig.core import wire
from tuimig.core.control import Inbox, read_first
from tuimig.core.errors import ConnectionLost, EngineError, ProtocolError, UsageError
from tuimig.core.journal import directory
from tuimig.core.transport import enlarge, peer_uid

OPEN_S: Final = 30.0
MOST_SESSIONS: Final = 64
_CURES: Final = {  # of a path where nobody can listen
    errno.EADDRINUSE: "Remove it if it is a socket that nobody listens on any more, or name another path",
    errno.ENOENT: "Make its directory first, or name another path",
    errno.ENOTDIR: "A part of the path is no directory: name another one",
    errno.EACCES: "Name a path in a directory that you may write to",
    0: "Name a shorter path",  # Python itself finds it too long
}
GONE: Final = "the session is not there any more"


class Caller:
    """A connection that was handed over. `holder` keeps the process that did it until it is closed."""

    def __init__(self, opened: wire.Open, fd_in: int, fd_out: int, holder: socket.socket) -> None:
        self.open = opened
        self.fd_in, self.fd_out = fd_in, fd_out
        self._holder = holder

    def take(self) -> tuple[int, int]:
        fds = (self.fd_in, self.fd_out)
        self.fd_in = self.fd_out = -1
        return fds

    def close(self) -> None:
        for fd in {self.fd_in, self.fd_out} - {-1}:
            os.close(fd)
        self.fd_in = self.fd_out = -1
        self._holder.close()


def _path(session: str) -> Path:
    return directory() / f"session-{session[:32]}"


def _tidy(place: Path) -> None:
    """Sockets of sessions that were killed: nobody answers there."""
    for path in place.glob("session-*"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue


class Door:
    """Listens for a session; callers go into its inbox."""

    def __init__(self, session: str, inbox: Inbox) -> None:
        self._session = session
        self._inbox = inbox
        self._place = _path(session)
        _tidy(self._place.parent)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.bind(str(self._place))
            self._sock.listen(16)
        except OSError as error:
            self._sock.close()
            raise EngineError(
                "the session cannot listen for its further connections",
                subject=str(self._place),
                syscall="bind",
                errno=error.errno or 0,
            ) from None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="tm-door", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not any(fd == self._wake for fd, _ in poll.poll()):
            try:
                holder, _ = self._sock.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
                self._let_in(holder)

    def _let_in(self, holder: socket.socket) -> None:
        holder.settimeout(5)
        data, ancillary, _, _ = holder.recvmsg(65536, socket.CMSG_SPACE(2 * 4))
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % 4])
        opened = msgspec.msgpack.decode(data, type=wire.Open)
        if len(fds) != 2 or peer_uid(holder) != os.geteuid() or opened.session != self._session:
            for fd in fds:
                os.close(fd)
            holder.close()
            return
        self._inbox.put(Caller(opened, fds[0], fds[1], holder))

    def close(self) -> None:
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._wake = -1
        self._sock.close()
        with contextlib.suppress(OSError):
            self._place.unlink()
        with contextlib.suppress(OSError):
            self._place.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hand_over(opened: wire.Open, fd_in: int, fd_out: int) -> None:
    """Give the connection to its session, and stay until the session is done with it: ssh ends with us."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(str(_path(opened.session)))
        except OSError as error:
            _say_gone(opened, fd_out)
            raise ConnectionLost(GONE, syscall="connect", errno=error.errno or 0) from None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd_in, fd_out]))]
        sock.sendmsg([msgspec.msgpack.encode(opened)], rights)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, fd_in)  # the other side must see our session's end, not ours
        os.dup2(null, fd_out)
        os.close(null)
        with contextlib.suppress(OSError):
            sock.recv(1)


def _say_gone(opened: wire.Open, fd_out: int) -> None:
    """So that a source that comes back need not try for long."""
    if opened.kind == "control":
        os.set_blocking(fd_out, True)
        with contextlib.suppress(OSError):
            os.write(fd_out, wire.frame(wire.Failed(0, wire.Trouble("ConnectionLost", GONE), False)))


def serve_stdio(notify: Callable[[str], None], began: Callable[[Any], None]) -> None:
    """One connection on standard input and output: a session's first, or one that joins it."""
    from tuimig.core.receive import Receiver

    fd_in, fd_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # nothing else may speak there
    os.dup2(2, 1)
    os.close(null)
    opened, rest = read_first(fd_in, OPEN_S)
    if rest:
        raise ProtocolError("the source spoke before its turn")
    if not opened.first:
        _hand_over(opened, fd_in, fd_out)
        return
    if opened.kind != "control":
        raise ProtocolError("a session began with another connection than its control connection")
    receiver = Receiver(opened, fd_in, fd_out, notify)
    began(receiver)
    receiver.run()


class Listener:
    """`receive --listen unix:PATH`: each connection gets a `receive --stdio` of its own, as inetd would do it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._children: list[subprocess.Popen[bytes]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._sock.bind(path)
            self._sock.listen(64)
        except OSError as error:
            self._sock.close()
            raise UsageError(
                f"cannot listen there: {error.strerror or error}",
                subject=f"unix:{path}",
                cure=_CURES.get(error.errno or 0, "Name another path"),
            ) from None
        finally:
            os.umask(before)

    def cancel(self) -> None:
        os.eventfd_write(self._wake, 1)

    def run(self, notify: Callable[[str], None]) -> int:
        """Until cancelled; the number of connections."""
        notify(f"ready, on unix:{self._path}")
        count = 0
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll(1000)]
                self._children = [child for child in self._children if child.poll() is None]
                if self._wake in ready:
                    return count
                if self._sock.fileno() in ready:
                    count += 1
                    self._accept(notify)
        finally:
            self._sock.close()
            os.close(self._wake)
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            for child in self._children:
                child.terminate()
            for child in self._children:
                child.wait()

    def _accept(self, notify: Callable[[str], None]) -> None:
        sock, _ = self._sock.accept()
        with sock:
            uid = peer_uid(sock)
            if uid not in (0, os.geteuid()):
                notify(f"a connection of user {uid} was refused")
                return
            if len(self._children) >= MOST_SESSIONS:
                notify("a connection was refused: there are too many")
                return
            enlarge(sock)
            command = [sys.executable, "-m", "tuimig.cli", "receive", "--stdio"]
            self._children.append(subprocess.Popen(command, stdin=sock.fileno(), stdout=sock.fileno()))
