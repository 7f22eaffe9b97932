"""The destination of a clone or a move: one session from the first connection to the last page.

Everything that comes is untrusted. One thread, the main one, builds the copy (ptrace belongs to it) and decides;
control connections and the door put what they find into its inbox. Pages come in native threads. A connection that is
lost is waited for: the copy's threads wait in their faults meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from tuimig import __version__
from tuimig.core import destination, hello, procfs, wire
from tuimig.core.control import SILENCE_S, Control, Inbox, Lost
from tuimig.core.destination import Copy
from tuimig.core.door import Caller, Door
from tuimig.core.errors import (
    Cancelled,
    ConnectionLost,
    Obstacle,
    ProtocolError,
    TargetGone,
    TuimigError,
    Unsupported,
)
from tuimig.core.journal import Journal
from tuimig.core.manifest import Manifest, Outline
from tuimig.core.model import PAGE, Options, PortMap
from tuimig.core.skeleton import Skeleton, sketch
from tuimig.core.snapshot.validate import fault, outline_fault
from tuimig.core.stream import DEMAND, PAGES, Arrival, ArrivingSpool

STATUS_S: Final = 0.2
TICK_S: Final = 0.05
KINDS: Final = {"demand": DEMAND, "pages": PAGES}
NO_DIGEST: Final = "0" * 32
MOST_STREAMS: Final = 40  # of one attempt, and those that are made for the next one
RECORDS_MOST: Final = 1 << 19
AGE_MOST_NS: Final = 60 * 10**9  # of an outline; what claims more is of another clock
FIRST_WAIT_S: Final = 120.0  # for a source that has said Open and nothing else


class Abandoned(Exception):
    """The source has given this attempt up."""


@dataclass(slots=True)
class _Pages:
    """What comes over the page streams of one attempt, before T0 and after."""

    epoch: int
    pages_fd: int
    spool: ArrivingSpool
    arrival: Arrival

    @classmethod
    def make(cls, epoch: int, n_pages: int, meanwhile: Callable[[], None], early_most: int = 0) -> _Pages:
        pages_fd = os.memfd_create("tuimig-spool", os.MFD_CLOEXEC)
        spool: ArrivingSpool | None = None
        try:
            spool = ArrivingSpool(pages_fd, n_pages, meanwhile)
            spool.arrival = Arrival(spool, epoch, early_most)
        except BaseException:
            if spool is not None:
                spool.close()
            os.close(pages_fd)
            raise
        return cls(epoch, pages_fd, spool, spool.arrival)

    def close(self) -> None:
        self.arrival.close()
        self.spool.close()
        if self.pages_fd >= 0:
            os.close(self.pages_fd)
            self.pages_fd = -1


@dataclass(slots=True)
class _Attempt:
    """One image and what is made of it."""

    image: wire.Image
    manifest: Manifest
    pages: _Pages
    phase: str = "arriving"
    go: bool = False
    copy: Copy | None = None
    running: wire.Running | None = None
    filled: wire.Filled | None = None

    def close(self) -> None:
        if self.copy is not None:
            self.copy.close()
            self.copy = None
        self.pages.close()


@dataclass(slots=True)
class Receiver:
    """`run` returns when the copy has all its pages and the source has said so, or nothing is left of it."""

    first: wire.Open
    fd_in: int
    fd_out: int
    notify: Callable[[str], None] = lambda _: None
    _inbox: Inbox = field(default_factory=queue.SimpleQueue)
    _control: Control | None = None
    _lost_at: float = 0.0
    _settings: wire.Settings | None = None
    _most: int = 0  # pages of before T0
    _known: int = 0  # pages that the process had when it was looked at
    _early: _Pages | None = None  # of an attempt that is to have its image yet
    _skeleton: Skeleton | None = None  # of the same
    _attempt: _Attempt | None = None
    _next: wire.Image | None = None
    _caller: Caller | None = None  # of the control connection, where it is not the first one
    _streams: list[Caller] = field(default_factory=list)
    _ended: bool = False
    _cancelled: bool = False
    _told_at: float = 0.0
    _journal: Journal | None = None
    _keep_journal: bool = False
    _began: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        self._cancelled = True

    def run(self) -> None:
        self._control = Control(self.fd_in, self.fd_out, self._inbox, large=True)
        with Door(self.first.session, self._inbox) as door:
            try:
                self._serve()
            except TuimigError as error:
                self._say_failed(error, ran=self._attempt is not None and self._attempt.running is not None)
                raise
            finally:
                door.close()
                if self._attempt is not None:
                    self._attempt.close()
                self._drop_early()
                self._dismiss(self._streams)
                if self._journal is not None:
                    self._journal.close(keep=self._keep_journal)
                if self._control is not None:
                    self._control.close()
                if self._caller is not None:
                    self._caller.close()

    # ------------------------------------------------------------ the course of it

    def _serve(self) -> None:
        while not self._ended:
            self._pump(TICK_S)
            if self._early is not None:
                self._status("precopy", paced=True)
            while self._next is not None:
                image, self._next = self._next, None
                try:
                    self._take(image)
                except Abandoned:
                    self._drop()

    def _take(self, image: wire.Image) -> None:
        """One image to its end: arrive, build, run, fill."""
        self._attempt = attempt = self._open(image)
        self._adopt_streams()
        copy = self._build(attempt)
        attempt.copy = copy
        attempt.phase = "running"
        attempt.running = wire.Running(
            epoch=image.epoch,
            pid=copy.pid,
            inner_pid=copy.inner_pid,
            init_pid=copy.init_pid or 0,
            first_ns=copy.first_instruction_ns,
            warnings=list(copy.warnings)[:1000],
            early=copy.early,
        )
        self._send(attempt.running)
        if self._journal:
            with contextlib.suppress(TuimigError, OSError):  # it may have ended already
                self._journal.write("running", pid=copy.pid, started=procfs.start_time(copy.pid))
        try:
            self._fill(attempt, copy)
        except BaseException:
            self._kill(attempt)
            raise

    def _open(self, image: wire.Image) -> _Attempt:
        manifest = _manifest(image.manifest)
        n_pages = manifest.pages_size // PAGE
        if self._early is not None and self._early.epoch != image.epoch:
            self._drop_early()
        pages, self._early = self._early, None
        if pages is None:
            self._drop_skeleton()
            pages = _Pages.make(image.epoch, n_pages, self._meanwhile)
        try:
            pages.arrival.expect(n_pages, image.expected, image.kept)
            _check_places(manifest, image.expected)
        except BaseException:
            pages.close()
            raise
        return _Attempt(image, manifest, pages, go=image.go)

    def _precopy(self, message: wire.Precopy) -> None:
        """Pages come before T0."""
        if message.most > self._most:
            raise ProtocolError(f"the source announces {message.most} pages before T0; {self._most} are taken")
        self._drop_early()
        self._early = _Pages.make(message.epoch, message.pages, self._meanwhile, message.most)
        self._adopt_streams()

    def _sketch(self, message: wire.Sketch) -> None:
        """Lay its memory out while the pages come."""
        self._drop_skeleton()
        outline = _outline(message.outline)
        assert self._settings is not None
        age_ns = time.monotonic_ns() - message.at_ns
        self._skeleton = sketch(outline, _options(self._settings), age_ns if 0 < age_ns < AGE_MOST_NS else 0)

    def _drop_early(self) -> None:
        if self._early is not None:
            self._early.close()
            self._early = None
        self._drop_skeleton()

    def _drop_skeleton(self) -> None:
        if self._skeleton is not None:
            self._skeleton.close()
            self._skeleton = None

    def _build(self, attempt: _Attempt) -> Copy:
        assert self._settings is not None
        options = _options(self._settings)
        if self._settings.verb == "move" and self._journal is None:
            process = attempt.manifest.process
            self._journal = Journal(self.first.session, "destination", comm=process.comm, inner_pid=process.pid)
        self._status("restore")
        skeleton, self._skeleton = self._skeleton, None
        return destination.build(
            attempt.manifest,
            attempt.pages.spool,
            options,
            self.notify,
            self._may_run,
            source_ends=self._settings.verb == "move",
            skeleton=skeleton,
        )

    def _may_run(self) -> None:
        """Only the last step is left: the source's word is waited for."""
        attempt = self._attempt
        assert attempt is not None
        attempt.phase = "built"
        if self._journal:
            self._journal.write("built")
        self._send(wire.Built(attempt.image.epoch))
        while not attempt.go:
            self._pump(TICK_S)
        if self._journal:
            self._journal.write("running")
            self._keep_journal = True

    def _fill(self, attempt: _Attempt, copy: Copy) -> None:
        self._status("fill")
        poisoning = False
        while not self._is_filled(copy, poisoning):
            try:
                self._pump(0.04)
            except ConnectionLost:
                if self._settings is None or self._settings.on_loss != "poison" or copy.filler is None:
                    raise
                if not poisoning:
                    copy.filler.poison_missing()
                    poisoning = True
                time.sleep(TICK_S)
            self._status("fill", paced=True)
        if (progress := copy.fill_progress()) and progress.poisoned:
            copy.close()
            attempt.copy = None
            raise ConnectionLost(
                f"the source is gone for good; {progress.poisoned} pages of the copy never came and are poisoned: "
                "who touches one gets SIGBUS"
            )
        if self._journal:
            self._journal.write("filled")
        attempt.phase = "filled"
        fill = copy.fill_progress()
        fill_us = max(0, fill.end_ns - copy.first_instruction_ns) // 1000 if fill else 0
        attempt.filled = wire.Filled(attempt.image.epoch, fill_us, self._figures("fill"))
        self._status("fill")
        self._send(attempt.filled)
        copy.close()  # the copy lives on without us
        attempt.copy = None
        with contextlib.suppress(ConnectionLost):  # a source that is gone has nothing to say any more
            while not self._ended:
                self._pump(TICK_S)
            self._keep_journal = False

    def _is_filled(self, copy: Copy, poisoning: bool) -> bool:
        try:
            return copy.wait_filled(0.01)
        except TargetGone:
            if not poisoning:
                raise
            raise ConnectionLost(
                "the source is gone for good; pages of the copy that never came were poisoned, and it has ended since"
            ) from None

    def _kill(self, attempt: _Attempt) -> None:
        if attempt.copy is not None:
            attempt.copy.kill()
            attempt.copy.reap()

    def _drop(self) -> None:
        if self._attempt is not None:
            self._kill(self._attempt)
            self._attempt.close()
            self._attempt = None

    # ------------------------------------------------------------ what comes

    def _meanwhile(self) -> None:
        """While pages are waited for."""
        while True:
            try:
                self._one(self._inbox.get_nowait())
            except queue.Empty:
                break
        self._watch()

    def _pump(self, timeout_s: float) -> None:
        try:
            self._one(self._inbox.get(timeout=timeout_s))
        except queue.Empty:
            self._watch()
            return
        self._meanwhile()

    @property
    def _pages(self) -> _Pages | None:
        """Those that come now."""
        return self._attempt.pages if self._attempt is not None else self._early

    def _watch(self) -> None:
        if self._cancelled:
            raise Cancelled("cancelled at the destination")
        pages = self._pages
        if pages is not None and pages.arrival.progress().broken:
            raise pages.arrival.failure() or ProtocolError("the source breaks the protocol")
        if self._settings is None and time.monotonic() - self._began > FIRST_WAIT_S:
            raise ConnectionLost("the source has not said what it wants")
        if self._control is None:
            # The source may notice the loss later than we do.
            patience = self._settings.reconnect_s + SILENCE_S if self._settings else 0.0
            if time.monotonic() - self._lost_at > patience:
                raise self._given_up(patience)

    def _given_up(self, patience_s: float) -> ConnectionLost:
        what = f"the source was lost, and has not come back within {patience_s:.0f} s"
        attempt, journal = self._attempt, self._journal
        if journal is None or attempt is None or attempt.phase not in ("running", "filled"):
            return ConnectionLost(what, cure="Look there, and begin again")
        process = attempt.manifest.process
        fate = "has every page and runs on" if attempt.phase == "filled" else "ran without all of its pages"
        return ConnectionLost(
            f"{what}. This was a move of process {process.host_pid} ({process.comm}) after its hand-over: the copy "
            f"{fate}, the source is stopped there and keeps all of its memory",
            cure=f"docs/moving.md says what to do; the journal is {journal.path}",
        )

    def _one(self, item: Any) -> None:
        match item:
            case Lost():
                if item.control is self._control:
                    self._control_lost(item.error)
            case Caller():
                self._called(item)
            case (control, message):
                if control is self._control:
                    self._message(message)

    def _control_lost(self, error: TuimigError) -> None:
        assert self._control is not None
        self._control.close()
        self._control = None
        self._lost_at = time.monotonic()
        if isinstance(error, ProtocolError):
            raise error

    def _called(self, caller: Caller) -> None:
        if caller.open.kind == "control":
            if self._control is not None:
                self._control.close()
            if self._caller is not None:
                self._caller.close()
            if self._pages is not None:
                self._pages.arrival.stop()
            self._dismiss(self._streams)  # the source makes new ones
            self._control, self._caller = Control(*caller.take(), self._inbox, large=True), caller
            self._send(self._state())
            return
        if caller.open.kind not in KINDS or len(self._streams) >= MOST_STREAMS:
            caller.close()
            return
        self._streams.append(caller)
        epoch = caller.open.epoch
        self._send(wire.Joined(epoch, sum(stream.open.epoch == epoch for stream in self._streams)))
        self._adopt_streams()

    def _adopt_streams(self) -> None:
        """Streams of this attempt; those of a later one wait for it."""
        pages = self._pages
        if pages is None:
            return
        self._dismiss([caller for caller in self._streams if caller.open.epoch < pages.epoch])
        for caller in self._streams:
            if caller.fd_in >= 0 and caller.open.epoch == pages.epoch:
                pages.arrival.add(*caller.take(), KINDS[caller.open.kind])

    def _dismiss(self, callers: list[Caller]) -> None:
        """Streams that nobody reads any more; the processes that brought them may end."""
        for caller in list(callers):
            self._streams.remove(caller)
            caller.close()

    def _message(self, message: wire.Message) -> None:
        attempt = self._attempt
        match message:
            case wire.Hello() if self._settings is None:
                self._greet(message)
            case wire.Precopy() if self._settings is not None:
                if attempt is not None:
                    raise ProtocolError("the source announces pages of another attempt beside this one")
                if self._early is None or message.epoch > self._early.epoch:  # else it was on its way twice
                    self._precopy(message)
            case wire.Sketch() if self._settings is not None:
                if self._early is not None and message.epoch == self._early.epoch:
                    self._sketch(message)
            case wire.Image() if self._settings is not None:
                if attempt is not None and message.epoch <= attempt.image.epoch:
                    return  # it was on its way twice
                self._next = message
                if attempt is not None:
                    raise Abandoned
            case wire.Abandon() if self._next is not None and self._next.epoch == message.epoch:
                self._next = None
            case wire.Go() if self._next is not None and self._next.epoch == message.epoch:
                self._next = msgspec.structs.replace(self._next, go=True)  # it came right behind its image
            case wire.Abandon():
                if attempt is not None and attempt.image.epoch == message.epoch and attempt.phase != "filled":
                    raise Abandoned
            case wire.Go():
                if attempt is not None and attempt.image.epoch == message.epoch:
                    attempt.go = True
            case wire.Clock():
                self._send(wire.Clock(time.monotonic_ns()))
            case wire.End():
                self._ended = True
                if attempt is None or attempt.phase not in ("filled",):
                    raise ConnectionLost("the source ended the session")
            case _:
                raise ProtocolError(f"the source sent {type(message).__name__} where it must not")

    def _greet(self, message: wire.Hello) -> None:
        settings = message.settings
        if settings.verb not in ("clone", "move") or settings.on_loss not in ("kill", "poison"):
            raise ProtocolError("the source asks for something unknown")
        if settings.stdio == "inherit":
            raise ProtocolError("a copy cannot inherit the connection")
        self._settings = settings
        self._most = wire.early_most(message.needs.memory)
        self._known = message.needs.memory // PAGE
        destination.warm_up()
        gc.freeze()  # what is there now stays: no collection has to go through it
        obstacles, privilege = hello.missing(message.needs, settings.pid_namespace)
        facts = [wire.Fact(o.name, o.where[:4096], o.why[:4096], o.cure[:4096], o.asks) for o in obstacles]
        here = os.uname()
        self._send(wire.Answer(__version__, here.release, here.nodename, facts[:1000], privilege))

    # ------------------------------------------------------------ what is said

    def _send(self, message: wire.Message) -> None:
        """What is lost is said again by State, when there is a connection again; the inbox tells the loss."""
        if self._control is not None:
            with contextlib.suppress(ConnectionLost):
                self._control.send(message)

    def _say_failed(self, error: TuimigError, *, ran: bool) -> None:
        epoch = self._attempt.image.epoch if self._attempt is not None else 0
        with contextlib.suppress(TuimigError):
            self._send(wire.Failed(epoch, trouble_of(error), ran))

    def _state(self) -> wire.State:
        attempt = self._attempt
        if attempt is None and self._early is not None:
            return wire.State(self._early.epoch, "precopy", b"", None, None)
        if attempt is None:
            return wire.State(0, "waiting", b"", None, None)
        present = attempt.pages.arrival.present()
        return wire.State(attempt.image.epoch, attempt.phase, present, attempt.running, attempt.filled)

    def _status(self, phase: str, *, paced: bool = False) -> None:
        now = time.monotonic()
        if paced and now - self._told_at < STATUS_S:
            return
        self._told_at = now
        records = b""
        copy = self._attempt.copy if self._attempt is not None else None
        if copy is not None and copy.ring is not None:
            while (batch := copy.ring.drain().records) and len(records) < RECORDS_MOST:
                records += batch
        self._send(wire.Status(self._figures(phase), records))

    def _figures(self, phase: str) -> wire.Figures:
        """What is filled of the copy; before it runs, what has arrived of what is known to come."""
        attempt, come = self._attempt, self._pages.arrival.progress() if self._pages is not None else None
        if come is None:
            return wire.Figures(phase)
        if attempt is None:
            return wire.Figures(phase, max(self._known, come.sent), come.sent, come.sent)
        copy = attempt.copy
        fill = copy.fill_progress() if copy is not None else None
        faults = copy.ring.histogram if copy is not None and copy.ring is not None else None
        trips = attempt.pages.arrival.round_trips()
        return wire.Figures(
            phase=phase,
            pages=fill.pages if fill else come.expected,
            filled=fill.filled + fill.gone if fill else come.sent,
            arrived=come.sent,
            demand_faults=fill.demand_faults if fill else 0,
            faults=faults.buckets if faults else (),
            faults_most_ns=faults.most_ns if faults else 0,
            trips=trips.buckets,
            trips_most_ns=trips.most_ns,
            faults_dropped=copy.ring.dropped if copy is not None and copy.ring is not None else 0,
        )


def trouble_of(error: TuimigError) -> wire.Trouble:
    obstacles: tuple[Obstacle, ...] = error.obstacles if isinstance(error, Unsupported) else ()
    return wire.Trouble(
        kind=type(error).__name__,
        what=error.what[:4096],
        subject=error.subject[:4096],
        syscall=error.syscall[:4096],
        errno=error.errno,
        cure=error.cure[:4096],
        obstacles=tuple(
            wire.Fact(o.name, o.where[:4096], o.why[:4096], o.cure[:4096], o.asks) for o in obstacles[:1000]
        ),
    )


def _manifest(data: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the source's manifest is malformed: {error}") from None
    regions = [
        region if region.slot is None else msgspec.structs.replace(region, digest=NO_DIGEST, pages=0)
        for region in manifest.regions
    ]
    manifest = msgspec.structs.replace(manifest, regions=regions)
    if wrong := fault(manifest):
        raise ProtocolError(f"the source's manifest makes no sense: {wrong}")
    return manifest


def _outline(data: bytes) -> Outline:
    try:
        outline = msgspec.json.decode(data, type=Outline)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the source's outline is malformed: {error}") from None
    if wrong := outline_fault(outline):
        raise ProtocolError(f"the source's outline makes no sense: {wrong}")
    return outline


def _check_places(manifest: Manifest, expected: bytes) -> None:
    """Every expected page lies in the place of a region."""
    places = sorted((r.slot // PAGE, (r.slot + r.size) // PAGE) for r in manifest.regions if r.slot is not None)
    at = 0
    for first, count in struct.iter_unpack("<QQ", expected):
        end = first + count
        while first < end:
            while at < len(places) and places[at][1] <= first:
                at += 1
            if at == len(places) or places[at][0] > first:
                raise ProtocolError("the source announces pages that belong to no region")
            first = min(end, places[at][1])


def _options(settings: wire.Settings) -> Options:
    return Options(
        map_ports=tuple(PortMap(old, new) for old, new in settings.map_ports),
        map_paths=tuple((old, new) for old, new in settings.map_paths),
        pid_namespace=settings.pid_namespace,
        tcp=settings.tcp,
        stdio=settings.stdio,
        full=settings.full,
        yes=settings.yes,
    )
