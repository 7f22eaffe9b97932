"""The manifest: everything about a process but its page contents, as a typed schema validated when read.

State modules keep their own sections (`Manifest.state[name]`), each decoded with the type that its module declares,
so a new kind of process state does not touch this file.
"""

from __future__ import annotations

import msgspec

from tuimig.core.model import PAGE, Decision, Kind, Plan, Region, Treatment

FORMAT = 1


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every manifest type: unknown or ill-typed fields make the file foreign or damaged."""


class Host(Strict, frozen=True):
    """Where it was captured."""

    arch: str
    page_size: int
    kernel: str
    boot_id: str
    xfeatures: int  # XCR0-style mask of the xstate images


class Clocks(Strict, frozen=True):
    """T0 on the source's clocks, nanoseconds, as the target itself reads them (its time namespace applied)."""

    realtime_ns: int
    monotonic_ns: int
    boottime_ns: int


class Process(Strict, frozen=True):
    pid: int  # the id the process knows itself by (innermost PID namespace)
    host_pid: int
    ppid: int
    pgid: int
    sid: int
    comm: str
    cmdline: list[str]
    exe: str


class RegionEntry(Strict, frozen=True):
    """One region at T0. `slot` is the byte offset of its content in `pages`, None where nothing is stored.

    The page at address `a` lies at `slot + (a - start)`. A page with sum 0 is a zero page (a hole) where `whole` is
    true; where it is false (private file mappings) it comes from the file.
    """

    start: int
    end: int
    perms: str
    offset: int
    dev: str
    inode: int
    path: str
    kind: str  # model.Kind value
    treatment: str  # model.Treatment value
    rule: str
    flags: list[str]
    slot: int | None
    whole: bool
    pages: int  # pages with stored content (not zero)
    digest: str  # blake2b-16 hex of this region's slice of the sums; "" where slot is None
    huge: bool = False  # the source had transparent huge pages here
    file_size: int = -1  # identity of the mapped file, -1 where there is none
    file_mtime_ns: int = -1

    @property
    def size(self) -> int:
        return self.end - self.start


class ThreadEntry(Strict, frozen=True):
    """One thread at T0: raw kernel images, base64 in JSON."""

    tid: int  # innermost PID namespace
    host_tid: int
    comm: str
    regs: bytes  # struct user_regs_struct, interrupted calls already set to restart
    xstate: bytes  # NT_X86_XSTATE, uncompacted xsave image
    sigmask: int
    robust_head: int
    robust_len: int
    rseq_pointer: int
    rseq_size: int
    rseq_signature: int
    rseq_flags: int
    pending: list[bytes]  # siginfo images of its private queue


class Manifest(Strict, frozen=True):
    format: int
    tuimig: str
    created: str  # ISO 8601, UTC
    host: Host
    clocks: Clocks
    process: Process
    regions: list[RegionEntry]
    threads: list[ThreadEntry]  # the leader first
    shared_pending: list[bytes]  # siginfo images of the process-wide queue
    pages_size: int  # bytes, length of `pages` (sparse)
    state: dict[str, msgspec.Raw]  # section by state module
    frozen_us: int

    def plan(self) -> Plan:
        """The regions as they were captured; `rss` is what is stored of them."""
        return Plan(tuple(Decision(_region(r), Treatment(r.treatment), r.rule, "") for r in self.regions))


class Outline(Strict, frozen=True):
    """A process before T0, as far as a place for it can be prepared: anything may be different at T0."""

    clocks: Clocks
    process: Process
    regions: list[RegionEntry]  # without a slot
    tids: list[int]  # innermost PID namespace, the leader first
    descriptors: list[int]


def _region(entry: RegionEntry) -> Region:
    return Region(
        start=entry.start,
        end=entry.end,
        perms=entry.perms,
        offset=entry.offset,
        dev=entry.dev,
        inode=entry.inode,
        path=entry.path,
        kind=Kind(entry.kind),
        rss=entry.pages * PAGE,
        flags=frozenset(entry.flags),
    )
