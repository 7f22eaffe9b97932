"""timerfd: clock, interval, time to the next expiry and expiries not read yet, as of T0.

A timer on a clock that continues in the copy is armed at its absolute expiry, so the time that the rebuild takes is not
added to it; expiries that were not read yet lie in the past of that series and are counted by the kernel itself.
"""

from __future__ import annotations

import re
import struct
import time
from typing import ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state.base import OUT, Build, Call, Descriptor, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.state.descriptors import Group, OpenFile, groups, place, refuse_new, set_flags
from tuimig.core.syscalls import NR

SECOND_NS: Final = 1_000_000_000
TFD_TIMER_ABSTIME: Final = 1
TFD_IOC_SET_TICKS: Final = 0x40085400
_REALTIME_CLOCKS: Final = (time.CLOCK_REALTIME, 8)  # and CLOCK_REALTIME_ALARM
_PAIR: Final = re.compile(r"\((\d+), (\d+)\)")


class Timer(Strict, frozen=True):
    file: OpenFile
    clock: int
    settime: int  # flags of the last timerfd_settime
    ticks: int  # expiries not read yet
    remaining_ns: int  # to the next expiry, when it was read inside the freeze; 0: none is coming
    expiry_ns: int  # that moment on the timer's own clock, as the source reads it
    interval_ns: int


class TimerFds(Strict, frozen=True):
    files: list[Timer]


def _duration_ns(descriptor: Descriptor, key: str) -> int:
    match = _PAIR.fullmatch(descriptor.field(key))
    if match is None:
        raise ValueError(f"fdinfo of descriptor {descriptor.number} has no {key}")
    return int(match[1]) * SECOND_NS + int(match[2])


class TimerFd:
    name: ClassVar[str] = "timerfd"
    Section: ClassVar[type[msgspec.Struct]] = TimerFds

    def obstacles(self, look: Look) -> list[Obstacle]:
        return []

    def probes(self, look: Look) -> list[Probe]:
        """Asking for the time left restarts an expired periodic timer: only then fdinfo shows its place in it."""
        found = groups(look, look.descriptors, self.name)
        probes = []
        for group in found:
            number, clock = group.number, int(group.first.field("clockid"))
            probes += [
                Probe(f"timerfd.time.{number}", ProbeKind.CALL, NR["timerfd_gettime"], (number, OUT), out=32),
                Probe(f"timerfd.clock.{number}", ProbeKind.CALL, NR["clock_gettime"], (clock, OUT), out=16),
                Probe(f"timerfd.info.{number}", ProbeKind.FILE, path=f"/proc/{look.pid}/fdinfo/{number}"),
            ]
        return probes

    def dump(self, frozen: Frozen) -> TimerFds:
        return TimerFds([self._timer(frozen, group) for group in groups(frozen.look, frozen.descriptors, self.name)])

    def _timer(self, frozen: Frozen, group: Group) -> Timer:
        answers = [frozen.calls.get(f"timerfd.{part}.{group.number}") for part in ("time", "clock", "info")]
        left, clock, info = (answer.data if answer is not None and answer.ret >= 0 else b"" for answer in answers)
        if not (left and clock and info):
            raise refuse_new(group, "the timer was made during the freeze")
        first = Descriptor(group.number, group.link, info.decode(), group.number)
        interval = _duration_ns(first, "it_interval")
        remaining, shown = _from_timespec(left[16:]), _duration_ns(first, "it_value")
        if shown > remaining or (remaining and not shown):  # it expired between the two, and fdinfo counts that already
            remaining = remaining + interval if interval else 0
        return Timer(
            file=group.file,
            clock=int(first.field("clockid")),
            settime=int(first.field("settime flags"), 8),
            ticks=int(first.field("ticks")),
            remaining_ns=remaining,
            expiry_ns=_from_timespec(clock) + remaining,
            interval_ns=interval,
        )

    def rebuild(self, section: TimerFds, build: Build) -> None:
        for timer in section.files:
            fd = place(build, timer.file, rawcall.call("timerfd_create", timer.clock, 0))
            set_flags(fd, timer.file.flags)
            self._arm(timer, build)

    def _arm(self, timer: Timer, build: Build) -> None:
        if not timer.remaining_ns and not timer.ticks:
            return
        absolute = timer.settime & TFD_TIMER_ABSTIME if timer.clock in _REALTIME_CLOCKS else build.clocks_continue
        if absolute:
            # The series goes back to the first expiry not read yet; a one-shot that has expired, to just after zero.
            first = max(1, timer.expiry_ns - timer.ticks * timer.interval_ns) if timer.remaining_ns else 1
            self._settime(build, timer, timer.settime | TFD_TIMER_ABSTIME, first)
            return
        self._settime(build, timer, timer.settime & ~TFD_TIMER_ABSTIME, timer.remaining_ns or 1)
        if timer.ticks and timer.remaining_ns:
            ticks = struct.pack("=Q", timer.ticks)
            what = f"restore the expiries of timer descriptor {timer.file.number}"
            build.call(Stage.FINISH, Call(what, NR["ioctl"], (timer.file.number, TFD_IOC_SET_TICKS, ticks)))

    def _settime(self, build: Build, timer: Timer, flags: int, value_ns: int) -> None:
        value = b"".join(struct.pack("=qq", *divmod(ns, SECOND_NS)) for ns in (timer.interval_ns, value_ns))
        what = f"arm timer descriptor {timer.file.number}"
        build.call(Stage.FINISH, Call(what, NR["timerfd_settime"], (timer.file.number, flags, value, 0)))


def _from_timespec(data: bytes) -> int:
    seconds, nanoseconds = struct.unpack_from("=qq", data)
    return int(seconds) * SECOND_NS + int(nanoseconds)


KIND = TimerFd()
