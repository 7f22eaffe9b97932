"""What can be seen of a process from outside, before and after: nothing of ours may stay behind in it."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path

LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+)\s*(.*)$")


def merged_maps(pid: int) -> tuple[tuple[int, int, str, str], ...]:
    """(start, end, perms, path); neighbours of one kind merged, since a split by the kernel can outlive us."""
    out: list[tuple[int, int, str, str, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = LINE.match(line)
        assert match, line
        start, end, perms, offset = int(match[1], 16), int(match[2], 16), match[3], int(match[4], 16)
        path = match[7]
        if out:
            last = out[-1]
            follows = not path.startswith("/") or last[4] + (last[1] - last[0]) == offset
            if last[1] == start and last[2] == perms and last[3] == path and follows:
                out[-1] = (last[0], end, perms, path, last[4])
                continue
        out.append((start, end, perms, path, offset))
    return tuple(entry[:4] for entry in out)


def registered(pid: int) -> list[str]:
    """Regions that still belong to a userfaultfd."""
    found: list[str] = []
    region = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if LINE.match(line):
            region = line
        elif line.startswith("VmFlags:") and {"um", "uw", "ui"} & set(line.split()[1:]):
            found.append(region)
    return found


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    return dict(line.partition(":\t")[::2] for line in Path(path).read_text().splitlines())


@dataclass(frozen=True)
class Picture:
    """A quiet process from outside."""

    descriptors: dict[int, str]
    threads: frozenset[int]
    maps: tuple[tuple[int, int, str, str], ...]
    signals: dict[str, str]
    priority: tuple[int, int]
    affinity: frozenset[int]


def picture(pid: int) -> Picture:
    descriptors = {int(n): os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")}
    threads = frozenset(int(t) for t in os.listdir(f"/proc/{pid}/task"))
    lines = status(pid)
    signals = {key: lines[key].strip() for key in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Seccomp")}
    priority = (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid))
    return Picture(descriptors, threads, merged_maps(pid), signals, priority, frozenset(os.sched_getaffinity(pid)))


def undisturbed(pid: int) -> None:
    """Fails where the process is traced, stopped, or still registered."""
    for tid in sorted(int(t) for t in os.listdir(f"/proc/{pid}/task")):
        try:
            lines = status(pid, tid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        assert lines["TracerPid"].strip() == "0", f"thread {tid} is traced by {lines['TracerPid']}"
        assert lines["State"].strip()[0] not in "Tt", f"thread {tid} is {lines['State']}"
    assert registered(pid) == []


def settled(pid: int, before: Picture) -> None:
    """As it was, once its threads have had a CPU: what was under way in them when we died ends by itself."""
    until = time.monotonic() + 5
    while (now := picture(pid)) != before and time.monotonic() < until:
        time.sleep(0.001)
    changed = {
        field.name: (getattr(before, field.name), getattr(now, field.name))
        for field in fields(Picture)
        if getattr(before, field.name) != getattr(now, field.name)
    }
    assert not changed, f"before and now: {changed}"
