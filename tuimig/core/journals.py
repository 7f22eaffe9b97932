"""The journals that moves have left on this host: read, explained, removed.

Whoever writes a journal holds a lock on it: where there is none, its move is over, however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuimig.core import journal, procfs
from tuimig.core.errors import TuimigError, UsageError

MOST_BYTES: Final = 1 << 20
OPEN: Final = ("handing-over", "running-there", "doubt", "filled")  # a source that is stopped then stays so
STOPPED: Final = ("T", "t")


@dataclass(frozen=True, slots=True)
class Kept:
    """One journal. `state` is its last word; `process`: running, stopped, gone, or unknown where it names none.

    `moving`: its move still runs. `todo`: one line for the person.
    """

    session: str
    role: str  # source | destination
    state: str
    pid: int
    command: str
    destination: str
    process: str
    moving: bool
    age_s: float
    path: Path
    todo: str

    @property
    def undecided(self) -> bool:
        """The source is stopped, and whether it may run again depends on the other side."""
        return self.role == "source" and self.process == "stopped" and self.state in OPEN


def kept() -> list[Kept]:
    """All of this user's, the oldest first."""
    found = [one for place in journal.places() for path in _files(place) if (one := _read(path)) is not None]
    return sorted(found, key=lambda one: -one.age_s)


def stops(pid: int) -> Kept | None:
    """The journal of the move that has left this process stopped, where there is one."""
    return next((one for one in kept() if one.pid == pid and one.undecided and not one.moving), None)


def clear(session: str, *, accepted: bool) -> list[Kept]:
    """Remove what a session has left. UsageError where there is nothing, or it is still needed."""
    found = [one for one in kept() if one.session == session]
    if not found:
        raise UsageError("no move of that session has left a journal", subject=session, cure="See tuimig journals")
    for one in found:
        if one.moving:
            raise UsageError("its move still runs", subject=str(one.path), cure="Wait until it is over, or cancel it")
        if one.undecided and not accepted:
            raise UsageError(
                f"process {one.pid} is stopped, and this is all that says why",
                subject=str(one.path),
                cure=f"{one.todo}. Or say --yes",
            )
    for one in found:
        one.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are in it
            one.path.parent.rmdir()
    return found


def _files(place: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        if place.lstat().st_uid == os.geteuid():
            yield from place.glob("move-*.json")


def _read(path: Path) -> Kept | None:
    """None for what is no journal, or has just gone."""
    session, _, role = path.stem.removeprefix("move-").partition("-")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            moving = _locked(file.fileno())
            about = _about(file.read(MOST_BYTES))
            age_s = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
    except OSError:
        return None
    if role not in ("source", "destination"):
        return None
    pid = about.get("pid") if isinstance(about.get("pid"), int) else 0
    state, to = str(about.get("state", "")), str(about.get("to", ""))
    process = _process(pid or 0, about.get("started"))
    command = str(about.get("command") or about.get("comm") or "")
    todo = "nothing: its move still runs" if moving else _todo(role, state, process, pid or 0, to)
    return Kept(session, role, state, pid or 0, command, to, process, moving, age_s, path, todo)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _about(data: bytes) -> dict[str, Any]:
    """What all its lines say, the last one last. One that a crash has cut is passed over."""
    about: dict[str, Any] = {}
    for line in data.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(said := json.loads(line), dict):
                about |= said
    return about


def _process(pid: int, started: Any) -> str:
    if not pid:
        return "unknown"
    try:
        if procfs.start_time(pid) != started:
            return "gone"
        return "stopped" if procfs.read_status(pid).get("State", "?")[:1] in STOPPED else "running"
    except TuimigError:
        return "gone"


def _todo(role: str, state: str, process: str, pid: int, to: str) -> str:
    if role == "destination":
        return _todo_there(state, process, pid)
    if process == "gone":
        return "the source is gone: clear it"
    if state == "frozen" or process == "running":
        return "the source runs: clear it"
    if state == "filled":
        return f"the copy has every page: kill -9 {pid}"
    return (
        f"see `tuimig journals` at {to or 'the destination'}: none or `built`: kill -CONT {pid}; `filled`: kill -9 "
        f"{pid}; `running`: docs/moving.md"
    )


def _todo_there(state: str, process: str, pid: int) -> str:
    if state == "built":
        return "the copy never ran: kill -CONT the source, clear it"
    if state == "filled":
        return "the copy has every page: kill -9 the source, clear it"
    if process == "gone":
        return "the copy ran without all its pages and is gone: docs/moving.md, before the source goes on"
    copy = f"the copy, process {pid}," if pid else "the copy"
    return f"{copy} ran without all its pages: keep one of the two, docs/moving.md"
