"""The source session: holds one running process, freezes it for T0, captures its memory while it runs on.

Owns the native `tm_source`. Nothing in here runs between freeze and thaw: what the freeze needs is prepared before, its
results are read after. The process is let go of whatever happens, also when we are killed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from tuimig.core.engine import check, ffi, lib, new_error
from tuimig.core.manifest import Clocks, ThreadEntry
from tuimig.core.model import Kind, Plan, Region, Round, Treatment
from tuimig.core.policy import Policy
from tuimig.core.procfs import Identity
from tuimig.core.ring import Ring
from tuimig.core.spool import Spool
from tuimig.core.state.base import Answer, Descriptor, Frozen, Look, Probe

KINDS: Final = tuple(Kind)  # in the order of enum tm_kind
TREATMENTS: Final = {Treatment.NONE: 0, Treatment.EAGER: 1, Treatment.PROTECTED: 2}
TREATMENT_OF: Final = {value: key for key, value in TREATMENTS.items()}
NO_SLOT: Final = (1 << 64) - 1
PARTS: Final = (
    "stop",
    "maps",
    "threads",
    "calls",
    "probes",
    "descriptors",
    "eager",
    "proof",
    "dirty",
    "scan",
    "arm",
    "verify",
    "thaw",
)


class RegionAtT0:
    """One region as the freeze saw it: the region, its treatment and place, and how it was decided."""

    __slots__ = ("huge", "region", "slot", "tracked", "treatment")

    def __init__(self, native: Any) -> None:
        self.region = Region(
            start=int(native.start),
            end=int(native.end),
            perms=ffi.string(native.perms).decode(),
            offset=int(native.offset),
            dev=f"{int(native.dev_major):02x}:{int(native.dev_minor):02x}",
            inode=int(native.inode),
            path=unescape(ffi.string(native.path)),
            kind=KINDS[native.kind],
        )
        self.treatment = TREATMENT_OF[native.treatment]
        self.slot: int | None = None if native.slot == NO_SLOT else int(native.slot)
        self.tracked = int(native.tracked)
        self.huge = bool(native.huge)


def unescape(path: bytes) -> str:
    """A path as maps shows it: a newline in it is written `\\012`."""
    return os.fsdecode(path.replace(b"\\012", b"\n"))


@dataclass(frozen=True, slots=True)
class Counters:
    """The native counters at one moment, pages of 4 KiB; `state` is an enum tm_source_state."""

    state: int
    pages_total: int
    pages_done: int
    wp_faults: int
    fault_pages: int
    swept_pages: int
    zero_pages: int
    eager_pages: int
    verified_pages: int
    precopied_pages: int
    dirty_pages: int
    guard_stops: int
    events: int
    eager_stored: int  # 1: what was copied inside the freeze is in the spool


class Source:
    """One target. `with Source(identity) as source:` lets go of it at the end."""

    def __init__(self, identity: Identity, subject: str) -> None:
        self.identity = identity
        self.subject = subject
        self._native: Any = ffi.NULL
        self._keep: list[Any] = []  # what the native side points to
        self._rounds_plan: Any = ffi.NULL
        self._probes: Sequence[Probe] = ()
        self._verified_pages: int | None = None
        out, error = ffi.new("struct tm_source **"), new_error()
        check(lib.tm_source_create(identity.pid, identity.pidfd, out, error), error, subject)
        self._native = out[0]
        self.ring = Ring(lib.tm_source_ring(self._native))

    @property
    def native(self) -> Any:
        """The `struct tm_source *`, for native calls that look at it."""
        return self._native

    def close(self) -> None:
        """Whatever goes on is ended; the target runs on."""
        if self._native != ffi.NULL:
            lib.tm_source_destroy(self._native)
            self._native = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ the steps

    def attach(self, *, track: bool = False) -> bool:
        """One short stop of one thread: take a userfaultfd of the target's memory. True: its writes can be tracked."""
        with _device() as device:
            error, tracked = new_error(), ffi.new("int32_t *")
            wanted = lib.TM_TRACK_ASYNC if track else lib.TM_TRACK_NONE
            check(lib.tm_source_attach(self._native, device, wanted, tracked, error), error, self.subject)
        self._rounds_plan = ffi.NULL
        self._keep.clear()
        return bool(tracked[0] != lib.TM_TRACK_NONE)

    def begin_rounds(self, plan: Plan, policy: Policy, spool: Spool) -> None:
        """What the rounds of pre-copy work on, until the freeze brings its own."""
        self._rounds_plan = self._plan(plan, policy, spool)

    def round(self, slice_ms: int) -> tuple[Round, bool]:
        """A slice of a round of pre-copy; True: that ended it."""
        out, error = ffi.new("struct tm_round *"), new_error()
        check(lib.tm_source_round(self._native, self._rounds_plan, slice_ms, out, error), error, self.subject)
        shown = Round(
            number=int(out.number),
            dirty_pages=int(out.dirty),
            copied_pages=int(out.copied),
            hot_pages=int(out.hot),
            zero_pages=int(out.zero),
            since_us=int(out.since_ns) // 1000,
            duration_us=int(out.total_ns) // 1000,
            scan_us=int(out.scan_ns) // 1000,
        )
        return shown, bool(out.complete)

    def give_up(self, pages: int) -> int:
        """Leave the regions that are written most to the window; their bytes."""
        out, error = ffi.new("uint64_t *"), new_error()
        check(lib.tm_source_give_up(self._native, pages, out, error), error, self.subject)
        return int(out[0])

    def freeze(
        self,
        plan: Plan,
        policy: Policy,
        probes: Sequence[Probe],
        spool: Spool,
        *,
        guarded: bool,
        verify: bool,
        deadline_us: int,
        hold: bool = False,
        dirty_most: int = 0,
    ) -> None:
        """T0. When it returns the target runs again (unless held) and the capture goes on in native threads.

        `dirty_most`: pages that pre-copy may leave for the freeze.
        """
        native = self._plan(plan, policy, spool)
        natives = ffi.new("struct tm_probe[]", max(1, len(probes)))
        self._keep.append(natives)
        for index, probe in enumerate(probes):
            _fill_probe(natives[index], probe, self._keep)
        native.probes, native.n_probes = natives, len(probes)
        native.guarded, native.verify = int(guarded), int(verify)
        native.hold = int(hold)
        native.deadline_us, native.dirty_most = deadline_us, dirty_most
        self._probes = probes
        error = new_error()
        code = lib.tm_source_freeze(self._native, native, error)
        # The look found nothing in the way, so this may be there for a moment only.
        check(code, error, self.subject, "Try again" if code == lib.TM_UNSUPPORTED else "")

    def _plan(self, plan: Plan, policy: Policy, spool: Spool) -> Any:
        """The native plan, without what concerns the freeze alone. The one before it stays valid."""
        native_policy = policy.for_engine()
        wanted = [d for d in plan.decisions if d.treatment is not Treatment.NONE]
        ranges = ffi.new("struct tm_range[]", max(1, len(wanted)))
        for index, decision in enumerate(wanted):
            ranges[index].start = decision.region.start
            ranges[index].end = decision.region.end
            ranges[index].treatment = TREATMENTS[decision.treatment]
        native = ffi.new("struct tm_freeze_plan *")
        native.ranges, native.n_ranges = ranges, len(wanted)
        native.eager_below = native_policy.eager_below
        for index, treatment in enumerate((native_policy.heap, native_policy.stack, native_policy.anon)):
            native.class_treatment[index] = -1 if treatment is None else TREATMENTS[treatment]
        native.eager_estimate = sum(
            d.region.anonymous + d.region.swap if d.region.kind is Kind.FILE else d.region.rss + d.region.swap
            for d in wanted
            if d.treatment is Treatment.EAGER
        )
        native.spool = spool.native
        self._keep += [ranges, native, spool]
        return native

    def wait(self, timeout_ms: int) -> bool:
        """True once every page is captured. Raises what made the capture fail."""
        error = new_error()
        check(lib.tm_source_wait(self._native, timeout_ms, error), error, self.subject)
        return bool(self.progress().state == lib.TM_CAPTURED)

    def end(self) -> None:
        """Let go of the target. Returns only if every page of T0 was captured exactly."""
        error = new_error()
        check(lib.tm_source_end(self._native, error), error, self.subject)

    def verify(self) -> int:
        """Compare what was captured with what was hashed at T0; the number of pages compared."""
        error = new_error()
        check(lib.tm_source_verify(self._native, error), error, self.subject, "Nothing was kept; report this as a bug")
        return self.progress().verified_pages

    # ------------------------------------------------------------ what it shows

    def progress(self) -> Counters:
        native = ffi.new("struct tm_source_progress *")
        lib.tm_source_progress(self._native, native)
        return Counters(**{name: int(getattr(native, name)) for name in Counters.__slots__})

    def region_faults(self) -> tuple[int, ...]:
        """Write-protect faults by region of the last freeze."""
        return self._by_region("uint32_t[]", lib.tm_source_region_faults)

    def region_done(self) -> tuple[int, ...]:
        """Pages captured after T0, likewise."""
        return self._by_region("uint64_t[]", lib.tm_source_region_done)

    def _by_region(self, kind: str, read: Any) -> tuple[int, ...]:
        regions = ffi.new("struct tm_region_state const **")
        count = int(lib.tm_source_regions(self._native, regions))
        out = ffi.new(kind, max(1, count))
        read(self._native, out, count)
        return tuple(ffi.unpack(out, count)) if count else ()

    # ------------------------------------------------------------ what the freeze read

    def times(self) -> tuple[dict[str, int], int]:
        """The parts of the freeze of a microsecond or more by name, and its whole length, nanoseconds."""
        native = self._times()
        return {name: int(getattr(native, name)) for name in PARTS if getattr(native, name) >= 1000}, int(native.frozen)

    def stops(self) -> tuple[int, int]:
        """Short stops outside of the freeze: how many, and their length together, nanoseconds."""
        native = self._times()
        return int(native.n_stops), int(native.stops)

    def clocks(self) -> Clocks:
        """T0 on our clocks."""
        native = self._times()
        return Clocks(
            realtime_ns=int(native.t0_realtime),
            monotonic_ns=int(native.t0_monotonic),
            boottime_ns=int(native.t0_boottime),
        )

    def regions(self) -> list[RegionAtT0]:
        out = ffi.new("struct tm_region_state const **")
        count = lib.tm_source_regions(self._native, out)
        return [RegionAtT0(out[0][index]) for index in range(count)]

    def region_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Addresses of `regions`, and their pages to capture after T0; what `region_done` is about."""
        out = ffi.new("struct tm_region_state const **")
        count = lib.tm_source_regions(self._native, out)
        regions = out[0][0:count] if count else []
        return tuple(int(r.start) for r in regions), tuple(int(r.tracked) for r in regions)

    def threads(self) -> list[ThreadEntry]:
        """With host ids for both ids; the caller knows the inner ones."""
        out = ffi.new("struct tm_thread_state const **")
        count = lib.tm_source_threads(self._native, out)
        return [_thread(out[0][index]) for index in range(count)]

    def shared_pending(self) -> list[bytes]:
        out = ffi.new("uint8_t const **")
        count = lib.tm_source_shared_pending(self._native, out)
        return _siginfos(out[0], count)

    def descriptors(self) -> dict[int, Descriptor]:
        out = ffi.new("struct tm_descriptor_state const **")
        count = lib.tm_source_descriptors(self._native, out)
        found = {}
        for index in range(count):
            native = out[0][index]
            link, info = os.fsdecode(ffi.string(native.link)), os.fsdecode(ffi.string(native.info))
            found[int(native.number)] = Descriptor(int(native.number), link, info, int(native.same_as))
        return found

    def frozen(self, look: Look) -> Frozen:
        """What the state modules dump from."""
        tids = [thread.host_tid for thread in self.threads()]
        calls: dict[str, Answer] = {}
        each: dict[str, dict[int, Answer]] = {}
        for index, probe in enumerate(self._probes):
            if probe.kind == lib.TM_PROBE_CALL_EACH:
                each[probe.key] = {tid: self._answer(index, at) for at, tid in enumerate(tids)}
            else:
                calls[probe.key] = self._answer(index, 0)
        return Frozen(
            look=look,
            clocks=self.clocks(),
            descriptors=self.descriptors(),
            regions=[entry.region for entry in self.regions()],
            tids=tids,
            calls=calls,
            each=each,
        )

    def _answer(self, probe: int, thread: int) -> Answer:
        native = lib.tm_source_answer(self._native, probe, thread)
        data = bytes(ffi.buffer(native.data, native.size)) if native.data != ffi.NULL else b""
        return Answer(int(native.ret), data)

    def _times(self) -> Any:
        native = ffi.new("struct tm_frozen_times *")
        lib.tm_source_times(self._native, native)
        return native


def _siginfos(data: Any, count: int) -> list[bytes]:
    return [bytes(ffi.buffer(data + index * 128, 128)) for index in range(count)]


def _thread(native: Any) -> ThreadEntry:
    return ThreadEntry(
        tid=int(native.tid),
        host_tid=int(native.tid),
        comm=os.fsdecode(ffi.string(native.comm)),
        regs=bytes(ffi.buffer(native.regs)),
        xstate=bytes(ffi.buffer(native.xstate, native.xstate_size)),
        sigmask=int(native.sigmask),
        robust_head=int(native.robust_head),
        robust_len=int(native.robust_len),
        rseq_pointer=int(native.rseq_pointer),
        rseq_size=int(native.rseq_size),
        rseq_signature=int(native.rseq_signature),
        rseq_flags=int(native.rseq_flags),
        pending=_siginfos(native.pending, native.n_pending),
    )


def _fill_probe(native: Any, probe: Probe, keep: list[Any]) -> None:
    native.kind, native.nr, native.fd = int(probe.kind), probe.nr, probe.fd
    for index, value in enumerate(probe.args):
        native.args[index] = value & NO_SLOT
    native.out_size = probe.out
    if probe.data:
        data = ffi.new("uint8_t[]", probe.data)
        keep.append(data)
        native.data, native.data_size = data, len(probe.data)
    if probe.path:
        path = ffi.new("char[]", os.fsencode(probe.path))
        keep.append(path)
        native.path = path


@contextlib.contextmanager
def _device() -> Iterator[int]:
    """/dev/userfaultfd, lent to targets that may not make a userfaultfd themselves; -1 where we may not open it."""
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # the target may be allowed by itself; if not, its own call says so
        yield -1
        return
    try:
        yield device
    finally:
        os.close(device)
