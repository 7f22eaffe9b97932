"""The source's side of the connections to a destination: made, greeted, watched, made again after a loss."""

from __future__ import annotations

import os
import queue
import secrets
import select
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, TypeVar

from tuimig import __version__
from tuimig.core import errors, wire
from tuimig.core.control import Control, Inbox, Lost
from tuimig.core.errors import ConnectionLost, DestinationRefused, Obstacle, TuimigError, Unsupported
from tuimig.core.model import Options
from tuimig.core.stream import DEMAND, PAGES, Sender
from tuimig.core.transport import Destination, Link, connect

ANSWER_S: Final = 60.0  # for a first answer: a person may have to type a password
REJOIN_S: Final = 20.0  # for the answer of one attempt to connect again: the next one may fare better
CLOCK_TRIPS: Final = 5
GLANCE_S: Final = 0.02  # between two looks at streams that are to join
NOT_MADE: Final = "no connection could be made"
AGAIN_S: Final = 1.0  # between two attempts to connect again

M = TypeVar("M", bound=wire.Message)


class Peer:
    """`inbox` gets what the control connection says."""

    def __init__(self, to: Destination, options: Options) -> None:
        self.to = to
        self.inbox: Inbox = queue.SimpleQueue()
        self.clock_offset_ns = 0  # its CLOCK_MONOTONIC minus ours
        self._options = options
        self._session = secrets.token_hex(32)
        self._control: Control | None = None
        self._control_link: Link | None = None
        self._answered = False  # over this control connection
        self._streams: list[tuple[int, Link]] = []  # ready to be given to a sender
        self._used: list[Link] = []
        self._kept: deque[wire.Message] = deque()  # came while something else was waited for

    # ------------------------------------------------------------ connecting

    def open(self, needs: wire.Needs, settings: wire.Settings) -> list[Obstacle]:
        """Connect and ask. What stands in the way raises, but for what asks and is accepted: that is returned."""
        self._connect_control(first=True)
        try:
            self.send(wire.Hello(needs, settings))
        except ConnectionLost:
            self.wait_for(wire.Answer, 2)  # what came before the end says more
            raise
        answer = self.wait_for(wire.Answer, ANSWER_S)
        obstacles = [Obstacle(f.name, f.where, f.why, f.cure, f.asks) for f in answer.obstacles]
        standing = [o for o in obstacles if not (o.asks and settings.yes)]
        if standing:
            with suppress(ConnectionLost):
                self.send(wire.End())  # it need not wait for us
            raise DestinationRefused(
                f"{self.to.text} cannot take it",
                standing,
                exit_code=3 if answer.privilege else 5,
                subject=needs.command,
            )
        if self.to.kind == "ssh":  # else it is one host, and one clock
            self._compare_clocks()
        return obstacles

    def _compare_clocks(self) -> None:
        """The quickest of some round trips says most."""
        quickest = None
        for _ in range(CLOCK_TRIPS):
            begin_ns = time.monotonic_ns()
            self.send(wire.Clock(begin_ns))
            there = self.wait_for(wire.Clock, ANSWER_S)
            end_ns = time.monotonic_ns()
            if quickest is None or end_ns - begin_ns < quickest:
                quickest = end_ns - begin_ns
                self.clock_offset_ns = there.ns - (begin_ns + end_ns) // 2

    def prepare_streams(self, epoch: int, timeout_s: float = ANSWER_S) -> None:
        """Fresh connections for pages, known to the destination's session, so that nothing has to be made after T0."""
        self.drop_streams()
        kinds = [("demand", DEMAND), *[("pages", PAGES)] * self._options.streams]

        def one(kind: tuple[str, int]) -> tuple[int, Link]:
            link = connect(self.to, self._options.remote_command, urgent=kind[1] == DEMAND)
            try:
                _send_all(link, self._opened(kind[0], epoch, first=False), self.to.text)
            except BaseException:
                link.close()
                raise
            return kind[1], link

        with ThreadPoolExecutor(len(kinds)) as pool:
            futures = [pool.submit(one, kind) for kind in kinds]
            failure: BaseException | None = None
            for future in futures:
                try:
                    self._streams.append(future.result())
                except TuimigError as error:
                    failure = error
        try:
            if failure is not None:
                raise failure
            self._await_streams(epoch, time.monotonic() + timeout_s)
        except BaseException:
            self.drop_streams()
            raise

    def _await_streams(self, epoch: int, until: float) -> None:
        """Until all have joined. None of them says anything before; one that is readable has ended."""
        poll = select.poll()
        links = {link.fileno(): link for _, link in self._streams}
        for fd in links:
            poll.register(fd, select.POLLIN)
        while time.monotonic() < until:
            for fd, _ in poll.poll(0):
                raise links[fd].failure("a page stream was not made", self.to.text)
            message = self._next(GLANCE_S)
            if isinstance(message, wire.Joined):
                if message.epoch == epoch and message.streams >= len(links):
                    return
            elif message is not None:
                self._kept.append(message)
        raise ConnectionLost("its page streams do not join the session", subject=self.to.text)

    def give_streams(self, sender: Sender) -> None:
        for kind, link in self._streams:
            fd = link.take()
            sender.add(fd, os.dup(fd), kind)
            self._used.append(link)
        self._streams.clear()

    def drop_streams(self) -> None:
        """Those not used yet, and those of a sender that has been stopped."""
        for link in [*(link for _, link in self._streams), *self._used]:
            link.close()
        self._streams.clear()
        self._used.clear()

    def reconnect(self, epoch: int) -> wire.State:
        """One attempt. The destination's state; ConnectionLost where there is no connection, or no such session."""
        self.close_control()
        self._connect_control(first=False)
        try:
            state = self.wait_for(wire.State, REJOIN_S)
            self.prepare_streams(epoch, REJOIN_S)
        except BaseException:
            self.close_control()
            raise
        return state

    def _connect_control(self, *, first: bool) -> None:
        link = connect(self.to, self._options.remote_command, urgent=True)
        try:
            _send_all(link, self._opened("control", 0, first=first), self.to.text)
            fd = link.take()
            self._control = Control(fd, os.dup(fd), self.inbox, large=False)
        except BaseException:
            link.close()
            raise
        self._control_link = link
        self._answered = False

    def _opened(self, kind: str, epoch: int, *, first: bool) -> wire.Open:
        return wire.Open(session=self._session, kind=kind, first=first, epoch=epoch, tuimig=__version__)

    # ------------------------------------------------------------ talking

    @property
    def session(self) -> str:
        return self._session

    def send(self, message: wire.Message) -> None:
        """ConnectionLost where there is no connection."""
        if self._control is None:
            raise ConnectionLost("there is no connection")
        self._control.send(message)

    def receive(self, timeout_s: float) -> wire.Message | None:
        """The next message; None: none within the time. Raises what ended the connection."""
        return self._kept.popleft() if self._kept else self._next(timeout_s)

    def _next(self, timeout_s: float) -> wire.Message | None:
        try:
            item: Any = self.inbox.get(timeout=timeout_s) if timeout_s > 0 else self.inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Lost):
            if item.control is self._control:
                raise self._explained(item.error)
            return None
        control: Control = item[0]
        message: wire.Message = item[1]
        if control is not self._control:
            return None
        self._answered = True
        return message

    def wait_for(self, kind: type[M], timeout_s: float) -> M:
        """A message of this kind; a Failed in its place is raised."""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            message = self.receive(left)
            if isinstance(message, kind):
                return message
            if isinstance(message, wire.Failed):
                raise error_of(message.trouble, self.to.text)
        raise ConnectionLost("the destination does not answer", subject=self.to.text)

    def _explained(self, error: TuimigError) -> TuimigError:
        """With what the ssh client or the remote shell said. What never answered was no connection."""
        link = self._control_link
        error.subject = error.subject or self.to.text
        if link is None or not isinstance(error, ConnectionLost):
            return error
        if not self._answered:
            return link.failure(NOT_MADE if self.to.kind == "ssh" else f"{NOT_MADE} ({error.what})", self.to.text)
        explained = link.failure(error.what, self.to.text)
        explained.syscall, explained.errno, explained.cure = error.syscall, error.errno, error.cure
        return explained

    def close_control(self) -> None:
        self._kept.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._control_link is not None:
            self._control_link.close()
            self._control_link = None

    def close(self) -> None:
        self.close_control()
        self.drop_streams()


def _send_all(link: Link, message: wire.Message, where: str) -> None:
    data = memoryview(wire.frame(message))
    try:
        while data:
            data = data[os.write(link.fileno(), data) :]
    except OSError:
        raise link.failure(NOT_MADE, where) from None


def error_of(trouble: wire.Trouble, where: str) -> TuimigError:
    """A failure of the destination as an exception here."""
    subject = f"{where}: {trouble.subject}" if trouble.subject else where
    if trouble.kind in ("Unsupported", "DestinationRefused"):
        obstacles = [Obstacle(f.name, f.where, f.why, f.cure, f.asks) for f in trouble.obstacles]
        return Unsupported(trouble.what, obstacles, subject=subject, cure=trouble.cure)
    kind = getattr(errors, trouble.kind, errors.RemoteFailed)
    if kind not in (errors.RebuildFailed, errors.PrivilegeError, errors.SnapshotDamaged, errors.SpoolFull):
        kind = errors.RemoteFailed
    made: TuimigError = kind(
        trouble.what, subject=subject, syscall=trouble.syscall, errno=trouble.errno, cure=trouble.cure
    )
    return made
