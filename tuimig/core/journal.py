"""The journal of a move, one file a side: what this side knows of the hand-over, on the disk before it acts on it.

A line of JSON a step. The file goes when the move is over and no doubt is left; after a failure it stays, and the error
names it. docs/moving.md says what to do in each case.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tuimig.core.errors import PrivilegeError

MOST_COMMAND: Final = 400  # characters of a command line


def places() -> list[Path]:
    """Where such files may be, the one for new ones first: a login and a service need not have the same."""
    found = []
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():
        found.append(Path(base) / "tuimig")
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        found.append(Path("/run/tuimig"))
    return [*found, Path(tempfile.gettempdir()) / f"tuimig-{os.geteuid()}"]


def directory() -> Path:
    """Where sessions keep what outlives them for a while: XDG_RUNTIME_DIR, or /run, else the temporary directory."""
    path = places()[0]
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise PrivilegeError(
            "cannot keep a session's files there",
            subject=str(path),
            syscall="mkdir",
            errno=error.errno or 0,
            cure="Set XDG_RUNTIME_DIR to a directory of yours",
        ) from None
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        raise PrivilegeError(
            "it is not a directory of yours alone", subject=str(path), cure="Set XDG_RUNTIME_DIR to one that is"
        )
    return path


class Journal:
    """`role` is source or destination."""

    def __init__(self, session: str, role: str, **about: Any) -> None:
        self.path = directory() / f"move-{session[:12]}-{role}.json"
        self.state = ""
        self._about = {"role": role, **about}
        self._fd = -1  # no file before there is something to say

    def write(self, state: str, **more: Any) -> None:
        """On the disk when it returns."""
        self.state = state
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as the move runs
        line = {"state": state, "time": time.time(), **self._about, **more}
        os.write(self._fd, json.dumps(line).encode() + b"\n")
        os.fsync(self._fd)

    def close(self, *, keep: bool) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not keep:
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                with contextlib.suppress(OSError):  # others are in it
                    self.path.parent.rmdir()
