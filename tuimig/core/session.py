"""One migration as its user sees it: start, events while it runs, cancel, the report.

Puts the parts in order: look, refuse, attach, freeze, capture, dump, then commit (a snapshot) or build and fill (a
clone, a restore). Nothing here is done while the target is stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuimig.core import check, dump, heat, ports, precopy, procfs
from tuimig.core.errors import Cancelled, CaptureLost, FreezeFailed, SpoolFull, TuimigError, Unsupported
from tuimig.core.manifest import Manifest
from tuimig.core.model import (
    PAGE,
    Event,
    FaultTimes,
    Frozen,
    Gate,
    Heat,
    Listener,
    Note,
    Options,
    Phase,
    Plan,
    Planned,
    Precopy,
    Progress,
    Report,
    Round,
    Treatment,
)
from tuimig.core.policy import Policy
from tuimig.core.rates import held
from tuimig.core.ring import Ring
from tuimig.core.snapshot import Writer, open_snapshot
from tuimig.core.source import Source
from tuimig.core.spool import Spool
from tuimig.core.watch import Watch

if TYPE_CHECKING:
    from tuimig.core.destination import Copy

STOP_BUDGET_US: Final = 20_000  # for stopping all threads, where the person says nothing
PATIENCE: Final = 5  # attempts to freeze or to catch T0 in a state that can be written down
TICK_MS: Final = 50
NANO: Final = 1_000_000_000


class Relay:
    """What goes along with an attempt: a destination that takes it while it is made. This one does nothing."""

    hold = False  # the target stays stopped from T0 on
    tracks = False  # it goes by the spool's bitmap

    def prepare(self) -> None:
        """Before the freeze."""

    def outlined(self, look: procfs.LiveLook, plan: Plan) -> None:
        """Rounds of pre-copy begin; this is what it looks like."""

    def precopying(self, spool: Spool) -> None:
        """Now and then while rounds of pre-copy go on; the spool has their pages."""

    def catches_up(self) -> bool:
        """After a round: whether the next one had better wait until what this one copied is given."""
        return False

    def behind(self) -> bool:
        """Whether pages of the rounds are still to be given."""
        return False

    def settle(self) -> None:
        """The rounds are over, the freeze is next."""

    def began(self, source: Source, manifest: Manifest, spool: Spool) -> None:
        """After T0; the capture goes on. Of a held target: returns when it is captured."""

    def tick(self) -> None:
        """Now and then during the capture."""

    def captured(self) -> None:
        """Everything is in the spool; the source is let go of next."""

    def end(self, source: Source) -> None:
        """Let go of the source; raises where its capture was not exact after all."""
        source.end()

    def failed(self, error: BaseException) -> None:
        """The attempt is over, the source runs."""

    def let_go(self) -> None:
        """The spool is closed next."""


@dataclass(slots=True)
class _Captured:
    """A capture that succeeded: all of T0, and what there is to report of it."""

    manifest: Manifest
    spool: Spool
    report: Report
    t0_ns: int


class Session:
    """Runs one migration after the other. `listener` is called from the thread that calls the verb."""

    def __init__(self, listener: Listener, *, detail: bool = False, gate: Gate | None = None) -> None:
        """`detail`: say what only a picture needs, too. `gate`: asked before each phase; the source runs meanwhile."""
        self._listener = listener
        self.gate = gate
        self._watch = Watch(listener) if detail else None
        self._cancelled = False  # no Event: a signal handler that sets one waits for the wait that it interrupted
        self._relay = Relay()
        self._phase = "look"
        self._precopy: Precopy | None = None
        self._has_source = True
        self._outgrown = False  # the address space grew more during pre-copy than it has numbers for
        self._missed = False  # more was written at the end of pre-copy than fits a freeze

    def cancel(self) -> None:
        """End the migration soon; the source runs on, nothing is left. Safe from signal handlers and other threads."""
        self._cancelled = True

    # ------------------------------------------------------------ verbs

    def snapshot(self, pid: int, directory: Path, policy: Policy, options: Options) -> Report:
        """A copy-on-write snapshot of T0 in `directory`."""
        begin = time.monotonic_ns()
        with procfs.look(pid, options) as look:
            self._enter("look")
            plan = self._plan(look, policy, "snapshot")
            with Writer.create(directory) as writer, self._capture(look, plan, policy, writer.pages_fd) as captured:
                self._waited("commit")
                self._enter("commit")
                writer.commit(captured.manifest, captured.spool.sums.cast("B"))
                return replace(
                    captured.report,
                    verb="snapshot",
                    directory=str(directory),
                    total_us=(time.monotonic_ns() - begin) // 1000,
                )

    def clone(self, pid: int, policy: Policy, options: Options) -> Report:
        """A live copy on this host; the source runs on."""
        begin = time.monotonic_ns()
        with procfs.look(pid, options) as look, memory_file() as pages_fd:
            self._enter("look")
            plan = self._plan(look, policy, "clone")
            with self._capture(look, plan, policy, pages_fd) as captured:
                report = self._run_copy(captured.manifest, captured.spool, options, captured.t0_ns)
        merged = replace(
            captured.report,
            verb="clone",
            new_pid=report.new_pid,
            inner_pid=report.inner_pid,
            init_pid=report.init_pid,
            new_started=report.new_started,
            downtime_us=report.downtime_us,
            fill_us=report.fill_us,
            demand_faults=report.demand_faults,
            fault_us=captured.report.fault_us if captured.report.wp_faults else report.fault_us,
            warnings=(*captured.report.warnings, *report.warnings),
        )
        return replace(merged, total_us=(time.monotonic_ns() - begin) // 1000)

    def restore(self, directory: Path, options: Options) -> Report:
        """Run a snapshot again, lazily unless `options.full`."""
        begin = time.monotonic_ns()
        self._has_source = False
        self._enter("look")
        with open_snapshot(directory) as snapshot:
            ports.check_stored(snapshot.manifest, options, str(directory))
            process = snapshot.manifest.process
            command = " ".join(process.cmdline) or process.comm
            self._say(Planned("restore", process.host_pid, command, snapshot.manifest.plan()))
            if self._watch:
                self._watch.stored(snapshot.spool.sums, snapshot.manifest)
            report = self._run_copy(snapshot.manifest, snapshot.spool, options, begin)
            return replace(
                report,
                directory=str(directory),
                warnings=(*snapshot.warnings, *report.warnings),
                total_us=(time.monotonic_ns() - begin) // 1000,
            )

    def heat(self, pid: int, options: Options, seconds: float) -> Heat:
        """Which regions of a process are written within `seconds`; it runs on."""
        return Heat(seconds, heat.measure(pid, options, seconds, self._stop_if_cancelled))

    # ------------------------------------------------------------ the source's side

    def _plan(self, look: procfs.LiveLook, policy: Policy, verb: str) -> Plan:
        subject = f"process {look.pid}"
        check.refuse(check.check_look(look), look.options, subject)
        ports.check_look(look, subject)
        plan = policy.plan(look.regions)
        command = " ".join(procfs.read_cmdline(look.pid)).strip() or look.status.get("Name", "")
        self._say(Planned(verb, look.pid, command, plan))
        return plan

    @contextlib.contextmanager
    def _capture(self, look: procfs.LiveLook, plan: Plan, policy: Policy, pages_fd: int) -> Iterator[_Captured]:
        """T0, captured whole. The target is let go of before this yields."""
        begin = time.monotonic_ns()
        guarded = look.options.guard == "on"
        self._missed = self._outgrown = False
        with Source(look.identity, f"process {look.pid}") as source:
            for attempt in range(1, PATIENCE + 1):
                self._stop_if_cancelled()
                os.ftruncate(pages_fd, 0)
                with Spool(pages_fd, 0, True) as spool, self._relayed():
                    if self._relay.tracks:
                        spool.track()
                    try:
                        self._waited("attach")
                        manifest = self._attempt(source, look, plan, policy, spool, guarded=guarded)
                    except (CaptureLost, FreezeFailed, Unsupported, SpoolFull) as error:
                        if attempt == PATIENCE or not _worth_repeating(error, look, guarded=guarded):
                            raise
                        self._outgrown = self._outgrown or isinstance(error, SpoolFull)
                        lost = isinstance(error, CaptureLost)
                        self._missed = self._missed or error.syscall == precopy.MISSED
                        guarded = guarded or lost
                        how = "again, under system call stops" if lost else "again"
                        self._say(Note(f"{error.what}; trying {how}"))
                        time.sleep(0 if lost else 0.05 * attempt)
                        look = self._look_again(look)
                        plan = policy.plan(look.regions)
                        continue
                    verified = source.verify() if look.options.verify else None
                    report = self._source_report(source, manifest, spool, begin, verified)
                    report = replace(report, attempts=attempt, guard="guarded" if guarded else "optimistic")
                    t0_ns = source.clocks().monotonic_ns
                    source.close()
                    yield _Captured(manifest, spool, report, t0_ns)
                    return

    @contextlib.contextmanager
    def _relayed(self) -> Iterator[None]:
        """Whatever happens, nobody reads the spool when it is closed."""
        try:
            yield
        finally:
            self._relay.let_go()

    def _look_again(self, look: procfs.LiveLook, *, tracked: bool = False) -> procfs.LiveLook:
        """A new picture of the same process, pinned by the old identity; closed along with the old one.

        `tracked`: its regions are registered by ourselves.
        """
        look.identity.check()
        fresh = procfs.look(look.pid, look.options)
        if tracked:
            fresh.regions = [replace(region, flags=region.flags - {"uw"}) for region in fresh.regions]
        look.closers.append(fresh.close)
        check.refuse(check.check_look(fresh), fresh.options, f"process {fresh.pid}")
        return fresh

    def _attempt(
        self,
        source: Source,
        look: procfs.LiveLook,
        plan: Plan,
        policy: Policy,
        spool: Spool,
        *,
        guarded: bool,
    ) -> Manifest:
        options = look.options
        self._enter("attach")
        self._relay.prepare()
        wished = "off" if self._outgrown else options.precopy
        wish = precopy.Wish.of(wished, options.freeze_budget_ms, missed=self._missed)
        unsafe = precopy.directly_written(look.descriptors) if wish.rounds != 0 else ""
        tracks = source.attach(track=wish.rounds != 0 and not unsafe)
        self._precopy = None
        if self._outgrown:
            self._precopy = Precopy("none", (), "off", "its address space grew more than was provided for")
        if wish.rounds != 0 and not tracks:
            self._precopy = Precopy("none", (), "off", unsafe or "this kernel cannot track writes by itself")
        dirty_most = 0
        if tracks:
            try:
                if self._waited("precopy"):  # the freeze follows the last round at once
                    look = self._look_again(look, tracked=True)
                    plan = policy.plan(look.regions)
                self._precopy = self._rounds(source, look, plan, policy, spool, wish)
                look = self._look_again(look, tracked=True)
                plan = policy.plan(look.regions)
            except BaseException:
                with contextlib.suppress(TuimigError):
                    source.end()
                raise
            dirty_most = precopy.SLACK * wish.budget_pages
        elif self._waited("freeze"):  # what was looked at before is old by now
            look = self._look_again(look)
            plan = policy.plan(look.regions)
        probes = dump.probes(look)
        look.identity.check()
        self._stop_if_cancelled()
        self._enter("freeze")
        budget = options.freeze_budget_ms
        deadline_us = STOP_BUDGET_US if budget is None else max(1000, int(budget * 1000))
        source.freeze(
            plan,
            policy,
            probes,
            spool,
            guarded=guarded,
            verify=options.verify,
            deadline_us=deadline_us,
            dirty_most=dirty_most,
            hold=self._relay.hold,
        )
        parts, frozen_ns = source.times()
        self._say(Frozen(frozen_ns // 1000, {name: value // 1000 for name, value in parts.items()}))
        try:
            if not self._relay.hold:
                self._waited("capture")
            self._enter("capture")
            if tracks and (unsafe := precopy.directly_written(source.descriptors())):
                raise FreezeFailed(unsafe, subject=f"process {look.pid}", cure=dump.AGAIN)
            manifest = dump.manifest(source, look, plan, spool.n_pages * PAGE)
            look.release()
            self._relay.began(source, manifest, spool)
            while not source.wait(TICK_MS):
                self._show_source(source)
                self._relay.tick()
                self._stop_if_cancelled()
            self._relay.captured()
        except BaseException as error:
            with contextlib.suppress(TuimigError):  # what is under way says more than what its end adds
                source.end()
            self._relay.failed(error)
            raise
        try:
            self._relay.end(source)
        except TuimigError as error:
            self._relay.failed(error)
            raise
        self._show_source(source, last=True)
        return manifest

    def _rounds(
        self, source: Source, look: procfs.LiveLook, plan: Plan, policy: Policy, spool: Spool, wish: precopy.Wish
    ) -> Precopy:
        """Copy while it runs, until the rule says that another round brings nothing."""
        self._enter("precopy")
        self._relay.outlined(look, plan)
        look.release()
        source.begin_rounds(plan, policy, spool)
        rounds: list[Round] = []
        total = held(plan, Treatment.PROTECTED) // PAGE
        while not (end := precopy.ending(rounds, wish)):
            complete = False
            while not complete:
                self._stop_if_cancelled()
                shown, complete = source.round(TICK_MS)
                self._relay.precopying(spool)
                if self._watch:
                    self._watch.source(source)
                if not rounds and not self._relay.tracks:
                    done = shown.copied_pages
                    self._say(Progress(self._phase, max(total, done), done, zero_pages=shown.zero_pages))
            rounds.append(shown)
            self._say(shown)
            self._rest(precopy.pause_s(shown, look.options.max_slowdown), spool)
        self._relay.settle()
        left = source.give_up(wish.budget_pages) if end.how == "window" else 0
        return Precopy("async", tuple(rounds), end.how, end.why, window_bytes=left)

    def _rest(self, seconds: float, spool: Spool) -> None:
        """Between two rounds: as long as the target needs, and until what was copied is given where that pays."""
        until = time.monotonic() + seconds
        waits = self._relay.catches_up()
        while (left := until - time.monotonic()) > 0 or (waits and self._relay.behind()):
            time.sleep(min(max(left, 0.002), 0.05))
            self._stop_if_cancelled()
            self._relay.precopying(spool)

    def _precopy_report(self, source: Source) -> Precopy | None:
        if self._precopy is None:
            return None
        counters = source.progress()
        stops, stops_ns = source.stops()
        return replace(
            self._precopy,
            valid_pages=counters.precopied_pages,
            dirty_pages=counters.dirty_pages,
            stops=stops,
            stops_us=stops_ns // 1000,
        )

    def _show_source(self, source: Source, *, last: bool = False) -> None:
        self._say_faults(source.ring)
        counters = source.progress()
        self._say(
            Progress(
                phase=self._phase,
                pages_total=counters.pages_total,
                pages_done=counters.pages_done,
                wp_faults=counters.wp_faults,
                swept_pages=counters.swept_pages,
                zero_pages=counters.zero_pages,
                guard_stops=counters.guard_stops,
                faults_dropped=source.ring.dropped,
            )
        )
        if self._watch:
            self._watch.source(source, last=last)

    def _say_faults(self, ring: Ring) -> None:
        while faults := ring.drain():
            self._say(faults)

    def _source_report(
        self, source: Source, manifest: Manifest, spool: Spool, begin: int, verified: int | None
    ) -> Report:
        counters = source.progress()
        parts, frozen_ns = source.times()
        return Report(
            verb="",
            pid=manifest.process.host_pid,
            regions=len(manifest.regions),
            bytes=counters.pages_total * PAGE,
            total_us=(time.monotonic_ns() - begin) // 1000,
            frozen_us=frozen_ns // 1000,
            frozen={name: value // 1000 for name, value in parts.items()},
            wp_faults=counters.wp_faults,
            fault_us=source.ring.histogram.times,
            swept_pages=counters.swept_pages,
            zero_pages=max(0, counters.pages_total - spool.stored_pages()),  # of the rounds, too
            guard_stops=counters.guard_stops,
            eager_bytes=counters.eager_pages * PAGE,
            protected_bytes=sum(r.size for r in manifest.regions if r.treatment == Treatment.PROTECTED.value),
            verified_pages=verified,
            faults_dropped=source.ring.dropped,
            precopy=self._precopy_report(source),
        )

    # ------------------------------------------------------------ the destination's side

    def _run_copy(self, manifest: Manifest, spool: Spool, options: Options, since_ns: int) -> Report:
        """Build it, let it run, fill it. `since_ns`: from when its downtime counts."""
        from tuimig.core import destination  # a snapshot never needs it

        warnings: list[str] = []
        self._stop_if_cancelled()
        self._waited("restore")
        self._enter("restore")
        copy = destination.build(manifest, spool, options, warnings.append)
        try:
            self._waited("fill")
            self._enter("fill")
            while not copy.wait_filled(TICK_MS / 1000):
                self._show_copy(copy)
                self._stop_if_cancelled()
            self._show_copy(copy, last=True)
            return self._copy_report(manifest, copy, since_ns, tuple(warnings))
        except BaseException:
            copy.kill()
            copy.reap()
            raise
        finally:
            copy.close()

    def _show_copy(self, copy: Copy, *, last: bool = False) -> None:
        if copy.ring:
            self._say_faults(copy.ring)
        if fill := copy.fill_progress():
            self._say(
                Progress(
                    phase=self._phase,
                    pages_total=fill.pages,
                    pages_done=fill.filled + fill.gone,
                    demand_faults=fill.demand_faults,
                )
            )
        if self._watch:
            self._watch.copy(copy, last=last)

    def _copy_report(self, manifest: Manifest, copy: Copy, since_ns: int, warnings: tuple[str, ...]) -> Report:
        fill = copy.fill_progress()
        filled_us = max(0, fill.end_ns - copy.first_instruction_ns) // 1000 if fill else 0
        return Report(
            verb="restore",
            pid=manifest.process.host_pid,
            regions=len(manifest.regions),
            bytes=sum(region.pages for region in manifest.regions) * PAGE,
            total_us=0,
            demand_faults=fill.demand_faults if fill else 0,
            fault_us=copy.ring.histogram.times if copy.ring else FaultTimes(),
            faults_dropped=copy.ring.dropped if copy.ring else 0,
            new_pid=copy.pid,
            inner_pid=copy.inner_pid,
            init_pid=copy.init_pid,
            new_started=_started(copy.pid),
            downtime_us=(copy.first_instruction_ns - since_ns) // 1000,
            fill_us=filled_us,
            warnings=warnings,
        )

    # ------------------------------------------------------------ events

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._say(Phase(phase, time.monotonic_ns()))

    def _waited(self, phase: str) -> bool:
        """Step mode: until the phase may begin. Called only where the source runs."""
        if self.gate is None:
            return False
        self.gate(phase)
        self._stop_if_cancelled()
        return True

    def _say(self, event: Event) -> None:
        if self._watch and isinstance(event, Planned):
            self._watch.planned(event.plan)
        self._listener(event)

    def _stop_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("cancelled; the source runs on as before" if self._has_source else "cancelled")


def _worth_repeating(error: TuimigError, look: procfs.LiveLook, *, guarded: bool) -> bool:
    """A loss is repeated under the guard where that is allowed; what was in the way only for a moment, anyway."""
    if isinstance(error, CaptureLost):
        return look.options.guard == "auto" and not guarded
    if isinstance(error, Unsupported):
        return error.cure == dump.AGAIN
    if isinstance(error, SpoolFull):  # what pre-copy has to number in advance has grown beyond all measure
        return error.errno == errno.EFBIG
    return True


def _started(pid: int) -> int | None:
    try:
        return procfs.start_time(pid)
    except TuimigError:  # a copy that was short-lived
        return None


@contextlib.contextmanager
def memory_file() -> Iterator[int]:
    """The spool of a local clone."""
    fd = os.memfd_create("tuimig-spool", os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
