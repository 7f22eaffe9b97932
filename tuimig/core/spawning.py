"""What a stub is to be when it is spawned: its id and namespaces, its scratch, its clocks, its descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuimig.core import mapping as layout
from tuimig.core import native, procfs
from tuimig.core.engine import lib
from tuimig.core.errors import RebuildFailed, UsageError
from tuimig.core.manifest import Clocks
from tuimig.core.maps import parse_maps
from tuimig.core.state.base import Call
from tuimig.core.stub import SCRATCH, Place, Spec, Stub

FIRST_HELPER: Final = 3  # lowest number for descriptors that the copy has only while it is built
_SPARE: Final = 64 << 10  # beside the scratch: room to put vdso and vvar aside
_CHOICES: Final = ("auto", "new", "host")
_CLOCKS: Final = (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The stub of the process `pid`; `ranges` is where the copy's memory lies, `tids` the ids of its threads."""

    subject: str
    pid: int
    tids: Sequence[int]
    ranges: Sequence[tuple[int, int]]
    places: Sequence[Place]
    setup: Sequence[Call]
    uffd_number: int
    lazy: bool  # it needs a userfaultfd
    offsets: dict[str, int] | None  # of its clocks, nanoseconds; None: this host's


def spawn(wanted: Wanted, choice: str) -> Stub:
    """Under the same id where it is free, else in a PID namespace of its own, as the choice allows."""
    if choice not in _CHOICES:
        raise UsageError(f"`{choice}` is no choice of --pid-namespace", cure="Choose auto, new or host")
    taken = taken_ids(wanted.tids)
    if choice == "host" and taken:
        raise RebuildFailed(
            f"process id {taken[0]} is taken here",
            subject=wanted.subject,
            cure="End the process that has it, or use `--pid-namespace new`",
        )
    if choice == "host" or (choice == "auto" and not taken):
        try:
            return Stub(_spec(wanted, -1), wanted.subject)
        except RebuildFailed as error:  # an id was taken meanwhile, or is a group's or session's
            if choice == "host" or error.syscall != "clone3":
                raise
    init_fd = open_init()
    try:
        return Stub(_spec(wanted, init_fd), wanted.subject)
    finally:
        os.close(init_fd)


def taken_ids(tids: Iterable[int]) -> list[int]:
    return [tid for tid in tids if Path(f"/proc/{tid}").exists()]


def _spec(wanted: Wanted, init_fd: int) -> Spec:
    return Spec(
        pid=wanted.pid,
        new_namespace=init_fd >= 0,
        init_fd=init_fd,
        scratch=layout.free_range(SCRATCH + _SPARE, wanted.ranges, own_ranges()),
        places=wanted.places,
        setup=wanted.setup,
        uffd_number=wanted.uffd_number,
        uffd_features=lib.tm_fill_features() if wanted.lazy else 0,
        time_offsets=_text(wanted.offsets) if wanted.offsets is not None else "",
    )


def helpers(fds: Iterable[int], placed: Iterable[int]) -> dict[int, int]:
    """Our descriptors that the copy needs while it is built -> numbers that it does not use itself."""
    numbers: dict[int, int] = {}
    taken, number = set(placed), FIRST_HELPER
    for fd in fds:
        if fd in numbers:
            continue
        while number in taken:
            number += 1
        numbers[fd] = number
        number += 1
    return numbers


def unused(used: Iterable[int]) -> int:
    taken, number = set(used), FIRST_HELPER
    while number in taken:
        number += 1
    return number


def own_ranges() -> list[tuple[int, int]]:
    return [(r.start, r.end) for r in parse_maps(Path("/proc/self/maps").read_bytes())]


def open_init() -> int:
    path = Path(native.__file__).parent / "tuimig-init"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RebuildFailed(
            "the init program for PID namespaces is missing",
            subject=str(path),
            syscall="open",
            errno=error.errno or 0,
            cure="Build it with `make build`, or use `--pid-namespace host`",
        ) from None


# ---------------------------------------------------------------- clocks


def time_offsets(clocks: Clocks) -> dict[str, int]:
    """Nanoseconds by which the copy's clocks go on from here.

    The kernel counts from the host's clocks, so what our own namespace adds is taken off.
    """
    now = clocks_with({"monotonic": 0, "boottime": 0})
    return {"monotonic": clocks.monotonic_ns - now["monotonic"], "boottime": clocks.boottime_ns - now["boottime"]}


def clocks_with(offsets: dict[str, int]) -> dict[str, int]:
    """What clocks with these offsets show now, nanoseconds."""
    ours = procfs.time_offsets("self")
    return {name: time.clock_gettime_ns(clock) - ours[name] + offsets[name] for name, clock in _CLOCKS}


def _text(offsets: dict[str, int]) -> str:
    """For timens_offsets."""
    return "".join(f"{name} {offset // 10**9} {offset % 10**9}\n" for name, offset in offsets.items())
