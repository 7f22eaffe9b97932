"""Whether a manifest makes sense: everything the type alone does not say, checked before anything trusts it.

A manifest is untrusted input. `fault` names the first thing that is wrong, region or thread included; it never raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from tuimig.core.manifest import FORMAT, Manifest, Outline, Process, RegionEntry, ThreadEntry
from tuimig.core.model import PAGE, Kind, Treatment

USER_END: Final = (1 << 56) - PAGE  # five-level page tables; with four levels mmap refuses the rest
VSYSCALL: Final = (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)  # the one mapping above user space
PID_LIMIT: Final = 1 << 22
PAGES_LIMIT: Final = 1 << 47
REGION_LIMIT: Final = 1 << 20
THREAD_LIMIT: Final = 1 << 17
DESCRIPTOR_LIMIT: Final = 1 << 30
REGS_SIZE: Final = 27 * 8  # struct user_regs_struct
XSTATE_SIZES: Final = range(512 + 64, 64 << 10)  # legacy area and header, up to AMX and beyond
SIGINFO_SIZE: Final = 128
WORD: Final = 1 << 64

_PERMS = re.compile(r"[r-][w-][x-][ps]")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_DEVICE = re.compile(r"[0-9a-f]+:[0-9a-f]+")
_KINDS = frozenset(kind.value for kind in Kind)
_TREATMENTS = frozenset(treatment.value for treatment in Treatment)


def fault(manifest: Manifest) -> str | None:
    """A clause that says what is wrong with it, None where nothing is."""
    return next(_faults(manifest), None)


def outline_fault(outline: Outline) -> str | None:
    """The same of an outline."""
    return next(_outline_faults(outline), None)


def slots(regions: Sequence[RegionEntry]) -> list[tuple[int, int, int]]:
    """(start, end, index into `regions`) of the places in `pages`, in their order there."""
    return sorted((r.slot, r.slot + r.size, i) for i, r in enumerate(regions) if r.slot is not None)


def label(region: RegionEntry) -> str:
    """What a person calls it."""
    return f"region {region.start:x}-{region.end:x} {region.perms} {region.path or 'anon'}"


def _faults(m: Manifest) -> Iterator[str]:
    if m.format != FORMAT:
        yield f"it has format {m.format}, this version reads format {FORMAT}"
    if m.host.arch != "x86_64" or m.host.page_size != PAGE:
        yield f"it is of a host with {m.host.arch} and pages of {m.host.page_size} bytes, not x86_64 and {PAGE}"
    try:
        datetime.fromisoformat(m.created)
    except ValueError:
        yield f"its date {m.created[:40]!r} is none"
    if m.pages_size % PAGE or not 0 <= m.pages_size <= PAGES_LIMIT:
        yield f"its pages have an impossible size, {m.pages_size} bytes"
    if min(m.frozen_us, m.clocks.monotonic_ns, m.clocks.boottime_ns, m.clocks.realtime_ns) < 0:
        yield "one of its times is negative"
    if max(m.frozen_us, m.clocks.monotonic_ns, m.clocks.boottime_ns, m.clocks.realtime_ns) >= WORD // 2:
        yield "one of its times is out of range"
    if not 0 <= m.host.xfeatures < WORD:
        yield "its processor features are out of range"
    yield from _process(m.process)
    yield from _regions(m.regions, m.pages_size)
    yield from _threads(m)


def _outline_faults(o: Outline) -> Iterator[str]:
    times = (o.clocks.monotonic_ns, o.clocks.boottime_ns, o.clocks.realtime_ns)
    if not all(0 <= time < WORD // 2 for time in times):
        yield "one of its times is out of range"
    yield from _process(o.process)
    yield from _regions(o.regions, 0)
    if not 0 < len(o.tids) <= THREAD_LIMIT or o.tids[0] != o.process.pid:
        yield "its first thread does not lead it"
    if not all(0 < tid <= PID_LIMIT for tid in o.tids):
        yield "a thread id is impossible"
    if not all(0 <= number < DESCRIPTOR_LIMIT for number in o.descriptors):
        yield "a descriptor is impossible"


def _process(p: Process) -> Iterator[str]:
    if not (0 < p.pid <= PID_LIMIT and 0 < p.host_pid <= PID_LIMIT):
        yield f"process id {p.pid} is impossible"
    if not all(0 <= i <= PID_LIMIT for i in (p.ppid, p.pgid, p.sid)):
        yield "a parent, group or session id is impossible"
    if any("\0" in text for text in (p.comm, p.exe, *p.cmdline)):
        yield "the command line holds a NUL"


def _regions(regions: Sequence[RegionEntry], pages_size: int) -> Iterator[str]:
    if len(regions) > REGION_LIMIT:
        yield f"{len(regions)} regions are more than a process can have"
    end = 0
    for r in regions:
        for clause in _region(r, pages_size):
            yield f"{label(r)}: {clause}"
        if r.start < end:
            yield f"{label(r)}: it overlaps the region before it, or is out of order"
        end = r.end
    place = 0
    for start, stop, index in slots(regions):
        if start < place:
            yield f"{label(regions[index])}: its place in the pages overlaps another region's"
        place = stop


def _region(r: RegionEntry, pages_size: int) -> Iterator[str]:
    if r.start % PAGE or r.end % PAGE or r.start >= r.end or r.start < 0:
        yield "it does not begin and end on page boundaries"
    if r.end > USER_END and (r.start, r.end) != VSYSCALL:
        yield "it lies outside of user space"
    if not _PERMS.fullmatch(r.perms):
        yield "its permissions are unknown"
    if r.kind not in _KINDS:
        yield f"its kind {r.kind[:40]!r} is unknown"
    if r.treatment not in _TREATMENTS:
        yield f"its treatment {r.treatment[:40]!r} is unknown"
    if r.offset < 0 or r.offset + r.size > WORD // 2 or r.offset % PAGE:
        yield f"its file offset {r.offset} is impossible"
    if not _DEVICE.fullmatch(r.dev) or not 0 <= r.inode < WORD or not -1 <= r.file_size < WORD // 2:
        yield "the identity of its file is impossible"
    if "\0" in r.path or any(len(flag) != 2 for flag in r.flags):
        yield "its path or its flags are impossible"
    if r.slot is None:
        if r.pages or r.digest:
            yield "it has no place in the pages, but content"
        return
    if r.treatment == Treatment.NONE.value:
        yield "it has a place in the pages, but its content is not ours"
    if r.slot < 0 or r.slot % PAGE or r.slot + r.size > pages_size:
        yield "its place lies outside of the pages"
    if not 0 <= r.pages <= r.size // PAGE:
        yield f"it cannot have {r.pages} stored pages"
    if not _DIGEST.fullmatch(r.digest):
        yield "its digest is none"


def _threads(m: Manifest) -> Iterator[str]:
    if not 0 < len(m.threads) <= THREAD_LIMIT:
        yield f"a process cannot have {len(m.threads)} threads"
    seen: set[int] = set()
    for t in m.threads:
        for clause in _thread(t):
            yield f"thread {t.tid}: {clause}"
        if t.tid in seen:
            yield f"thread {t.tid}: there are two of this id"
        seen.add(t.tid)
    if m.threads[0].tid != m.process.pid:
        yield f"thread {m.threads[0].tid} is first, but does not lead process {m.process.pid}"
    if any(len(info) != SIGINFO_SIZE for info in m.shared_pending):
        yield "a queued signal has the wrong size"


def _thread(t: ThreadEntry) -> Iterator[str]:
    if not (0 < t.tid <= PID_LIMIT and 0 < t.host_tid <= PID_LIMIT):
        yield "its id is impossible"
    if len(t.regs) != REGS_SIZE:
        yield f"its registers are {len(t.regs)} bytes, not {REGS_SIZE}"
    if len(t.xstate) not in XSTATE_SIZES or len(t.xstate) % 8:
        yield f"its extended state has an impossible size, {len(t.xstate)} bytes"
    if "\0" in t.comm:
        yield "its name holds a NUL"
    words = (t.sigmask, t.robust_head, t.robust_len, t.rseq_pointer, t.rseq_size, t.rseq_signature, t.rseq_flags)
    if not all(0 <= word < WORD for word in words):
        yield "one of its addresses or masks is out of range"
    if any(len(info) != SIGINFO_SIZE for info in t.pending):
        yield "a queued signal has the wrong size"
