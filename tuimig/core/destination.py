"""The destination: builds the copy of a process from its manifest and its pages, and lets it run.

The order is design, section 7: everything that can fail is opened and checked in our own process first; then the stub
is made, its memory replaced, lazy pages registered, threads made, the rest of the state set, privileges dropped last.
Whatever fails ends all that was built.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from tuimig.core import mapping as layout
from tuimig.core import procfs, spawning, t0
from tuimig.core.errors import RebuildFailed, SnapshotDamaged, TargetGone, TuimigError
from tuimig.core.filler import Filler, FillProgress, Range
from tuimig.core.manifest import Manifest
from tuimig.core.model import PAGE, Options
from tuimig.core.ring import Ring
from tuimig.core.skeleton import Skeleton, lay_out
from tuimig.core.spool import Spool
from tuimig.core.state import KINDS, memory, threads
from tuimig.core.state.base import Build, Call, Stage
from tuimig.core.stub import DATA_OFFSET, Image, Place, Stub
from tuimig.core.syscalls import NR

Notify = Callable[[str], None]

_GONE_S: Final = 2.0
_KEEP_EXE: Final = -1


@dataclass(slots=True)
class Copy:
    """A copy that runs. Keep it until it is filled, then `close` it; the copy runs on."""

    pid: int  # as this process sees it
    inner_pid: int  # as the copy sees itself
    init_pid: int | None  # the minimal init of its PID namespace
    first_instruction_ns: int  # CLOCK_MONOTONIC
    pidfd: int
    init_pidfd: int
    warnings: tuple[str, ...]
    filler: Filler | None  # None: no region is lazy
    early: bool = False  # its skeleton was there before T0

    def fill_progress(self) -> FillProgress | None:
        return self.filler.progress() if self.filler else None

    @property
    def ring(self) -> Ring | None:
        """Records of its demand faults."""
        return self.filler.ring if self.filler else None

    def wait_filled(self, timeout_s: float = -1) -> bool:
        """Whether all pages are in, or are not needed any more. Raises where the copy could not get them all."""
        if self.filler is None:
            return True
        if not self.filler.wait(timeout_s):
            return False
        if failure := self.filler.failure():
            raise failure
        return True

    def kill(self) -> None:
        """End the copy, and its namespace's init."""
        for fd in (self.pidfd, self.init_pidfd):
            if fd >= 0:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def reap(self) -> None:
        """Wait until the copy has ended where it is our child (its init in its place), so that no zombie stays."""
        fd = self.init_pidfd if self.init_pidfd >= 0 else self.pidfd
        try:
            os.waitid(os.P_PIDFD, fd, os.WEXITED)
        except ChildProcessError:
            return

    def close(self) -> None:
        """Let go. Where pages are still missing the copy is killed: it cannot live without them."""
        if self.filler is not None:
            self.filler.close()
            self.filler = None
        for fd in (self.pidfd, self.init_pidfd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.init_pidfd = -1


@dataclass(slots=True)
class _Prepared:
    """All that is opened and checked before anything is built."""

    build: Build
    memory: memory.MemorySection
    threads: threads.ThreadsSection
    mapping: layout.Mapping
    exe_fd: int
    owned: list[int] = field(default_factory=list)

    def close(self) -> None:
        self.build.close()
        self.mapping.close()
        for fd in self.owned:
            os.close(fd)
        self.owned.clear()


def build(
    manifest: Manifest,
    spool: Spool,
    options: Options,
    notify: Notify = lambda _: None,
    may_run: Callable[[], None] = lambda: None,
    *,
    source_ends: bool = False,
    skeleton: Skeleton | None = None,
) -> Copy:
    """Build the copy and let it run; its lazy pages come in meanwhile. `notify` gets warnings.

    `source_ends`: the source will not run beside the copy.
    `skeleton`: used where it fits; ended in any other case.
    `may_run` is called when only the last step is left; it returns when the copy may run, or raises.

    `spool` must outlive the copy's filler. Must be called from the thread that will use the Copy. Raises RebuildFailed
    or what the state kinds raise; nothing is left then.
    """
    try:
        copy, refused = _build(manifest, spool, options, may_run, source_ends, skeleton)
    finally:
        if skeleton is not None:
            skeleton.close()
    if refused:
        notify(f"the copy's monotonic clock is this host's: a time namespace was refused ({os.strerror(refused)})")
    for warning in copy.warnings:
        notify(warning)
    return copy


def _build(
    manifest: Manifest,
    spool: Spool,
    options: Options,
    may_run: Callable[[], None],
    source_ends: bool,
    skeleton: Skeleton | None,
) -> tuple[Copy, int]:
    """The copy, and why its clocks do not go on from T0 (an errno); 0: they do."""
    _check_host(manifest)
    # timers are rebuilt by whether the clocks go on, which only the attempt to make a time namespace tells
    refused = 0
    while True:
        prepared = _prepare(manifest, options, not refused, source_ends)
        try:
            try:
                held = _hold(prepared, manifest, options, skeleton)
            except TuimigError:
                if skeleton is None or skeleton.stub is None:
                    raise
                skeleton.close()  # what it did not manage may well go from nothing
                continue
            with held.stub as stub:
                if stub.time_errno:
                    refused = stub.time_errno
                    continue
                return _Builder(held, prepared, manifest, spool, options).run(may_run), refused
        finally:
            prepared.close()


def warm_up() -> None:
    """What costs time the first time, done before somebody waits: types are made sense of, files are in the cache."""
    msgspec.json.Decoder(Manifest)
    for kind in KINDS:
        msgspec.json.Decoder(kind.Section)
    os.close(spawning.open_init())
    spawning.own_ranges()


# ---------------------------------------------------------------- before anything is built


def _check_host(manifest: Manifest) -> None:
    machine = os.uname().machine
    if (manifest.host.arch, manifest.host.page_size) != (machine, PAGE):
        raise RebuildFailed(
            f"it was captured on {manifest.host.arch} with pages of {manifest.host.page_size} bytes, this is {machine}",
            cure="Restore it on a host like the source",
        )


def _prepare(manifest: Manifest, options: Options, clocks_continue: bool, source_ends: bool) -> _Prepared:
    plan = Build(manifest, options, clocks_continue=clocks_continue, source_ends=source_ends)
    mapping = layout.Mapping()
    owned: list[int] = []
    try:
        sections: dict[str, Any] = {}
        unknown = set(manifest.state) - {kind.name for kind in KINDS}
        if unknown:
            raise SnapshotDamaged(
                f"it holds state of unknown kinds: {', '.join(sorted(unknown))}",
                cure="Restore it with the tuimig version that took it",
            )
        mapping = layout.plan(manifest.regions)
        plan.warnings += mapping.warnings
        for kind in KINDS:
            sections[kind.name] = section = _section(manifest, kind)
            kind.rebuild(section, plan)
        exe_fd = _open_exe(manifest.process.exe)
        owned.append(exe_fd)
        return _Prepared(plan, sections[memory.KIND.name], sections[threads.KIND.name], mapping, exe_fd, owned)
    except BaseException:
        plan.close()
        mapping.close()
        for fd in owned:
            os.close(fd)
        raise


def _section(manifest: Manifest, kind: Any) -> Any:
    if kind.name not in manifest.state:
        raise SnapshotDamaged(f"the section `{kind.name}` is missing", cure="Take a new snapshot")
    try:
        return msgspec.json.decode(manifest.state[kind.name], type=kind.Section)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(f"the section `{kind.name}` is malformed: {error}", cure="Take a new snapshot") from None


def _open_exe(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not for a pipe that has taken its name
    except OSError as error:
        raise RebuildFailed(
            "cannot open the program",
            subject=path,
            syscall="open",
            errno=error.errno or 0,
            cure="Put the program there that the source ran",
        ) from None


# ---------------------------------------------------------------- the stub


@dataclass(slots=True)
class _Held:
    """The stub with its descriptors in place."""

    stub: Stub
    helpers: dict[int, int]  # our descriptors that it needs while it is built -> its numbers
    early: bool  # its memory is laid out


def _hold(prepared: _Prepared, manifest: Manifest, options: Options, skeleton: Skeleton | None) -> _Held:
    if skeleton is not None and skeleton.stub is not None:
        if held := _from_skeleton(prepared, manifest, options, skeleton):
            return held
        skeleton.close()  # its id is wanted
    return _from_nothing(prepared, manifest, options)


def _places(prepared: _Prepared, helpers: Mapping[int, int]) -> list[Place]:
    placed = prepared.build.placed
    places = [Place(number, fd, cloexec) for number, (fd, cloexec) in placed.items()]
    return places + [Place(number, fd, True) for fd, number in helpers.items()]


def _setup(prepared: _Prepared) -> list[Call]:
    return [call for _, call in prepared.build.calls.get(Stage.SETUP, [])]


def _from_skeleton(prepared: _Prepared, manifest: Manifest, options: Options, skeleton: Skeleton) -> _Held | None:
    if not prepared.build.clocks_continue or not prepared.mapping.lazy:
        return None
    setup, missing = _setup(prepared), skeleton.missing(prepared.mapping)
    fds = [prepared.exe_fd, *(m.fd for m in missing if m.fd >= 0)]
    helpers = spawning.helpers(fds, prepared.build.placed)
    places = _places(prepared, helpers)
    if not skeleton.fits(manifest, options, [place.number for place in places], setup):
        return None
    return _Held(skeleton.complete(prepared.mapping, missing, places, helpers, setup), helpers, True)


def _from_nothing(prepared: _Prepared, manifest: Manifest, options: Options) -> _Held:
    mapping = prepared.mapping
    fds = [prepared.exe_fd, *(m.fd for m in mapping.mapped if m.fd >= 0)]
    helpers = spawning.helpers(fds, prepared.build.placed)
    wanted = spawning.Wanted(
        subject=f"copy of {manifest.process.comm} ({manifest.process.pid})",
        pid=manifest.process.pid,
        tids=[thread.tid for thread in manifest.threads],
        ranges=[(r.start, r.end) for r in manifest.regions],
        places=_places(prepared, helpers),
        setup=_setup(prepared),
        uffd_number=spawning.unused([*prepared.build.placed, *helpers.values()]),
        lazy=bool(mapping.lazy),
        offsets=spawning.time_offsets(manifest.clocks) if prepared.build.clocks_continue else None,
    )
    return _Held(spawning.spawn(wanted, options.pid_namespace), helpers, False)


# ---------------------------------------------------------------- the stub becomes the copy


def _is_our_program(exe_fd: int) -> bool:
    ours, theirs = (os.readlink(f"/proc/self/{name}") for name in ("exe", f"fd/{exe_fd}"))
    return ours == theirs


class _Builder:
    """Turns a spawned stub into the running copy, step by step."""

    def __init__(self, held: _Held, prepared: _Prepared, manifest: Manifest, spool: Spool, options: Options) -> None:
        self._stub = held.stub
        self._early = held.early
        self._prepared = prepared
        self._manifest = manifest
        self._spool = spool
        self._full = options.full
        self._filler: Filler | None = None
        self._helpers = held.helpers
        self._subject = f"copy of {manifest.process.comm} ({manifest.process.pid})"
        files = {m.region.start: m.fd for m in prepared.mapping.mapped if m.fd >= 0}
        self._t0 = t0.Memory(manifest, spool, files)

    def run(self, may_run: Callable[[], None]) -> Copy:
        stub = self._stub
        try:
            stub.pin(True)
            if not self._early:
                lay_out(stub, self._manifest.regions, self._prepared.mapping, self._helpers)
            self._describe_memory()
            for content in self._prepared.mapping.contents:
                self._spool.require(content.first_page, content.n_pages)
            stub.write(self._spool, self._prepared.mapping.contents)
            self._start_filler()
            self._run_leader(self._prepared.mapping.late_calls())
            self._make_threads()
            images = self._images()
            self._finish()
            stub.pin(False)
            self._act_from_outside()
            may_run()
            stub.release(images)
            return self._copy()
        except BaseException as error:
            cause = self._cause(error)
            self._end()
            if cause is not None:
                raise cause from None
            raise

    def _cause(self, error: BaseException) -> TuimigError | None:
        """What is to be told instead of the call that happened to fail, where the stub did not fail by itself."""
        filler = self._filler
        if filler is not None and filler.progress().ended:
            failure = filler.failure()
            if isinstance(failure, SnapshotDamaged):  # the filler killed it rather than show it a damaged page
                return failure
        if not isinstance(error, TargetGone) and not self._killed():
            return None
        return RebuildFailed(
            "the copy was killed while it was built",
            subject=self._subject,
            cure="Look for who did it: memory that ran out (dmesg), or a person",
        )

    def _end(self) -> None:
        self._stub.close()
        if self._filler is not None:
            if self._filler.progress().start_ns:
                self._filler.wait(_GONE_S)  # it sees that the copy is gone and ends in order
            self._filler.close()

    def _killed(self) -> bool:
        """Dead, dying (without memory) or with a SIGKILL before it."""
        try:
            status = procfs.read_status(self._stub.pid)
        except TargetGone:
            return True
        pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
        return "VmSize" not in status or bool(pending & 1 << signal.SIGKILL - 1)

    def _run_leader(self, calls: Iterable[Call]) -> None:
        self._stub.run([(0, call) for call in calls])

    def _describe_memory(self) -> None:
        """To the kernel; from then on the files are not needed."""
        # The kernel refuses to replace the program while its file is mapped: where the copy runs the same one it stays.
        exe = _KEEP_EXE if _is_our_program(self._prepared.exe_fd) else self._helpers[self._prepared.exe_fd]
        # alone: only then its data, with pointers inside, lies at the scratch's beginning
        self._run_leader([memory.mm_map_call(self._prepared.memory, exe, self._stub.scratch + DATA_OFFSET)])
        self._run_leader(Call(f"close helper {n}", NR["close"], (n,)) for n in self._helpers.values())

    def _start_filler(self) -> None:
        """Where regions are lazy; with everything in that must be there before the copy runs."""
        if not self._prepared.mapping.lazy:
            return
        ranges = []
        for index in self._prepared.mapping.lazy:
            region = self._manifest.regions[index]
            ranges.append(Range(region.start, region.end, (region.slot or 0) // PAGE, index, region.huge))
        filler = Filler(self._stub.take_uffd(), self._stub.pidfd, self._spool, ranges, self._subject)
        self._filler = filler
        # the userfaultfd must end with the filler, so the copy may not hold it
        self._run_leader([Call("close its userfaultfd", NR["close"], (self._stub.uffd_number,))])
        if self._full:
            self._spool.require(0, self._manifest.pages_size // PAGE)
            filler.fill_all()
        else:
            addresses = self._pages_of_thread_ends()
            for address in addresses:
                at = self._t0.region(address)
                if at is not None and at.slot is not None:
                    self._spool.require((at.slot + address - at.start) // PAGE, 1)
            filler.fill_now(addresses)
        self._stub.pin(False)  # the filler's threads inherit where we may run
        filler.start()
        self._stub.pin(True)

    def _pages_of_thread_ends(self) -> list[int]:
        states = {state.host_tid: state for state in self._prepared.threads.threads}
        addresses = [
            address
            for thread in self._manifest.threads
            for address in t0.exit_pages(self._t0, thread, states[thread.host_tid].clear_child_tid)
        ]
        return sorted({address & ~(PAGE - 1) for address in addresses})

    def _make_threads(self) -> None:
        for thread in self._manifest.threads[1:]:
            self._stub.add_thread(thread.tid)
        calls = self._prepared.build.calls
        self._stub.run(calls.get(Stage.THREAD, []))

    def _queued_signals(self) -> Iterable[tuple[int, Call]]:
        """Signals that were pending at T0. All is blocked meanwhile, and a process may send itself any siginfo."""
        pid = self._manifest.process.pid
        for info in self._manifest.shared_pending:
            number = int.from_bytes(info[:4], "little")
            yield 0, Call(f"queue signal {number}", NR["rt_sigqueueinfo"], (pid, number, info))
        for thread in self._manifest.threads:
            for info in thread.pending:
                number = int.from_bytes(info[:4], "little")
                arguments = (pid, thread.tid, number, info)
                yield (
                    thread.tid,
                    Call(f"queue signal {number} of thread {thread.tid}", NR["rt_tgsigqueueinfo"], arguments),
                )

    def _finish(self) -> None:
        """What starts running (timers) comes late, then the end of privileges, and what is pending."""
        calls = self._prepared.build.calls
        self._stub.run(calls.get(Stage.FINISH, []))
        self._stub.run(calls.get(Stage.CREDENTIALS, []))
        for queued in self._queued_signals():  # one by one: a batch of calls would take a SIGTRAP for its own
            self._stub.run([queued])

    def _act_from_outside(self) -> None:
        for what, act in self._prepared.build.actions:
            try:
                act(self._stub.host_tids)
            except OSError as error:
                raise RebuildFailed(
                    f"cannot {what}", subject=self._subject, syscall=error.filename or "", errno=error.errno or 0
                ) from None

    def _images(self) -> list[Image]:
        size = self._stub.xstate_size
        images = []
        for thread in self._manifest.threads:
            if len(thread.xstate) > size:
                raise RebuildFailed(
                    f"thread {thread.tid} has {len(thread.xstate)} bytes of processor state, here it is {size}",
                    subject=self._subject,
                    cure="Restore it on a processor with the source's features",
                )
            # the layout is the architecture's, so a longer image has room for features that were not there
            xstate = thread.xstate + bytes(size - len(thread.xstate))
            registers = t0.start_registers(self._t0, thread)
            images.append(Image(self._stub.host_tids[thread.tid], registers, xstate, thread.sigmask))
        return images

    def _copy(self) -> Copy:
        stub = self._stub
        return Copy(
            pid=stub.pid,
            inner_pid=self._manifest.process.pid,
            init_pid=stub.init_pid,
            first_instruction_ns=stub.first_ns,
            pidfd=os.dup(stub.pidfd),
            init_pidfd=os.dup(stub.init_pidfd) if stub.init_pid else -1,
            warnings=tuple(self._prepared.build.warnings),
            filler=self._filler,
            early=self._early,
        )
