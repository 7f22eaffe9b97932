"""How each thread is scheduled: policy, nice value, priority, deadline, processors, I/O priority, timer slack.

Other processes can read and set all of it, so nothing is asked inside the freeze: it is read just before, and set from
outside just before the copy runs. What takes a privilege that we lack is left out and said.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import Obstacle, TargetGone
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Call, Frozen, Look, Probe, Stage
from tuimig.core.state.untrusted import I32, U32, U63, of_thread
from tuimig.core.syscalls import NR

PR_SET_TIMERSLACK: Final = 29
IOPRIO_WHO_PROCESS: Final = 1
SCHED_FLAG_UTIL_CLAMP: Final = 0x60  # both ends
CPU_LIMIT: Final = 1 << 16
_NOTE: Final = "scheduling.threads"
_ATTR: Final = struct.Struct("<IIQiIQQQII")  # struct sched_attr: size, policy, flags, nice, priority, 3 times, 2 clamps
_REFUSED: Final = (1, 13, 16, 22)  # EPERM, EACCES, EBUSY (no deadline bandwidth), EINVAL (not in this kernel)


class Scheduling(Strict, frozen=True):
    """As sched_getattr gives it; times in nanoseconds. `cpus`: processor numbers; `slack_ns` 0: not readable."""

    policy: U32
    flags: U63
    nice: I32
    priority: U32
    runtime_ns: U63
    deadline_ns: U63
    period_ns: U63
    util_min: U32
    util_max: U32
    cpus: list[Annotated[int, msgspec.Meta(ge=0, lt=CPU_LIMIT)]]
    io_priority: I32
    slack_ns: U63


class SchedulingState(Strict, frozen=True):
    """Distinct settings, and which of them each thread (host id) has."""

    kinds: list[Scheduling]
    threads: dict[int, int]


class Kind:
    name: ClassVar[str] = "scheduling"
    Section: ClassVar[type[msgspec.Struct]] = SchedulingState

    def obstacles(self, look: Look) -> list[Obstacle]:
        return []

    def probes(self, look: Look) -> list[Probe]:
        look.notes[_NOTE] = {tid: found for tid in look.tids if (found := read(tid)) is not None}
        return []

    def dump(self, frozen: Frozen) -> SchedulingState:
        before: dict[int, Scheduling] = frozen.look.notes[_NOTE]
        kinds: list[Scheduling] = []
        threads = {}
        for tid in frozen.tids:
            # a thread that came since is read now; if it has ended meanwhile, it had inherited the leader's
            own = before.get(tid) or read(tid) or before.get(frozen.look.pid)
            if own is None:
                raise TargetGone("it ended while it was looked at", subject=f"process {frozen.look.pid}")
            if own not in kinds:
                kinds.append(own)
            threads[tid] = kinds.index(own)
        return SchedulingState(kinds, threads)

    def rebuild(self, section: SchedulingState, build: Build) -> None:
        ours = read(os.getpid())
        for thread in build.manifest.threads:
            wanted = of_thread(section.kinds, section.threads, thread.host_tid)
            if wanted.slack_ns and (ours is None or wanted.slack_ns != ours.slack_ns):
                call = Call("set the timer slack", NR["prctl"], (PR_SET_TIMERSLACK, wanted.slack_ns, 0, 0, 0))
                build.call(Stage.THREAD, call, thread.tid)
            build.outside(f"set how thread {thread.tid} is scheduled", _setter(thread.tid, wanted, build.warnings))


def read(tid: int) -> Scheduling | None:
    """A thread's settings, None where it is gone."""
    buffer = ctypes.create_string_buffer(_ATTR.size)
    try:
        rawcall.call("sched_getattr", tid, ctypes.addressof(buffer), _ATTR.size, 0)
        _, policy, flags, nice, priority, runtime, deadline, period, low, high = _ATTR.unpack(buffer.raw)
        return Scheduling(
            policy=policy,
            flags=flags,
            nice=nice,
            priority=priority,
            runtime_ns=runtime,
            deadline_ns=deadline,
            period_ns=period,
            util_min=low,
            util_max=high,
            cpus=sorted(os.sched_getaffinity(tid)),
            io_priority=rawcall.call("ioprio_get", IOPRIO_WHO_PROCESS, tid),
            slack_ns=_slack(tid),
        )
    except ProcessLookupError:
        return None


def _slack(tid: int) -> int:
    """Readable with CAP_SYS_NICE, and of oneself."""
    try:
        with open(f"/proc/{tid}/timerslack_ns", encoding="ascii") as file:
            return int(file.read())
    except PermissionError:
        return 0
    except FileNotFoundError:
        raise ProcessLookupError from None


def _setter(tid: int, wanted: Scheduling, warnings: list[str]) -> Callable[[Mapping[int, int]], None]:
    def act(tids: Mapping[int, int]) -> None:
        now = read(tids[tid])
        if now is None:
            raise ProcessLookupError(3, "gone", "sched_getattr")
        for what, call in _steps(tids[tid], now, wanted):
            try:
                call()
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                warnings.append(f"thread {tid} of the copy did not get its {what}: {error.strerror}")

    return act


def _steps(tid: int, now: Scheduling, wanted: Scheduling) -> list[tuple[str, Callable[[], Any]]]:
    """What differs, in words, and the call that sets it. Processors come before a deadline, which is bound to all."""
    steps: list[tuple[str, Callable[[], Any]]] = []
    if now.cpus != wanted.cpus:
        steps.append((f"processors {wanted.cpus}", lambda: os.sched_setaffinity(tid, wanted.cpus)))
    if now.io_priority != wanted.io_priority:
        steps.append(
            (
                f"I/O priority {wanted.io_priority:#x}",
                lambda: rawcall.call("ioprio_set", IOPRIO_WHO_PROCESS, tid, wanted.io_priority),
            )
        )
    if _attributes(now) != _attributes(wanted):
        steps.append((f"policy {wanted.policy}, nice {wanted.nice}", lambda: _set_attributes(tid, now, wanted)))
    return steps


def _attributes(of: Scheduling) -> tuple[int, ...]:
    times = (of.runtime_ns, of.deadline_ns, of.period_ns)
    return (of.policy, of.flags, of.nice, of.priority, *times, of.util_min, of.util_max)


def _set_attributes(tid: int, now: Scheduling, wanted: Scheduling) -> None:
    values = list(_attributes(wanted))
    if values[-2:] != list(_attributes(now))[-2:]:
        values[1] |= SCHED_FLAG_UTIL_CLAMP
    image = ctypes.create_string_buffer(_ATTR.pack(_ATTR.size, *values), _ATTR.size)
    rawcall.call("sched_setattr", tid, ctypes.addressof(image), 0)


KIND = Kind()
