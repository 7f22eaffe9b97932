"""From what a freeze read to the manifest: after the thaw, while the target runs and its memory is being captured.

Whatever T0 holds that the look before it did not prepare for raises `Unsupported` with the cure to try again.
"""

from __future__ import annotations

import bisect
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from tuimig import __version__
from tuimig.core import procfs, restarted
from tuimig.core.errors import TargetGone, Unsupported
from tuimig.core.manifest import FORMAT, Clocks, Host, Manifest, Outline, Process, RegionEntry, ThreadEntry
from tuimig.core.model import PAGE, Kind, Plan, Region, Treatment
from tuimig.core.source import Source
from tuimig.core.state import KINDS
from tuimig.core.state.base import Frozen, Look, Probe

AGAIN: Final = "Try again"
APPEARED: Final = "appeared after the look"
SLEEPING: Final = "dump.sleeping"  # a note from before the freeze
XFEATURES: Final = slice(464, 472)  # where ptrace puts the feature mask in an xsave image
XSTATE_IN_USE: Final = slice(512, 520)
TILES: Final = 1 << 18
UFFD_FLAGS: Final = frozenset({"um", "uw", "ui"})  # ours, while armed


def probes(look: Look) -> list[Probe]:
    """Everything that the state modules want read inside the freeze."""
    look.notes[SLEEPING] = restarted.sleeping(look.pid, look.tids)
    return [probe for kind in KINDS for probe in kind.probes(look)]


def manifest(source: Source, look: Look, plan: Plan, pages_size: int) -> Manifest:
    """The manifest of T0, but for the regions' digests, which the snapshot's writer fills in."""
    subject = f"process {look.pid}"
    frozen = source.frozen(look)
    threads = restarted.name_calls(source.threads(), look.notes[SLEEPING])
    _check_tiles(threads, subject)
    inner = _inner_ids(look.pid, [thread.host_tid for thread in threads])
    threads = [msgspec.structs.replace(thread, tid=inner[thread.host_tid]) for thread in threads]
    known = _Known(look, plan)
    regions = [
        _region(
            entry.region,
            entry.treatment,
            entry.slot if entry.treatment is not Treatment.NONE else None,
            look.pid,
            known,
            huge=entry.huge,
        )
        for entry in source.regions()
    ]
    _, frozen_ns = source.times()
    return Manifest(
        format=FORMAT,
        tuimig=__version__,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        host=_host(threads),
        clocks=_as_the_target_reads(frozen.clocks, look.pid),
        process=_process(look.pid, inner[look.pid], threads[0].comm),
        regions=regions,
        threads=threads,
        shared_pending=source.shared_pending(),
        pages_size=pages_size,
        state=_sections(frozen, subject),
        frozen_us=frozen_ns // 1000,
    )


def _check_tiles(threads: Sequence[ThreadEntry], subject: str) -> None:
    """The kernel gives AMX tiles only to a thread that uses them by itself, so no copy can be given their content."""
    for thread in threads:
        if int.from_bytes(thread.xstate[XSTATE_IN_USE], "little") & TILES:
            raise Unsupported(f"thread {thread.host_tid} computes with AMX tiles", subject=subject, cure=AGAIN)


def outline(look: Look, plan: Plan) -> tuple[Outline, int]:
    """What is known of it while it runs, and our CLOCK_MONOTONIC when its clocks were read; it may change meanwhile."""
    pid = look.pid
    inner = _inner_ids(pid, look.tids)
    clocks = Clocks(time.time_ns(), time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    known = _Known(look, plan)
    regions = [_region(d.region, d.treatment, None, pid, known) for d in plan.decisions]
    outlined = Outline(
        clocks=_as_the_target_reads(clocks, pid),
        process=_process(pid, inner[pid], look.status.get("Name", "")),
        regions=regions,
        tids=[inner[pid], *(inner[tid] for tid in look.tids if tid != pid)],
        descriptors=sorted(look.descriptors),
    )
    return outlined, clocks.monotonic_ns


def _sections(frozen: Frozen, subject: str) -> dict[str, msgspec.Raw]:
    sections = {}
    for kind in KINDS:
        try:
            sections[kind.name] = msgspec.Raw(msgspec.json.encode(kind.dump(frozen)))
        except Unsupported as error:
            error.subject = error.subject or subject
            raise
        except ProcessLookupError as error:
            raise TargetGone("it ended during the migration", subject=subject) from error
    return sections


def _host(threads: Sequence[ThreadEntry]) -> Host:
    system = os.uname()
    return Host(
        arch=platform.machine(),
        page_size=PAGE,
        kernel=system.release,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        xfeatures=int.from_bytes(threads[0].xstate[XFEATURES], "little"),
    )


def _process(pid: int, inner: int, comm: str) -> Process:
    with procfs.about(pid):
        stat = procfs.read(pid, "stat").decode("utf-8", "replace").rpartition(")")[2].split()
        return Process(
            pid=inner,
            host_pid=pid,
            ppid=int(stat[1]),
            pgid=int(stat[2]),
            sid=int(stat[3]),
            comm=comm,
            cmdline=procfs.read_cmdline(pid),
            exe=os.readlink(f"/proc/{pid}/exe"),
        )


def _inner_ids(pid: int, tids: Sequence[int]) -> Mapping[int, int]:
    """Host thread id to the id in the innermost PID namespace."""
    with procfs.about(pid):
        levels = procfs.read_status(pid).get("NSpid", str(pid)).split()
    if len(levels) == 1:
        return {tid: tid for tid in tids}
    found = {}
    for tid in tids:
        try:
            text = Path(f"/proc/{pid}/task/{tid}/status").read_text(errors="replace")
        except OSError as error:
            raise Unsupported(
                f"thread {tid} ended before its id in the PID namespace could be read",
                subject=f"process {pid}",
                cure=AGAIN,
            ) from error
        found[tid] = int(next(line for line in text.splitlines() if line.startswith("NSpid:")).split()[-1])
    return found


def _as_the_target_reads(clocks: Clocks, pid: int) -> Clocks:
    ours, its = procfs.time_offsets("self"), procfs.time_offsets(pid)
    return Clocks(
        realtime_ns=clocks.realtime_ns,
        monotonic_ns=clocks.monotonic_ns + its["monotonic"] - ours["monotonic"],
        boottime_ns=clocks.boottime_ns + its["boottime"] - ours["boottime"],
    )


class _Known:
    """The regions of the look by address, and what the policy said of them."""

    def __init__(self, look: Look, plan: Plan) -> None:
        self._regions = sorted(look.regions, key=lambda region: region.start)
        self._ends = [region.end for region in self._regions]
        self._rules = {decision.region.start: decision.rule for decision in plan.decisions}

    def region(self, region: Region) -> Region | None:
        """The first of the same kind that overlaps it."""
        for index in range(bisect.bisect_right(self._ends, region.start), len(self._regions)):
            other = self._regions[index]
            if other.start >= region.end:
                return None
            if other.kind is region.kind:
                return other
        return None

    def rule(self, region: Region | None) -> str:
        return self._rules.get(region.start, APPEARED) if region else APPEARED


def _region(
    region: Region, treatment: Treatment, slot: int | None, pid: int, known: _Known, *, huge: bool = False
) -> RegionEntry:
    before = known.region(region)
    size, mtime = _file_identity(pid, region)
    return RegionEntry(
        start=region.start,
        end=region.end,
        perms=region.perms,
        offset=region.offset,
        dev=region.dev,
        inode=region.inode,
        path=region.path,
        kind=region.kind.value,
        treatment=treatment.value,
        rule=known.rule(before),
        flags=sorted(before.flags - UFFD_FLAGS) if before else _flags_now(pid, region),
        slot=slot,
        whole=region.kind is not Kind.FILE,
        pages=0,
        digest="",
        huge=huge,
        file_size=size,
        file_mtime_ns=mtime,
    )


def _flags_now(pid: int, region: Region) -> list[str]:
    """VmFlags of a region that appeared after the look; none where it is gone again."""
    for now in procfs.read_regions(pid):
        if now.start <= region.start < now.end and now.kind is region.kind:
            return sorted(now.flags - UFFD_FLAGS)
    return []


def _file_identity(pid: int, region: Region) -> tuple[int, int]:
    if region.kind not in (Kind.FILE, Kind.SHARED_FILE):
        return -1, -1
    try:
        status = os.stat(f"/proc/{pid}/root{region.path}")
    except OSError as error:
        raise Unsupported(
            f"its mapped file {region.path} cannot be found under its name any more",
            subject=f"process {pid}",
            syscall="stat",
            errno=error.errno or 0,
            cure=AGAIN,
        ) from error
    if status.st_ino != region.inode:
        raise Unsupported(
            f"its mapped file {region.path} was replaced by another one",
            subject=f"process {pid}",
            cure="Restart it on the new file, or put the old one back",
        )
    return status.st_size, status.st_mtime_ns
