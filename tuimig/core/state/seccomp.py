"""Seccomp: a filter cannot be taken along yet, so a thread under one is refused.

The filters themselves are read with PTRACE_SECCOMP_GET_FILTER at a stop; until that is built, a copy without the filter
would be less confined than its source.
"""

from __future__ import annotations

from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, Unsupported
from tuimig.core.manifest import Strict
from tuimig.core.state import status
from tuimig.core.state.base import Build, Frozen, Look, Probe

_MODES: Final = {"1": "strict mode", "2": "a filter"}


class SeccompState(Strict, frozen=True):
    """Nothing: all threads were unconfined at T0."""


class Seccomp:
    name: ClassVar[str] = "seccomp"
    Section: ClassVar[type[msgspec.Struct]] = SeccompState

    def obstacles(self, look: Look) -> list[Obstacle]:
        seen = ((tid, status.now(look, tid)) for tid in look.tids)
        return [obstacle for tid, fields in seen if fields and (obstacle := _obstacle(tid, fields))]

    def probes(self, look: Look) -> list[Probe]:
        return []  # reads what `credentials` asked for

    def dump(self, frozen: Frozen) -> SeccompState:
        modes = status.each(frozen, "seccomp", lambda fields: fields.get("Seccomp", "0"))
        found = [obstacle for tid, mode in modes.items() if (obstacle := _obstacle(tid, {"Seccomp": mode}))]
        if found:
            raise Unsupported("it was put under seccomp before the freeze", found, subject=f"process {frozen.look.pid}")
        return SeccompState()

    def rebuild(self, section: SeccompState, build: Build) -> None:
        """The copy's threads are unconfined, unless we are; then so is what we start, and nothing can be done."""
        with open("/proc/thread-self/status", "rb") as file:
            mode = status.parse(file.read()).get("Seccomp", "0")
        if mode != "0":
            build.warnings.append(f"the copy runs under {_MODES.get(mode, mode)} of seccomp, because tuimig does")


def _obstacle(tid: int, fields: dict[str, str]) -> Obstacle | None:
    mode = fields.get("Seccomp", "0")
    if mode == "0":
        return None
    why = f"it runs under {_MODES.get(mode, mode)} of seccomp"
    return Obstacle("seccomp", f"thread {tid}", why, "Start the program without its sandbox")


KIND = Seccomp()
