"""Signal handling: what the process does on each signal. Masks, queues and alternate stacks belong to the threads.

Each injected call lengthens the freeze, so default ones are not asked for: none of their flags has an effect, but for
SIGCHLD's, which say whether children become zombies.
"""

from __future__ import annotations

import signal
import struct
from typing import Annotated, ClassVar, Final

import msgspec

from tuimig.core.errors import EngineError, FreezeFailed, Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state import status
from tuimig.core.state.base import OUT, Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.state.untrusted import U64, words
from tuimig.core.syscalls import NR

ASKED: Final = tuple(n for n in range(1, 65) if n not in (signal.SIGKILL, signal.SIGSTOP))
_ACTION: Final = struct.Struct("<QQQQ")  # the kernel's: handler, flags, restorer, mask
_MASK_SIZE: Final = 8
_DEFAULT: Final = bytes(_ACTION.size)


class Action(Strict, frozen=True):
    """One signal's action that is not all default; the addresses are the program's own."""

    number: Annotated[int, msgspec.Meta(ge=1, le=64)]
    handler: U64
    flags: U64
    restorer: U64
    mask: U64

    def __post_init__(self) -> None:
        words(self.handler, self.flags, self.restorer, self.mask)


class SignalState(Strict, frozen=True):
    actions: list[Action]


class Signals:
    name: ClassVar[str] = "signals"
    Section: ClassVar[type[msgspec.Struct]] = SignalState

    def obstacles(self, look: Look) -> list[Obstacle]:
        return []

    def probes(self, look: Look) -> list[Probe]:
        return [
            Probe(f"signals.{n}", ProbeKind.CALL, NR["rt_sigaction"], (n, 0, OUT, _MASK_SIZE), out=_ACTION.size)
            for n in sorted({*_members(look.status["SigCgt"]), *_members(look.status["SigIgn"]), signal.SIGCHLD})
        ]

    def dump(self, frozen: Frozen) -> SignalState:
        at_t0 = status.of_leader(frozen)
        caught, ignored = _members(at_t0["SigCgt"]), _members(at_t0["SigIgn"])
        actions = []
        for number in {*caught, *ignored, signal.SIGCHLD}:
            answer = frozen.calls.get(f"signals.{number}")
            if answer is None:
                what = f"it began to handle signal {number} just before the freeze"
                raise FreezeFailed(what, subject=f"process {frozen.look.pid}", cure="Try again")
            if answer.ret < 0:
                raise EngineError(
                    f"the action of signal {number} could not be read", syscall="rt_sigaction", errno=-answer.ret
                )
            if answer.data != _DEFAULT:
                actions.append(Action(number, *_ACTION.unpack(answer.data)))
        return SignalState(sorted(actions, key=lambda action: action.number))

    def rebuild(self, section: SignalState, build: Build) -> None:
        for action in section.actions:
            image = _ACTION.pack(action.handler, action.flags, action.restorer, action.mask)
            what = f"set the action of signal {action.number}"
            build.call(Stage.SETUP, Call(what, NR["rt_sigaction"], (action.number, image, 0, _MASK_SIZE)))


KIND = Signals()


def _members(mask: str) -> list[int]:
    """The signals of a set as the status file shows it."""
    return [n for n in ASKED if int(mask, 16) >> (n - 1) & 1]
