"""What the kernel tells about a process: `/proc/PID`, pidfd, kcmp. Nothing here stops or changes the process.

A process that is gone raises TargetGone, one we may not look at PrivilegeError; both name the process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import psutil

from tuimig.core.errors import PrivilegeError, TargetGone
from tuimig.core.maps import DELETED, parse_maps
from tuimig.core.model import Kind, Options, Region
from tuimig.core.rawcall import KCMP_FILE, kcmp, pidfd_getfd
from tuimig.core.state.base import Descriptor, Look

PID_MOST: Final = 1 << 22
PF_EXITING: Final = 0x4  # of the flags in stat
PTRACE_CURE: Final = "Run as root or as the owner of the process, with CAP_SYS_PTRACE where `tuimig check` asks for it"


@contextlib.contextmanager
def about(pid: int, syscall: str = "") -> Iterator[None]:
    """Turns the errors of looking at a process into ours."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone("the process is gone", subject=f"process {pid}") from error
    except PermissionError as error:
        raise PrivilegeError(
            "may not look into the process",
            subject=f"process {pid}",
            syscall=syscall or str(error.filename or ""),
            errno=error.errno or errno.EPERM,
            cure=PTRACE_CURE,
        ) from error


def read(pid: int, name: str) -> bytes:
    """A file of /proc/PID, whole."""
    with about(pid), open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def read_status(pid: int) -> dict[str, str]:
    """`/proc/PID/status` by key."""
    pairs = (line.partition(":") for line in read(pid, "status").decode("utf-8", "surrogateescape").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def start_time(pid: int) -> int:
    """When it started, clock ticks after boot: with the id, its identity until the next boot."""
    # The command's name stands in brackets and may itself hold spaces and brackets.
    return int(read(pid, "stat").rpartition(b")")[2].split()[19])


def thread_exiting(pid: int, tid: int) -> bool:
    """Whether a thread has ended or is ending: the kernel marks it before it lets go of what the thread has."""
    try:
        return bool(int(read(pid, f"task/{tid}/stat").rpartition(b")")[2].split()[6]) & PF_EXITING)
    except TargetGone:
        return True


def read_tids(pid: int) -> list[int]:
    """Its threads, the leader first."""
    with about(pid):
        tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    if pid in tids:
        tids.remove(pid)
        tids.insert(0, pid)
    return tids


def read_cmdline(pid: int) -> list[str]:
    """Its arguments as they stand in its memory now."""
    text = os.fsdecode(read(pid, "cmdline"))
    return text.removesuffix("\0").split("\0") if text else []


def read_regions(pid: int, with_figures: bool = True) -> list[Region]:
    """Its regions in address order. With figures (from smaps) the kernel walks its page tables: 1 ms per GB and up."""
    regions = parse_maps(read(pid, "smaps" if with_figures else "maps"))
    if not regions and b"VmSize" not in read(pid, "status"):
        return []
    return [_settle(pid, region) if region.path.endswith(DELETED) else region for region in regions]


def _settle(pid: int, region: Region) -> Region:
    """A file whose own name ends in ` (deleted)` is not a deleted file: the inode at that path tells."""
    if region.kind not in (Kind.DELETED, Kind.SHARED_ANON) or not region.path.startswith("/"):
        return region
    try:
        found = os.stat(f"/proc/{pid}/root{region.path}")
    except OSError:
        return region
    if found.st_ino != region.inode or f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}" != region.dev:
        return region
    kind = Kind.SHARED_FILE if region.shared else Kind.FILE
    return Region(**{name: getattr(region, name) for name in Region.__slots__} | {"kind": kind})


# ---------------------------------------------------------------- identity


@dataclass(slots=True)
class Identity:
    """Pins one process: whatever is done later is done to this one, or raises TargetGone. Owns the pidfd."""

    pid: int
    started: int  # clock ticks after boot
    pidfd: int

    @classmethod
    def pin(cls, pid: int) -> Self:
        if not 0 < pid <= PID_MOST:
            raise TargetGone("no such process", subject=f"process {pid}")
        with about(pid, "pidfd_open"):
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                # The id of a thread that leads no process: EINVAL, from Linux 6.16 on ENOENT.
                if error.errno in (errno.EINVAL, errno.ENOENT) and os.path.exists(f"/proc/{pid}"):
                    what = f"not a process but a thread of {read_status(pid)['Tgid']}"
                    raise TargetGone(what, subject=f"process {pid}") from error
                raise
        try:
            return cls(pid, start_time(pid), pidfd)
        except BaseException:
            os.close(pidfd)
            raise

    def alive(self) -> bool:
        """Whether it still runs. The pidfd becomes readable when it ends, whoever has its id then."""
        return not select.select([self.pidfd], [], [], 0)[0]

    def check(self) -> None:
        if not self.alive() or start_time(self.pid) != self.started:
            raise TargetGone("the process ended", subject=f"process {self.pid}")

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# ---------------------------------------------------------------- descriptors


def read_descriptors(pid: int) -> dict[int, Descriptor]:
    """Its open descriptors by number. One that is closed while we look is left out."""
    links: dict[int, tuple[str, str]] = {}
    with about(pid):
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        for number in numbers:
            try:
                link = os.readlink(f"/proc/{pid}/fd/{number}")
                with open(f"/proc/{pid}/fdinfo/{number}", encoding="utf-8", errors="surrogateescape") as file:
                    links[number] = (link, file.read())
            except FileNotFoundError:
                if not os.path.exists(f"/proc/{pid}"):
                    raise
    same = _same_descriptions(pid, links)
    return {number: Descriptor(number, link, info, same[number]) for number, (link, info) in links.items()}


def _same_descriptions(pid: int, links: Mapping[int, tuple[str, str]]) -> dict[int, int]:
    """For each descriptor the lowest one with the same open file description.

    Only those with the same link can share one. Among them kcmp gives an order, so that sorting finds the equal ones
    with few calls.
    """
    by_link: dict[str, list[int]] = {}
    for number, (link, _) in links.items():
        by_link.setdefault(link, []).append(number)
    lowest = {number: number for number in links}
    gone: set[int] = set()

    def compare(left: int, right: int) -> int:
        try:
            return (0, -1, 1, left - right)[kcmp(pid, pid, KCMP_FILE, left, right)]
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            gone.update((left, right))  # closed meanwhile: leave it on its own, the freeze looks again
            return -1

    with about(pid, "kcmp"):
        for numbers in by_link.values():
            if len(numbers) < 2:
                continue
            ordered = sorted(numbers, key=functools.cmp_to_key(compare))
            for previous, number in itertools.pairwise(ordered):
                if number not in gone and previous not in gone and compare(previous, number) == 0:
                    lowest[number] = lowest[previous]  # the sort is stable: equal ones stay in order of number
    return lowest


class Duplicates:
    """Our own descriptors of the target's open files: taken when first asked for, closed together."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._held: dict[int, int] = {}

    def __call__(self, number: int) -> int:
        """Raises OSError where the target has no such descriptor any more, PrivilegeError where we may not."""
        if number not in self._held:
            try:
                self._held[number] = pidfd_getfd(self._pidfd, number)
            except PermissionError as error:
                raise PrivilegeError(
                    f"may not take descriptor {number}",
                    subject=f"process {self._pid}",
                    syscall="pidfd_getfd",
                    errno=error.errno or errno.EPERM,
                    cure=PTRACE_CURE,
                ) from error
        return self._held[number]

    def close(self) -> None:
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()


# ---------------------------------------------------------------- the look


def _no_descriptor(number: int) -> int:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@dataclass(slots=True)
class LiveLook(Look):
    """A look that owns its pidfd and duplicates; close it, or use it in a `with`."""

    identity: Identity = field(default_factory=lambda: Identity(-1, 0, -1))
    release: Callable[[], None] = lambda: None  # closes the duplicates: while we hold an end, its peer sees no EOF
    closers: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        while self.closers:
            self.closers.pop()()
        self.duplicate = _no_descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def look(pid: int, options: Options) -> LiveLook:
    """Everything that can be seen of the target while it runs. Raises TargetGone, PrivilegeError."""
    identity = Identity.pin(pid)
    duplicates = Duplicates(pid, identity.pidfd)
    try:
        status = read_status(pid)
        if status.get("State", "").startswith("Z"):
            raise TargetGone("the process has ended; its parent has not taken notice yet", subject=f"process {pid}")
        if options.started not in (None, identity.started):
            raise TargetGone("the process that was chosen has ended; another one has its id", subject=f"process {pid}")
        seen = LiveLook(
            pid=pid,
            pidfd=identity.pidfd,
            options=options,
            status=status,
            regions=read_regions(pid),
            tids=read_tids(pid),
            descriptors=read_descriptors(pid),
            duplicate=duplicates,
            identity=identity,
            release=duplicates.close,
            closers=[identity.close, duplicates.close],
        )
        identity.check()
        return seen
    except BaseException:
        duplicates.close()
        identity.close()
        raise


# ---------------------------------------------------------------- all processes


@dataclass(frozen=True, slots=True)
class ProcessLine:
    """One process as a list shows it. `rss`, `size` bytes; `readable`: we may look into its memory."""

    pid: int
    user: str
    command: str
    threads: int
    rss: int
    size: int
    cpu_seconds: float
    started: float  # seconds since 1970
    kernel: bool
    traced: bool
    readable: bool
    state: str = "S"  # the kernel's letter
    parent: int = 0
    ticks: int = 0  # start time in clock ticks: with the id, its identity


def processes() -> list[ProcessLine]:
    """All processes in order of their ids; one that ends meanwhile is left out."""
    lines: list[ProcessLine] = []
    names = ["pid", "username", "cmdline", "name", "num_threads", "memory_info", "cpu_times", "create_time"]
    for process in psutil.process_iter(names, ad_value=None):
        info = process.info
        try:
            status = read_status(process.pid)
            ticks = start_time(process.pid)
        except (TargetGone, PrivilegeError):
            continue
        if status.get("State", "").startswith("Z"):
            continue
        memory, cpu = info["memory_info"], info["cpu_times"]
        lines.append(
            ProcessLine(
                pid=process.pid,
                user=info["username"] or "",
                command=" ".join(info["cmdline"] or []) or f"[{info['name']}]",
                threads=info["num_threads"] or 0,
                rss=memory.rss if memory else 0,
                size=memory.vms if memory else 0,
                cpu_seconds=(cpu.user + cpu.system) if cpu else 0.0,
                started=info["create_time"] or time.time(),
                kernel="VmSize" not in status,
                traced=status.get("TracerPid", "0") != "0",
                readable=_readable(process.pid),
                state=status.get("State", "?")[:1],
                parent=int(status.get("PPid", 0)),
                ticks=ticks,
            )
        )
    return lines


def _readable(pid: int) -> bool:
    """Opening `mem` asks for the permission that ptrace needs."""
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def time_offsets(pid: int | str) -> dict[str, int]:
    """Offsets of a process's time namespace, nanoseconds; all zero where the kernel has none."""
    offsets = {"monotonic": 0, "boottime": 0}
    try:
        with open(f"/proc/{pid}/timens_offsets", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return offsets
    for line in lines:
        name, seconds, nanoseconds = line.split()
        offsets[name] = int(seconds) * 10**9 + int(nanoseconds)
    return offsets
