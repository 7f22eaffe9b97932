"""How a source reaches its destination: the user's OpenSSH client, a unix socket, or a process of its own beside it.

Every connection is a pair of descriptors to a `tuimig receive`, as rsync does it. Nothing here knows what is said.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tuimig.core import sshwords
from tuimig.core.errors import ConnectionLost, PrivilegeError, TuimigError, UsageError

UCRED: Final = struct.Struct("=iII")
BUFFER: Final = 4 << 20
_SSH = re.compile(
    r"ssh://(?:(?P<user>[^@/:\s-][^@/:\s]*)@)?(?P<host>\[[0-9a-fA-F:%.\w]+\]|[^-:/@\s][^:/@\s]*)(?::(?P<port>\d+))?/?"
)


@dataclass(frozen=True, slots=True)
class Destination:
    """`local`, `unix:PATH` or `ssh://[user@]host[:port]`."""

    text: str
    kind: str  # local | unix | ssh
    path: str = ""
    host: str = ""
    user: str = ""
    port: int = 0

    @property
    def is_local(self) -> bool:
        return self.kind == "local"


def parse(text: str) -> Destination:
    if text == "local":
        return Destination(text, "local")
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Destination(text, "unix", path=text.removeprefix("unix:"))
    if found := _SSH.fullmatch(text):
        port = int(found["port"] or 0)
        if port < 65536:
            return Destination(text, "ssh", host=found["host"].strip("[]"), user=found["user"] or "", port=port)
    raise UsageError(f"no such destination: {text}", cure="Choose local, unix:PATH or ssh://[user@]host[:port]")


class Link:
    """One connection. `take` gives the descriptors away; what must end with them ends in `close`."""

    def __init__(
        self,
        sock: socket.socket,
        process: subprocess.Popen[bytes] | None = None,
        words: Any = None,
        cure: Callable[[str, int | None], str] | None = None,
    ) -> None:
        """`cure`: what helps, by what was said and by the exit code."""
        self._sock = sock
        self._process = process
        self._words = words
        self._cure = cure

    def fileno(self) -> int:
        return self._sock.fileno()

    def take(self) -> int:
        """A descriptor of its own, for reading and writing."""
        return os.dup(self._sock.fileno())

    def why(self) -> str:
        """What the ssh client, or the remote shell, said; the last line of it."""
        if self._words is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(1)
        self._words.seek(0)
        lines = [line for line in self._words.read(65536).decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip()[:400] if lines else ""

    def failure(self, what: str, subject: str = "") -> ConnectionLost:
        """`what` happened to it, with what was said of it, and what helps."""
        said = self.why()
        code = self._process.returncode if self._process is not None else None
        helps = self._cure(said, code) if self._cure is not None and (said or code) else ""
        return ConnectionLost(f"{what}: {said}" if said else what, subject=subject, cure=helps)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        if self._process is not None:
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._words is not None:
            self._words.close()
            self._words = None


def connect(to: Destination, remote_command: str, *, urgent: bool = False) -> Link:
    """A new connection. ConnectionLost where there is none to be had. `urgent`: small and quick, not bulk."""
    if to.kind == "unix":
        return Link(_unix(to.path))
    if to.kind == "local":
        return _start([sys.executable, "-m", "tuimig.cli", "receive", "--stdio"])
    command = ["ssh", "-T", "-o", "ClearAllForwardings=yes", "-o", f"IPQoS={'ef' if urgent else 'cs1'}"]
    where = ["-p", str(to.port)] if to.port else []
    where += ["-l", to.user] if to.user else []
    by_hand = shlex.join([*where, to.host])
    return _start(
        [*command, *where, "--", to.host, f"{remote_command} receive --stdio"],
        lambda said, code: sshwords.cure(said, code, by_hand, remote_command),
    )


def _unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(10)
        sock.connect(path)
        uid = peer_uid(sock)
        if uid not in (0, os.geteuid()):
            raise PrivilegeError(
                f"user {uid} listens there, neither you nor root", subject=path, cure="Start `tuimig receive` yourself"
            )
        sock.settimeout(None)
        enlarge(sock)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise _refused(path, error) from None
        raise
    return sock


def _refused(path: str, error: OSError) -> TuimigError:
    made: TuimigError = ConnectionLost("nobody receives there")
    made.cure = f"Start `tuimig receive --listen unix:{path}` in the destination"
    if isinstance(error, PermissionError):
        made = PrivilegeError("we may not connect to it", cure="Run as the user who receives there, or as root")
    made.subject, made.syscall, made.errno = f"unix:{path}", "connect", error.errno or 0
    return made


def enlarge(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


def peer_uid(sock: socket.socket) -> int:
    return int(UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1])


def _ignore_interrupt() -> None:
    # Ctrl-C is for us: it cancels in order, and after a hand-over the connection is needed more than ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start(command: list[str], cure: Callable[[str, int | None], str] | None = None) -> Link:
    ours, theirs = socket.socketpair()
    words: Any = tempfile.TemporaryFile()  # noqa: SIM115  closed with the link
    try:
        enlarge(ours)
        enlarge(theirs)
        process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=words,
            preexec_fn=_ignore_interrupt,
            close_fds=True,
        )
    except OSError as error:
        ours.close()
        words.close()
        raise ConnectionLost(
            f"cannot start {command[0]}",
            syscall="execve",
            errno=error.errno or 0,
            cure="Install the OpenSSH client" if command[0] == "ssh" else "",
        ) from None
    finally:
        theirs.close()
    return Link(ours, process, words, cure)


def check_command(text: str) -> str:
    try:
        if not shlex.split(text):
            raise ValueError("it is empty")
    except ValueError as error:
        raise UsageError(f"not a command: {text!r} ({error})", subject="--remote-command") from None
    return text
