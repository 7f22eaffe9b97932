"""Threads: what the kernel keeps for each besides registers (those are in the manifest): its alternate signal stack,
the address it clears when it ends, robust futexes, rseq, its name.

The addresses are asked for inside the freeze, by calls made in each thread, since no file shows them.
"""

from __future__ import annotations

import os
import struct
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, Unsupported
from tuimig.core.manifest import Strict, ThreadEntry
from tuimig.core.state.base import OUT, Answer, Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.syscalls import NR

PR_SET_NAME: Final = 15
PR_GET_TID_ADDRESS: Final = 40
SS_ONSTACK: Final = 1
SS_DISABLE: Final = 2
_STACK: Final = struct.Struct("<QiiQ")  # stack_t
_NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


class ThreadState(Strict, frozen=True):
    """One thread, by its id on the source host (`ThreadEntry.host_tid`)."""

    host_tid: int
    clear_child_tid: int
    stack_base: int
    stack_size: int
    stack_flags: int


class ThreadsSection(Strict, frozen=True):
    threads: list[ThreadState]


class Threads:
    name: ClassVar[str] = "threads"
    Section: ClassVar[type[msgspec.Struct]] = ThreadsSection

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        leader = _namespaces(look.pid, look.pid)
        for tid in look.tids:
            if tid == look.pid:
                continue
            own = _namespaces(look.pid, tid)
            for name in _NAMESPACES:
                if name in own and name in leader and own[name] != leader[name]:
                    found.append(
                        Obstacle(
                            "thread-namespace",
                            f"thread {tid}",
                            f"it lives in another {name} namespace than the first thread",
                            "Let it return to the common namespace first",
                        )
                    )
        return found

    def probes(self, look: Look) -> list[Probe]:
        return [
            Probe("threads.stack", ProbeKind.CALL_EACH, NR["sigaltstack"], (0, OUT), out=_STACK.size),
            Probe("threads.tid_address", ProbeKind.CALL_EACH, NR["prctl"], (PR_GET_TID_ADDRESS, OUT), out=8),
        ]

    def dump(self, frozen: Frozen) -> ThreadsSection:
        threads = []
        for tid in frozen.tids:
            base, flags, _, size = _STACK.unpack(_answer(frozen, "threads.stack", tid, "sigaltstack").data)
            address = _answer(frozen, "threads.tid_address", tid, "prctl").data
            threads.append(
                ThreadState(
                    host_tid=tid,
                    clear_child_tid=int.from_bytes(address[:8], "little"),
                    stack_base=base,
                    stack_size=size,
                    stack_flags=flags & ~SS_ONSTACK,
                )
            )
        return ThreadsSection(threads=threads)

    def rebuild(self, section: ThreadsSection, build: Build) -> None:
        states = {state.host_tid: state for state in section.threads}
        for thread in build.manifest.threads:
            for call in _thread_calls(thread, states[thread.host_tid]):
                build.call(Stage.THREAD, call, thread.tid)


KIND = Threads()


def _answer(frozen: Frozen, key: str, tid: int, syscall: str) -> Answer:
    answer = frozen.each.get(key, {}).get(tid)
    if answer is None or answer.ret < 0:
        raise Unsupported(
            f"thread {tid} did not tell its state",
            syscall=syscall,
            errno=-answer.ret if answer else 0,
            cure="The kernel needs CONFIG_CHECKPOINT_RESTORE; see `tuimig check`",
        )
    return answer


def _thread_calls(thread: ThreadEntry, state: ThreadState) -> list[Call]:
    name = thread.comm.encode("utf-8", "surrogateescape")[:15] + b"\0"
    flags = state.stack_flags
    stack = _STACK.pack(state.stack_base, flags, 0, state.stack_size)
    if flags & SS_DISABLE:
        stack = _STACK.pack(0, SS_DISABLE, 0, 0)
    label = f"of thread {thread.tid}"
    calls = [
        Call(f"set the name {label}", NR["prctl"], (PR_SET_NAME, name)),
        Call(f"set the clear_child_tid address {label}", NR["set_tid_address"], (state.clear_child_tid,)),
        Call(f"restore the alternate signal stack {label}", NR["sigaltstack"], (stack, 0)),
    ]
    if thread.robust_head:
        arguments = (thread.robust_head, thread.robust_len)
        calls.append(Call(f"restore the robust futex list {label}", NR["set_robust_list"], arguments))
    if thread.rseq_pointer:
        registration = (thread.rseq_pointer, thread.rseq_size, 0, thread.rseq_signature)
        calls.append(Call(f"register the rseq area {label}", NR["rseq"], registration))
    return calls


def _namespaces(pid: int, tid: int) -> dict[str, str]:
    links = {}
    for name in _NAMESPACES:
        try:
            links[name] = os.readlink(f"/proc/{pid}/task/{tid}/ns/{name}")
        except OSError:  # the thread has ended
            continue
    return links
