"""The nouns that everything shares: immutable, typed, without behaviour that needs the system.

Sizes are bytes, addresses absolute virtual addresses, times monotonic nanoseconds unless a name says otherwise.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

PAGE = 4096


class Kind(enum.Enum):
    """What a region is; decides what can be done with it (design, section 3)."""

    HEAP = "heap"  # [heap], private anonymous
    STACK = "stack"  # [stack], grows down
    ANON = "anon"  # private anonymous
    FILE = "file"  # private mapping of a file: only its changed (anonymous) pages are content
    DELETED = "deleted"  # private mapping of a file that is gone: every page is content
    SHARED_ANON = "shared-anon"  # MAP_SHARED without a name, memfd: content, read through the mapping
    SHARED_FILE = "shared-file"  # MAP_SHARED of a file: the file is the content
    KERNEL = "kernel"  # vdso, vvar, vvar_vclock, vsyscall: provided by the kernel
    DEVICE = "device"  # a device, SysV shm, hugetlb, anything else: cannot be migrated


class Treatment(enum.Enum):
    """What is done with a region's content."""

    EAGER = "eager"  # copied while the process is stopped
    PROTECTED = "protected"  # write-protected at T0, captured while the process runs
    NONE = "none"  # nothing to copy: a file or the kernel provides the content


@dataclass(frozen=True, slots=True)
class Region:
    """One VMA: a line of `/proc/PID/maps`, with smaps' figures (bytes) where they were read.

    `flags` are smaps' VmFlags two-letter words; `perms` as in maps (`rw-p`).
    """

    start: int
    end: int
    perms: str
    offset: int
    dev: str
    inode: int
    path: str
    kind: Kind
    rss: int = 0
    swap: int = 0
    anonymous: int = 0
    huge: int = 0  # AnonHugePages
    flags: frozenset[str] = frozenset()
    pkey: int = 0  # memory protection key

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def name(self) -> str:
        """What a person calls it: the path, `[heap]`, or `anon`."""
        return self.path or "anon"

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.perms} {self.name}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The policy's word on one region: the treatment, the rule that decided, and why in a clause."""

    region: Region
    treatment: Treatment
    rule: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done: one decision a region, in address order."""

    decisions: tuple[Decision, ...]

    def bytes(self, treatment: Treatment) -> int:
        return sum(d.region.size for d in self.decisions if d.treatment is treatment)


@dataclass(frozen=True, slots=True)
class PortMap:
    """`--map-port OLD:NEW`."""

    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one migration (design, section 5). The policy is not here: it made the Plan."""

    guard: str = "auto"  # auto | on | off
    verify: bool = False
    map_ports: tuple[PortMap, ...] = ()
    map_paths: tuple[tuple[str, str], ...] = ()  # unix socket path OLD -> NEW
    pid_namespace: str = "auto"  # auto | new | host
    tcp: str = "refuse"  # close | refuse
    stdio: str = "null"  # null | inherit | a file's path
    full: bool = False  # restore all pages before the copy runs
    yes: bool = False  # accept obstacles that ask
    precopy: str = "auto"  # auto | off | a number of rounds
    track: str = "auto"  # auto | async: how writes are followed before T0
    max_slowdown: float = 25.0  # percent of the target's time that pre-copy's faults may cost
    freeze_budget_ms: float | None = None  # most time for what is copied inside the freeze; None: 5
    on_loss: str = "kill"  # kill | poison: what becomes of a copy whose source is gone before all its pages came
    reconnect_s: float = 60.0  # a lost connection is tried again for that long
    streams: int = 1  # connections for pages
    compress: str = "none"  # none | lz4 | zstd
    bandwidth: int = 0  # most bytes a second for pages, 0: no limit
    remote_command: str = "tuimig"  # over ssh
    started: int | None = None  # start time of the process that was chosen: another one under its id is refused


class FaultKind(enum.IntEnum):
    """Kinds of fault records; values are the native engine's."""

    WP = 1  # the target wrote to a protected page
    MISSING = 2  # the copy touched a page that was not there


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault record. `time_ns` monotonic; `latency_ns`: message read to thread woken, as the server saw it.

    Records come in the order in which the faults were served, that of time + latency.
    """

    time_ns: int
    tid: int
    address: int
    region: int  # index into the manifest's regions, -1 where none
    kind: FaultKind
    latency_ns: int
    pages: int  # pages served by it


@dataclass(frozen=True, slots=True)
class FaultTimes:
    """Service time of faults, microseconds."""

    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A picture of the counters at one moment (pages of 4 KiB)."""

    phase: str  # look connect attach precopy freeze capture send commit restore fill done
    pages_total: int = 0
    pages_done: int = 0
    wp_faults: int = 0
    demand_faults: int = 0
    swept_pages: int = 0
    zero_pages: int = 0
    guard_stops: int = 0
    faults_dropped: int = 0
    side: str = "source"  # destination: the other side's figures of a clone or move across hosts
    arrived_pages: int = 0  # destination: in its spool
    sent_pages: int = 0  # source: given to the streams at least once
    stream_bytes: tuple[int, ...] = ()  # source: on the wire, by stream; the first one is the demand stream
    round_trip_us: FaultTimes | None = None  # destination: demands, from asked to arrived
    demand_us: FaultTimes | None = None  # destination: service time of demand faults


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection to a destination changed. `state`: connecting, connected, lost (`left_s`: until it is given up,
    said again every second while it is tried) or given-up. `text`: why.
    """

    state: str
    destination: str
    left_s: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Handover:
    """Where the two sides of a move are, as this side knows it.

    `source`: frozen, stopped (it will not run again by itself), runs (thawed after a failure), ended.
    `destination`: building, built, told (to run; not confirmed yet), running, filled, failed, unknown.
    """

    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class Round:
    """One round of pre-copy: what was written while the one before went on is copied, and protected again.

    In round 0 `dirty_pages` is all that is populated. `since_us`: from the begin of the last round to this one's, in
    which those pages were dirtied.
    """

    number: int
    dirty_pages: int
    copied_pages: int
    hot_pages: int  # dirty in every round: left to the end
    zero_pages: int
    since_us: int
    duration_us: int
    scan_us: int

    @property
    def dirty_per_second(self) -> float:
        return self.dirty_pages * 1e6 / self.since_us if self.number and self.since_us else 0.0


@dataclass(frozen=True, slots=True)
class Precopy:
    """How pre-copy went.

    `ended`: freeze (what was dirty was copied inside it: no window, no fault after T0) | window | off.
    """

    tracking: str  # async | none
    rounds: tuple[Round, ...]
    ended: str
    why: str
    valid_pages: int = 0  # copied before T0 and not changed since
    dirty_pages: int = 0  # copied inside the freeze
    window_bytes: int = 0  # regions that were left to the window
    stops: int = 0  # short stops outside of the freeze: to register, to unregister
    stops_us: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints. Fields are a contract: extend, never rename. None: not part of this verb."""

    verb: str
    pid: int
    regions: int
    bytes: int  # content captured or restored
    total_us: int
    frozen_us: int | None = None
    frozen: Mapping[str, int] = field(default_factory=dict)  # parts by name, us
    wp_faults: int = 0
    demand_faults: int = 0
    fault_us: FaultTimes = FaultTimes()
    swept_pages: int = 0
    zero_pages: int = 0
    guard_stops: int = 0
    guard: str = "off"  # the form that the successful attempt had: optimistic | guarded
    attempts: int = 1
    eager_bytes: int = 0
    protected_bytes: int = 0
    verified_pages: int | None = None
    directory: str | None = None
    new_pid: int | None = None  # as seen from where the command ran
    inner_pid: int | None = None  # inside its PID namespace
    init_pid: int | None = None  # our minimal init of that namespace
    new_started: int | None = None  # start time of the copy, clock ticks after boot: pins new_pid
    downtime_us: int | None = None
    fill_us: int | None = None
    faults_dropped: int = 0
    destination: str | None = None  # of a clone or move across hosts; the ids below are as seen there then
    bytes_sent: int | None = None  # on the wire
    precopy_sent: int = 0  # of them, before T0
    skeleton: bool = False  # the copy's memory was laid out there before T0
    stream_bytes: tuple[int, ...] = ()  # of them, by stream; the first one is the demand stream
    packed_bytes: int = 0  # compressed payload
    unpacked_bytes: int = 0  # the same before compression
    round_trip_us: FaultTimes | None = None  # demands: asked to arrived
    reconnects: int = 0
    warnings: tuple[str, ...] = ()
    precopy: Precopy | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase begins. `name` as in Progress.phase, `side` likewise."""

    name: str
    time_ns: int
    side: str = "source"


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person: a retry, a warning."""

    text: str


RECORD: Final = struct.Struct("=QQIiiHH")  # struct tm_fault of native/ring.h


@dataclass(frozen=True, slots=True)
class Faults:
    """A batch of fault records, in order of time, as the engine wrote them; decoded when somebody looks.

    At 50,000 faults a second an object for each would cost more than serving them.
    """

    records: bytes

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> Self:
        return cls(b"".join(encode_fault(fault) for fault in faults))

    def __len__(self) -> int:
        return len(self.records) // RECORD.size

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(decode_faults(self.records))


def encode_fault(fault: Fault) -> bytes:
    f = fault
    return RECORD.pack(f.time_ns, f.address, f.latency_ns, f.tid, f.region, f.pages, f.kind)


def decode_faults(records: bytes | memoryview) -> Iterator[Fault]:
    for time_ns, address, latency_ns, tid, region, pages, kind in RECORD.iter_unpack(records):
        yield Fault(time_ns, tid, address, region, FaultKind(kind), latency_ns, pages)


@dataclass(frozen=True, slots=True)
class Planned:
    """What is about to be done: to whom, and the treatment of each region. Said again where it changes."""

    verb: str
    pid: int
    command: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class Histogram:
    """Service times of faults: `buckets[i]` counts latencies in [2^i, 2^(i+1)) nanoseconds."""

    buckets: tuple[int, ...] = ()
    most_ns: int = 0

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def quantile(self, part: float) -> float:
        """Microseconds. Within a bucket values are taken to lie evenly."""
        left = part * self.count
        for power, inside in enumerate(self.buckets):
            if inside and left <= inside:
                return min(self.most_ns, (1 << power) * (1 + left / inside)) / 1000
            left -= inside
        return self.most_ns / 1000

    @property
    def times(self) -> FaultTimes:
        if not self.count:
            return FaultTimes()
        return FaultTimes(
            p50=round(self.quantile(0.5), 1), p99=round(self.quantile(0.99), 1), max=round(self.most_ns / 1000, 1)
        )


@dataclass(frozen=True, slots=True)
class Detail:
    """What a console draws besides the counters; said only where a session is asked to (`Session(detail=True)`).

    `side` is source or copy. `cells`: for each cell of `core.strip.layout` the pages with content, those done and
    those of them that are zero. By region of the source at T0: `starts` are their addresses, `region_pages` the pages
    that are captured after T0, `region_done` how many of them were, `region_faults` the faults. Empty where this side
    has none of it.
    """

    side: str
    histogram: Histogram = Histogram()
    cells: tuple[tuple[int, int, int], ...] = ()
    starts: tuple[int, ...] = ()
    region_pages: tuple[int, ...] = ()
    region_done: tuple[int, ...] = ()
    region_faults: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Frozen:
    """T0 is over: the frozen time and its parts by name, microseconds."""

    frozen_us: int
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heat:
    """Pages written within `seconds`, by the start of each region that could be watched."""

    seconds: float
    written: dict[int, int]


Event = Phase | Note | Faults | Progress | Planned | Round | Frozen | Detail | Connection | Handover
Listener = Callable[[Event], None]
Gate = Callable[[str], None]  # step mode: returns when the phase of that name may begin
