"""Timers that end in signals: the three interval timers, and POSIX timers (timer_create) under their ids.

`/proc/PID/timers` names the POSIX timers; what is left of each is asked for by calls inside the freeze. Remaining times
are restored, not end times: the kernel does not tell which timers were set to an absolute time. One that waits for a
time of day goes off later in the copy, by what passed between T0 and its first instruction.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import Annotated, ClassVar, Final

import msgspec

from tuimig.core import procfs
from tuimig.core.errors import EngineError, FreezeFailed, Obstacle, Unsupported
from tuimig.core.manifest import Strict
from tuimig.core.state.base import OUT, Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.state.untrusted import I32, U32, U63, U64, words
from tuimig.core.syscalls import NR

ITIMER_REAL: Final = 0
ITIMERS: Final = {0: "real", 1: "virtual", 2: "profiling"}
AHEAD: Final = 2  # ids beyond the highest seen that are asked for too: timers made between the look and the freeze
CLOCKS: Final = (0, 1, 7, 8, 9, 11, -6)  # realtime, monotonic, boottime, their alarms, TAI, own processor time
SIGEV_SIGNAL: Final = 0
SIGEV_NONE: Final = 1
SIGEV_THREAD_ID: Final = 4
PR_TIMER_CREATE_RESTORE_IDS: Final = 77
_NOTIFY: Final = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": 2}
_FOUR: Final = struct.Struct("<4q")  # itimerval and itimerspec: interval, value; seconds and micro- or nanoseconds
_SIGEVENT: Final = struct.Struct("<QiiI44x")
_FILE: Final = re.compile(
    r"ID: (?P<id>\d+)\nsignal: (?P<signal>\d+)/(?P<value>[0-9a-f]+)\n"
    r"notify: (?P<notify>\w+)/(?P<target>pid|tid)\.(?P<task>-?\d+)\nClockID: (?P<clock>-?\d+)\n"
)


class Interval(Strict, frozen=True):
    """An interval timer; microseconds, remaining at T0."""

    which: Annotated[int, msgspec.Meta(ge=0, le=2)]
    interval_us: U63
    value_us: U63


class PosixTimer(Strict, frozen=True):
    """A POSIX timer; nanoseconds, remaining at T0 (0: not set). `host_tid`: the thread it signals, 0: the process."""

    id: I32
    clock: I32
    notify: I32
    signal: I32
    value: U64
    host_tid: U32
    interval_ns: U63
    value_ns: U63

    def __post_init__(self) -> None:
        words(self.value)


class TimerState(Strict, frozen=True):
    intervals: list[Interval]
    posix: list[PosixTimer]


class Timers:
    name: ClassVar[str] = "timers"
    Section: ClassVar[type[msgspec.Struct]] = TimerState

    def obstacles(self, look: Look) -> list[Obstacle]:
        if not _visible():
            why = "this kernel (without CONFIG_CHECKPOINT_RESTORE) does not tell whether it has POSIX timers"
            cure = "Accept with --yes if the program uses no timer_create"
            return [Obstacle("posix-timers", f"process {look.pid}", why, cure, asks=True)]
        return [obstacle for timer in _timers_now(look) for obstacle in _obstacle(timer)]

    def probes(self, look: Look) -> list[Probe]:
        found = [Probe(_interval_key(n), ProbeKind.CALL, NR["getitimer"], (n, OUT), out=_FOUR.size) for n in ITIMERS]
        found.append(Probe("timers.posix", ProbeKind.FILE, path=f"/proc/{look.pid}/timers"))
        ids = [timer.id for timer in _timers_now(look)]
        if ids:
            ids += range(ids[-1] + 1, ids[-1] + 1 + AHEAD)
        for number in ids:
            key = _posix_key(number)
            found.append(Probe(key, ProbeKind.CALL, NR["timer_gettime"], (number, OUT), out=_FOUR.size))
        return found

    def dump(self, frozen: Frozen) -> TimerState:
        return TimerState(list(_dump_intervals(frozen)), list(_dump_posix(frozen)))

    def rebuild(self, section: TimerState, build: Build) -> None:
        if section.posix:
            _rebuild_posix(section.posix, build)
        for timer in section.intervals:
            image = _FOUR.pack(*divmod(timer.interval_us, 10**6), *divmod(timer.value_us, 10**6))
            what = f"set the {ITIMERS[timer.which]} interval timer"
            build.call(Stage.FINISH, Call(what, NR["setitimer"], (timer.which, image, 0)))


# ---------------------------------------------------------------- the file


def parse(text: str) -> list[PosixTimer]:
    """The timers of /proc/PID/timers, with their times still unknown."""
    found, at = [], 0
    for match in _FILE.finditer(text):
        if match.start() != at:
            break
        at = match.end()
        notify = _NOTIFY[match["notify"]]
        to_thread = match["target"] == "tid"
        found.append(
            PosixTimer(
                id=int(match["id"]),
                clock=int(match["clock"]),
                notify=notify | (SIGEV_THREAD_ID if to_thread else 0),
                signal=int(match["signal"]),
                value=int(match["value"], 16),
                host_tid=int(match["task"]) if to_thread else 0,
                interval_ns=0,
                value_ns=0,
            )
        )
    if at != len(text):
        raise EngineError(f"/proc/PID/timers has an unknown form: {text[at : at + 100]!r}")
    return sorted(found, key=lambda timer: timer.id)


def _visible() -> bool:
    return os.path.exists("/proc/self/timers")


def _timers_now(look: Look) -> list[PosixTimer]:
    return parse(procfs.read(look.pid, "timers").decode("ascii")) if _visible() else []


def _obstacle(timer: PosixTimer) -> Iterator[Obstacle]:
    if timer.clock not in CLOCKS:
        why = "it runs on one thread's processor time, which a call from outside of that thread cannot set"
        if timer.clock >= 0:
            why = f"it runs on clock {timer.clock}, which is unknown or a device"
        yield Obstacle("posix-timer", f"timer {timer.id}", why, "Let the program delete it first (timer_delete)")


# ---------------------------------------------------------------- T0


def _interval_key(which: int) -> str:
    return f"timers.interval.{which}"


def _posix_key(number: int) -> str:
    return f"timers.posix.{number}"


def _dump_intervals(frozen: Frozen) -> Iterator[Interval]:
    for which in ITIMERS:
        answer = frozen.calls[_interval_key(which)]
        if answer.ret < 0:
            raise EngineError("an interval timer could not be read", syscall="getitimer", errno=-answer.ret)
        seconds, microseconds, left_s, left_us = _FOUR.unpack(answer.data)
        interval, value = seconds * 10**6 + microseconds, left_s * 10**6 + left_us
        if which == ITIMER_REAL and interval and not value:
            value = interval  # its signal is queued at T0; the kernel starts it again only when that is delivered
        if interval or value:
            yield Interval(which, interval, value)


def _dump_posix(frozen: Frozen) -> Iterator[PosixTimer]:
    answer = frozen.calls["timers.posix"]
    if answer.ret < 0 and not _visible():
        return  # `obstacles` asked
    if answer.ret < 0:
        raise EngineError("the timers could not be read", subject=f"process {frozen.look.pid}", errno=-answer.ret)
    for timer in parse(answer.data.decode("ascii")):
        if found := list(_obstacle(timer)):
            raise Unsupported("a timer came before the freeze that cannot be migrated", found)
        left = frozen.calls.get(_posix_key(timer.id))
        if left is None:
            raise FreezeFailed(
                f"it makes timers faster than they can be looked at (timer {timer.id})",
                subject=f"process {frozen.look.pid}",
                cure="Try again",
            )
        if left.ret < 0:
            raise EngineError(f"timer {timer.id} could not be read", syscall="timer_gettime", errno=-left.ret)
        seconds, nanoseconds, left_s, left_ns = _FOUR.unpack(left.data)
        yield msgspec.structs.replace(
            timer, interval_ns=seconds * 10**9 + nanoseconds, value_ns=left_s * 10**9 + left_ns
        )


# ---------------------------------------------------------------- the copy


def _rebuild_posix(timers: list[PosixTimer], build: Build) -> None:
    """Under their ids, which the kernel takes from a caller that has asked for that mode (Linux 6.16)."""
    tids = {thread.host_tid: thread.tid for thread in build.manifest.threads}
    mode = (PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)
    build.call(Stage.FINISH, Call("create timers under their ids (Linux 6.16 can)", NR["prctl"], mode))
    for timer in timers:
        event = _SIGEVENT.pack(timer.value, timer.signal, timer.notify, tids.get(timer.host_tid, 0))
        number = struct.pack("<i", timer.id)
        build.call(Stage.FINISH, Call(f"create timer {timer.id}", NR["timer_create"], (timer.clock, event, number)))
    build.call(Stage.FINISH, Call("create timers with new ids again", NR["prctl"], (mode[0], 0, 0, 0, 0)))
    for timer in timers:
        if timer.value_ns:
            image = _FOUR.pack(*divmod(timer.interval_ns, 10**9), *divmod(timer.value_ns, 10**9))
            build.call(Stage.FINISH, Call(f"set timer {timer.id}", NR["timer_settime"], (timer.id, 0, image, 0)))


KIND = Timers()
