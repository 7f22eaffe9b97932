"""Calls that were interrupted once before: the kernel shows them as restart_syscall and keeps their number to itself.

A copy has no restart block, so it must make the call again under its own number. While the thread sleeps, the kernel
function in which it waits tells which call it is; at T0 it is stopped and would not tell any more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from tuimig.core.manifest import ThreadEntry
from tuimig.core.syscalls import NR

_ORIG_RAX: Final = struct.Struct("<Q")
_ORIG_RAX_AT: Final = 15 * 8  # in struct user_regs_struct
_RDI_AT: Final = 14 * 8
_CLOCKS: Final = 16  # clock_nanosleep's first argument is one of them, nanosleep's a pointer

Sleeping = Mapping[int, tuple[int, int]]


def sleeping(pid: int, tids: Iterable[int]) -> Sleeping:
    """By thread id: the number of the call that it restarted, and the call's first argument."""
    found = {}
    for tid in tids:
        task = Path(f"/proc/{pid}/task/{tid}")
        try:
            words = (task / "syscall").read_text().split()
            where = (task / "wchan").read_text()
        except (OSError, UnicodeDecodeError):  # it has ended, or we may not know
            continue
        if words[0] == str(NR["restart_syscall"]) and where != "0":
            first = int(words[1], 16)
            found[tid] = (_number(where, first), first)
    return found


def name_calls(threads: Iterable[ThreadEntry], known: Sleeping) -> list[ThreadEntry]:
    """The threads with restart_syscall replaced by the call itself, where it is still the one that was seen."""
    return [_name_call(thread, known) for thread in threads]


def _name_call(thread: ThreadEntry, known: Sleeping) -> ThreadEntry:
    number, first = known.get(thread.host_tid, (0, 0))
    same = _word(thread.regs, _ORIG_RAX_AT) == NR["restart_syscall"] and _word(thread.regs, _RDI_AT) == first
    if not number or not same:
        return thread
    regs = bytearray(thread.regs)
    _ORIG_RAX.pack_into(regs, _ORIG_RAX_AT, number)
    return msgspec.structs.replace(thread, regs=bytes(regs))


def _word(regs: bytes, at: int) -> int:
    return int.from_bytes(regs[at : at + 8], "little")


def _number(where: str, first: int) -> int:
    if "futex" in where:
        return NR["futex"]
    if "poll" in where:
        return NR["poll"]
    return NR["clock_nanosleep"] if first < _CLOCKS else NR["nanosleep"]
