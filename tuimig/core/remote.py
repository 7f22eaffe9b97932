"""Clone and move to another host: the source's session, with a destination that takes pages while they are captured.

A clone's source runs on from T0; its copy may run once the end scan has passed, or at once under the guard. A move's
source stays stopped from T0. Before the hand-over any failure lets it run on; from then on it stays stopped, whatever
happens here, until the destination has every page; then it is ended (docs/moving.md).
"""

from __future__ import annotations

import contextlib
import select
import signal
import threading
import time
from dataclasses import replace
from typing import Final

import msgspec

from tuimig.core import dump, hello, precopy, procfs, stream, wire
from tuimig.core.control import SILENCE_S
from tuimig.core.errors import (
    Cancelled,
    ConnectionLost,
    HandOverFailed,
    ProtocolError,
    TargetGone,
    TuimigError,
    UsageError,
)
from tuimig.core.journal import MOST_COMMAND, Journal
from tuimig.core.manifest import Manifest
from tuimig.core.model import (
    RECORD,
    Connection,
    Faults,
    Gate,
    Handover,
    Histogram,
    Listener,
    Note,
    Options,
    Phase,
    Plan,
    Progress,
    Report,
)
from tuimig.core.peer import AGAIN_S, Peer, error_of
from tuimig.core.policy import Policy
from tuimig.core.session import Relay, Session, memory_file
from tuimig.core.snapshot.validate import outline_fault
from tuimig.core.source import Counters, Source
from tuimig.core.spool import Spool
from tuimig.core.transport import Destination

TICK_S: Final = 0.05
HALT_S: Final = 1.0  # for the confirmation of what is on its way
QUICK_S: Final = 0.002  # while something that others wait for is near
END_S: Final = 5.0  # for a killed process to be gone


class RemoteSession(Session):
    """A Session whose clones and moves go elsewhere."""

    def __init__(self, listener: Listener, *, detail: bool = False, gate: Gate | None = None) -> None:
        super().__init__(listener, detail=detail, gate=gate)
        self._again = threading.Event()

    def reconnect(self) -> None:
        """A connection that is lost is tried at once, and has its whole time again. May be called from any thread."""
        self._again.set()

    def clone_to(self, pid: int, to: Destination, policy: Policy, options: Options) -> Report:
        """A live copy there; the source runs on."""
        return self._transfer("clone", pid, to, policy, options)

    def move_to(self, pid: int, to: Destination, policy: Policy, options: Options) -> Report:
        """It goes on there; the source ends when the destination has every page. HandOverFailed: see docs/moving.md."""
        return self._transfer("move", pid, to, policy, options)

    def _transfer(self, verb: str, pid: int, to: Destination, policy: Policy, options: Options) -> Report:
        begin = time.monotonic_ns()
        if options.stdio == "inherit":
            raise UsageError("a copy elsewhere cannot inherit our terminal", cure="Use --stdio null or a file")
        stream.check_encoding(options.compress)
        with contextlib.ExitStack() as stack:
            look = stack.enter_context(procfs.look(pid, options))
            pages_fd = stack.enter_context(memory_file())
            self._enter("look")
            plan = self._plan(look, policy, verb)
            self._waited("connect")
            self._enter("connect")
            peer = Peer(to, options)
            stack.callback(peer.close)
            self._say(Connection("connecting", to.text))
            needs = hello.needs(look, options, options.compress)
            for obstacle in peer.open(needs, _settings(verb, options)):
                self._say(Note(f"accepted: {obstacle}"))
            self._say(Connection("connected", to.text))
            relay = _Relay(self, verb, peer, options, look, wire.early_most(needs.memory))
            self._relay = relay
            stack.callback(relay.close)
            stack.push(relay.left)
            captured = stack.enter_context(self._capture(look, plan, policy, pages_fd))
            if verb == "clone":
                relay.finish_clone()
            else:
                relay.finish_move()
            report = relay.report(captured.report, captured.t0_ns)
        return replace(report, total_us=(time.monotonic_ns() - begin) // 1000)

    # what the relay uses

    def say(self, event: Connection | Handover | Faults | Progress | Phase | Note) -> None:
        self._say(event)

    def show_source(self, source: Source) -> None:
        self._show_source(source)

    def enter(self, phase: str) -> None:
        self._enter(phase)

    def wait_for_key(self, phase: str) -> None:
        self._waited(phase)

    def wait_to_reconnect(self, timeout_s: float) -> bool:
        """Until the next attempt; True: somebody has asked for it."""
        asked = self._again.wait(timeout_s)
        self._again.clear()
        return asked

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled


def _settings(verb: str, options: Options) -> wire.Settings:
    return wire.Settings(
        verb=verb,
        map_ports=[(pair.old, pair.new) for pair in options.map_ports],
        map_paths=list(options.map_paths),
        pid_namespace=options.pid_namespace,
        tcp=options.tcp,
        stdio=options.stdio,
        full=options.full,
        yes=options.yes,
        on_loss=options.on_loss,
        reconnect_s=options.reconnect_s,
    )


class _Relay(Relay):
    """The protocol of one transfer, as the source sees it. Everything happens in the thread of the session."""

    def __init__(
        self,
        session: RemoteSession,
        verb: str,
        peer: Peer,
        options: Options,
        look: procfs.LiveLook,
        early_most: int,
    ) -> None:
        self._session = session
        self._verb = verb
        self._peer = peer
        self._options = options
        self._look = look
        self.hold = verb == "move"
        self.tracks = True
        self._epoch = 0
        self._sender: stream.Sender | None = None
        self._early_most = early_most
        self._sketch: wire.Sketch | None = None  # of the process before T0
        self._early: wire.Precopy | None = None  # pages of before T0 go over
        self._backlog: int | None = None  # pages to send, after the last round
        self._waits = True  # for the backlog
        self._early_bytes = 0  # on the wire before T0
        self._image: wire.Image | None = None
        self._source: Source | None = None
        self._go = False
        self._built = False
        self._running: wire.Running | None = None
        self._filled: wire.Filled | None = None
        self._figures = wire.Figures("")
        self._there = ""  # phase of the destination
        self._reconnects = 0
        self._journal: Journal | None = None
        self._keep_journal = False
        self._told_at = 0.0
        self._counters: Counters | None = None  # of the source, as long as it was looked at

    # ------------------------------------------------------------ the steps of an attempt

    def prepare(self) -> None:
        if self._epoch and self._image is None and self._early is None:
            return  # the last freeze failed before anything was sent
        self._epoch += 1
        self.let_go()
        self._image = self._early = None
        self._sketch = None
        self._early_bytes = 0
        self._backlog, self._waits = None, True
        self._go = self._built = False
        self._running = self._filled = None
        self._counters = self._source = None
        self._peer.prepare_streams(self._epoch)

    def outlined(self, look: procfs.LiveLook, plan: Plan) -> None:
        with contextlib.suppress(TuimigError, OSError, ValueError):  # what is in the way at T0 is said then
            outline, at_ns = dump.outline(look, plan)
            if outline_fault(outline) is None:  # a list of regions that was read while it changed may be none
                at_ns += self._peer.clock_offset_ns
                self._sketch = wire.Sketch(self._epoch, msgspec.json.encode(outline), at_ns)

    def precopying(self, spool: Spool) -> None:
        if self._sender is None:
            self._sender = self._make_sender(spool)
            self._sender.early(self._early_most)
            self._early = wire.Precopy(self._epoch, spool.room, self._early_most)
            self._peer.give_streams(self._sender)
            self._send(self._early)
            if self._sketch is not None:
                self._send(self._sketch)
        self._step(0)

    def catches_up(self) -> bool:
        """While rounds leave less and less to be sent.

        From then on the rest goes after T0, and rounds follow each other quickly: so the freeze is short on any line.
        """
        assert self._sender is not None
        before, self._backlog = self._backlog, self._sender.backlog()
        self._waits = self._waits and (before is None or self._backlog <= precopy.SHRINKS * before)
        return self._waits

    def behind(self) -> bool:
        assert self._sender is not None
        return self._sender.backlog() > 0

    def settle(self) -> None:
        """Everything that was given is there: what is on its way at T0 might be older than it."""
        assert self._sender is not None
        while not self._sender.halt(HALT_S):
            self._step(0)
            self._stop_if_cancelled()
        self._early_bytes = self._sender.progress().bytes

    def _make_sender(self, spool: Spool) -> stream.Sender:
        options = self._options
        return stream.Sender(
            spool,
            epoch=self._epoch,
            encoding=options.compress,
            bandwidth=options.bandwidth,
            streams=options.streams,
        )

    def began(self, source: Source, manifest: Manifest, spool: Spool) -> None:
        while not source.progress().eager_stored:
            source.wait(1)
        self._source = source
        expected, urgent = stream.content_runs(source), stream.content_runs(source, eager_only=True)
        if self._sender is None:
            self._sender = self._make_sender(spool)
        # A clone is exact without an end scan where the guard was there from the start, or nothing is left to a window.
        exact = self._options.guard == "on" or not any(source.region_sizes()[1])
        go = self._verb == "clone" and exact and not self._options.verify
        # Whoever waits for the copy to run waits for it alone: until then the rest would only be in its way.
        self._sender.urgent_only((go or self.hold) and not self._options.full)
        kept = self._sender.expect(source, expected, urgent)
        self._image = wire.Image(self._epoch, msgspec.json.encode(manifest), expected, urgent, go, kept)
        self._handover("frozen", "building")
        if self.hold:
            process = manifest.process
            started = self._look.identity.started
            command = (" ".join(process.cmdline) or process.comm)[:MOST_COMMAND]
            about = {"pid": process.host_pid, "started": started, "to": self._peer.to.text, "command": command}
            self._journal = Journal(self._peer.session, "source", **about)
            self._journal.write("frozen")
        if self._early is None:
            self._peer.give_streams(self._sender)
        self._send(self._image)
        if self.hold:
            self._move(source)

    def tick(self) -> None:
        self._step(0)

    def _count(self) -> Counters | None:
        """The source's counters; the last ones where it has been let go of."""
        if self._source is not None:
            self._counters = self._source.progress()
        return self._counters

    def captured(self) -> None:
        self._count()
        self._source = None
        if self._sender is not None:
            self._sender.source_over()

    def end(self, source: Source) -> None:
        if not self.hold:
            source.end()
            return
        # every page is there and the copy runs: this is the end of the source
        self._send_signal(signal.SIGKILL)
        with contextlib.suppress(TargetGone):
            source.end()

    def finish_move(self) -> None:
        """The source is let go of: a tracer that still held a thread of it would keep its end from being seen."""
        poll = select.poll()
        poll.register(self._look.identity.pidfd, select.POLLIN)
        if not poll.poll(END_S * 1000):
            raise HandOverFailed(
                f"the source, process {self._look.pid}, was told to end and has not yet",
                cure="Its copy runs and has every page; end it by hand: kill -9",
            )
        if self._journal:
            self._journal.write("ended")
        self._keep_journal = False
        self._handover("ended", "filled")
        with contextlib.suppress(ConnectionLost):
            self._peer.send(wire.End())

    def failed(self, error: BaseException) -> None:
        """The attempt was lost: what was built of it there must go."""
        self._source = None
        if self._sender is not None:
            self._sender.source_over()
        if not self._handed_over:
            self._handover("runs", "failed")
            with contextlib.suppress(TuimigError):
                self._peer.send(wire.Abandon(self._epoch, str(error)[:4000]))
        self.let_go()

    def left(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """The destination need not wait for a source that gives up by itself; what it built goes at once."""
        if kind is not None and not self._handed_over:
            with contextlib.suppress(TuimigError):
                self._peer.send(wire.Abandon(self._epoch, str(error)[:4000]))
                self._peer.send(wire.End())

    def close(self) -> None:
        self.let_go()
        if self._journal is not None:
            self._journal.close(keep=self._keep_journal)

    # ------------------------------------------------------------ clone

    def finish_clone(self) -> None:
        """The end scan has passed: it may run. Returns when the destination has every page."""
        if self._running is None:
            self._session.wait_for_key("send")
        self._session.enter("send")
        self._go = True
        self._send(wire.Go(self._epoch))
        while self._filled is None:
            self._step(TICK_S)
            self._stop_if_cancelled()
        with contextlib.suppress(ConnectionLost):
            self._peer.send(wire.End())

    def _stop_if_cancelled(self) -> None:
        if self._session.is_cancelled:
            raise Cancelled("cancelled; the source runs on as before, the copy was ended")

    # ------------------------------------------------------------ move

    @property
    def _handed_over(self) -> bool:
        return self.hold and self._go

    def _move(self, source: Source) -> None:
        """From T0 to the last page at the destination. The target is stopped throughout."""
        while not self._built:
            source.wait(0)
            self._step(QUICK_S)
            if self._session.is_cancelled:
                raise Cancelled("cancelled; the source runs on as before")
        try:
            self._hand_over()
            while self._running is None:
                self._step(QUICK_S)
            self._handover("stopped", "running")
            assert self._journal is not None
            self._journal.write("running-there", there=self._running.pid)
            self._session.enter("send")
            while self._filled is None:
                source.wait(0)
                self._session.show_source(source)
                self._step(TICK_S)
            self._journal.write("filled")
            while not source.wait(1):
                pass
        except (TuimigError, OSError) as error:
            raise self._doubt(error) from None

    def _hand_over(self) -> None:
        """The one step that cannot be taken back: from here on the source does not run again by itself.

        The stop signal waits in the target's queue. If we die, and the kernel lets go of its threads, they meet it
        before their next instruction.
        """
        assert self._journal is not None
        self._journal.write("handing-over")
        self._keep_journal = True
        self._send_signal(signal.SIGSTOP)
        self._go = True
        self._handover("stopped", "told")
        self._send(wire.Go(self._epoch))

    def _take_back(self) -> None:
        """The destination has said that the copy never ran, and is not there any more."""
        self._send_signal(signal.SIGCONT)
        self._go = False
        self._keep_journal = False

    def _send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._look.identity.pidfd, number)

    def _doubt(self, error: BaseException) -> TuimigError:
        """After the hand-over: what each side is, and what to do."""
        if not self._handed_over:
            return error if isinstance(error, TuimigError) else ConnectionLost(str(error))
        there = "running" if self._running is not None else "unknown"
        self._handover("stopped", there)
        pid, to = self._look.pid, self._peer.to.text
        if self._journal:
            with contextlib.suppress(OSError):
                self._journal.write("doubt", why=str(error))
            kept = str(self._journal.path)
        what = (
            f"the move failed after its hand-over ({error}). The source, process {pid}, is stopped and keeps all of "
            f"its memory; the copy at {to} "
        )
        poison = self._options.on_loss == "poison"
        fate = "pages that never came are poisoned there" if poison else "a copy that misses pages is ended there"
        what += "ran" if there == "running" else "may have run"
        return HandOverFailed(
            what,
            cure=f"Wait {self._options.reconnect_s + SILENCE_S:.0f} s: by then {fate}. If no copy runs there after "
            f"that: kill -CONT {pid}. Only where the journal there says `filled` it has every page: kill -9 {pid}. "
            f"The journal here is {kept}",
        )

    # ------------------------------------------------------------ messages

    def _step(self, timeout_s: float) -> None:
        """Take what has come; a lost connection is made again here."""
        try:
            message = self._peer.receive(timeout_s)
            while message is not None:
                self._take(message)
                message = self._peer.receive(0)
            if self._sender is not None:
                progress = self._sender.progress()
                if progress.broken:
                    raise self._sender.failure() or ProtocolError("the destination breaks the protocol")
                if progress.lost and self._filled is None:
                    raise self._sender.failure() or ConnectionLost("a page stream was lost")
                self._show(progress)
        except ConnectionLost as error:
            self._reconnect(error)
        except TuimigError as error:
            if type(error).__name__ != "EngineError":
                raise
            self._reconnect(ConnectionLost(error.what, subject=error.subject))

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Built():
                self._built = self._built or message.epoch == self._epoch
                if self._built:
                    self._handover("frozen", "built")
            case wire.Running():
                if message.epoch == self._epoch:
                    self._runs(message)
            case wire.Filled():
                if message.epoch == self._epoch:
                    self._filled, self._figures = message, message.figures
            case wire.Status():
                self._status(message)
            case wire.Failed():
                if message.epoch in (0, self._epoch):
                    self._fails(message)

    def _runs(self, running: wire.Running) -> None:
        self._running = running
        if self._sender is not None:
            self._sender.urgent_only(False)

    def _fails(self, message: wire.Failed) -> None:
        error = error_of(message.trouble, self._peer.to.text)
        if self._handed_over and not message.ran and self._running is None:
            self._take_back()
        raise error

    def _status(self, message: wire.Status) -> None:
        self._figures = figures = message.figures
        if figures.phase != self._there:
            self._there = figures.phase
            self._session.say(Phase(figures.phase, time.monotonic_ns(), "destination"))
        if message.records:
            self._session.say(Faults(message.records[: len(message.records) // RECORD.size * RECORD.size]))
        self._session.say(
            Progress(
                phase=figures.phase,
                pages_total=figures.pages,
                pages_done=figures.filled,
                demand_faults=figures.demand_faults,
                faults_dropped=figures.faults_dropped,
                side="destination",
                arrived_pages=figures.arrived,
                round_trip_us=Histogram(figures.trips, figures.trips_most_ns).times,
                demand_us=Histogram(figures.faults, figures.faults_most_ns).times,
            )
        )

    def _show(self, progress: stream.StreamProgress) -> None:
        now = time.monotonic()
        if now - self._told_at < 2 * TICK_S:
            return
        self._told_at = now
        if self._image is None:
            self._show_early(progress)
            return
        captured = self._count()
        self._session.say(
            Progress(
                phase="send",
                pages_total=progress.expected,
                pages_done=progress.sent,
                sent_pages=progress.sent,
                zero_pages=progress.zero_pages,
                stream_bytes=progress.stream_bytes,
                wp_faults=captured.wp_faults if captured else 0,
                swept_pages=captured.swept_pages if captured else 0,
                guard_stops=captured.guard_stops if captured else 0,
            )
        )

    def _show_early(self, progress: stream.StreamProgress) -> None:
        assert self._sender is not None
        self._session.say(
            Progress(
                phase="precopy",
                pages_total=progress.sent + self._sender.backlog(),
                pages_done=progress.sent,
                sent_pages=progress.sent,
                zero_pages=progress.zero_pages,
                stream_bytes=progress.stream_bytes,
            )
        )

    def _handover(self, here: str, there: str) -> None:
        if self.hold:
            self._session.say(Handover(here, there))

    def _send(self, message: wire.Message) -> None:
        """What is lost on the way is said again after the loss, which the next step finds behind what still came."""
        with contextlib.suppress(ConnectionLost):
            self._peer.send(message)

    # ------------------------------------------------------------ loss

    def _reconnect(self, why: ConnectionLost) -> None:
        """Try until the time is over; then both sides are where they left off, or ConnectionLost."""
        if self._filled is not None:
            return  # nothing more is needed from there
        if self._image is None and self._early is None:
            raise self._over(why)
        until = time.monotonic() + self._options.reconnect_s
        self._session.wait_to_reconnect(0)  # what was asked for before was of another loss
        while True:
            left = until - time.monotonic()
            if left <= 0:
                self._session.say(Connection("given-up", self._peer.to.text, text=str(why)))
                raise self._over(why)
            self._session.say(Connection("lost", self._peer.to.text, left, str(why)))
            if self._session.is_cancelled and not self._handed_over:
                raise Cancelled("cancelled; the source runs on as before")
            began = time.monotonic()
            try:
                if self._sender is not None:
                    self._sender.stop()
                self._peer.drop_streams()
                self._agree(self._peer.reconnect(self._epoch))
                break
            except ConnectionLost as error:
                why = error
            except TuimigError as error:  # the destination itself says no
                self._session.say(Connection("given-up", self._peer.to.text, text=str(error)))
                raise
            if self._session.wait_to_reconnect(max(0.0, AGAIN_S - (time.monotonic() - began))):
                until = time.monotonic() + self._options.reconnect_s
        self._reconnects += 1
        self._session.say(Connection("connected", self._peer.to.text))

    def _over(self, why: ConnectionLost) -> ConnectionLost:
        if not self._handed_over:
            why.cure = why.cure or "The source runs on as before; begin again"
        return why

    def _agree(self, state: wire.State) -> None:
        """Say again what was lost on the way."""
        assert self._sender is not None
        known = state.epoch == self._epoch
        if self._image is None:
            assert self._early is not None
            if not known:
                self._sender.had(b"")
            self._peer.give_streams(self._sender)
            if not known:
                self._peer.send(self._early)
            if self._sketch is not None:
                self._peer.send(self._sketch)
            return
        if not known or state.phase == "precopy":  # it has not got the image
            if not known:
                self._image = msgspec.structs.replace(self._image, kept=b"")
            self._sender.had(self._image.kept)
            self._peer.give_streams(self._sender)
            self._peer.send(self._image)
            if self._go:
                self._peer.send(wire.Go(self._epoch))
            return
        self._sender.had(state.present)
        self._peer.give_streams(self._sender)
        if state.running is not None:
            self._runs(state.running)
        if state.filled is not None:
            self._filled, self._figures = state.filled, state.filled.figures
        self._built = self._built or state.phase in ("built", "running", "filled")
        if self._go and state.phase in ("arriving", "built"):
            self._peer.send(wire.Go(self._epoch))

    def let_go(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    # ------------------------------------------------------------ the report

    def report(self, source: Report, t0_ns: int) -> Report:
        running, filled = self._running, self._filled
        assert running is not None
        assert filled is not None
        assert self._sender is not None
        progress = self._sender.progress()
        first_ns = running.first_ns - self._peer.clock_offset_ns
        downtime_us = max(0, first_ns - t0_ns) // 1000
        parts = dict(source.frozen)
        if self.hold:  # it stands still until the copy runs
            parts["there"] = max(0, downtime_us - sum(parts.values()))
        return replace(
            source,
            verb=self._verb,
            frozen=parts,
            destination=self._peer.to.text,
            frozen_us=downtime_us if self.hold else source.frozen_us,
            new_pid=running.pid,
            inner_pid=running.inner_pid,
            init_pid=running.init_pid or None,
            downtime_us=downtime_us,
            fill_us=filled.fill_us,
            demand_faults=self._figures.demand_faults,
            fault_us=Histogram(self._figures.faults, self._figures.faults_most_ns).times
            if self.hold or not source.wp_faults
            else source.fault_us,
            bytes_sent=progress.bytes,
            precopy_sent=self._early_bytes,
            skeleton=running.early,
            stream_bytes=progress.stream_bytes,
            packed_bytes=progress.packed_bytes,
            unpacked_bytes=progress.unpacked_bytes,
            round_trip_us=Histogram(self._figures.trips, self._figures.trips_most_ns).times,
            reconnects=self._reconnects,
            warnings=(*source.warnings, *running.warnings),
        )
