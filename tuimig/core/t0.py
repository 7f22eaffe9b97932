"""Reading the process's memory as it was at T0, from what is stored and from the mapped files; and the thread
registers that the copy starts with.

Used for the few words that the rebuild itself must know: robust futex lists and rseq critical sections.
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Final

from tuimig.core.errors import RebuildFailed
from tuimig.core.manifest import Manifest, RegionEntry, ThreadEntry
from tuimig.core.model import PAGE
from tuimig.core.spool import HOLE, Spool
from tuimig.core.syscalls import NR

_REGS: Final = struct.Struct("<27Q")  # struct user_regs_struct
_RAX, _ORIG_RAX, _RIP = 10, 15, 16
_NO_CALL: Final = (1 << 64) - 1
_ERESTARTNOHAND: Final = (1 << 64) - 514
_ERESTART_RESTARTBLOCK: Final = (1 << 64) - 516
_EINTR: Final = (1 << 64) - 4
# Calls that any stop interrupts with EINTR (signal(7)); the kernel may restart them as well as others.
_INTERRUPTED_BY_STOPS: Final = frozenset(
    NR[name]
    for name in (
        *("epoll_wait", "epoll_pwait", "epoll_pwait2", "semop", "semtimedop", "rt_sigtimedwait"),
        *("io_getevents", "io_pgetevents", "msgrcv", "msgsnd"),
    )
)
_LOWEST_ERROR: Final = (1 << 64) - 4095
_LOAD_NUMBER: Final = 0xB8  # mov $number, %eax
_SYSCALL: Final = b"\x0f\x05"
_MOST_ROBUST: Final = 2048  # the kernel's own bound of a robust list
_RSEQ_CS_OFFSET: Final = 8  # in struct rseq
_RSEQ_CS: Final = struct.Struct("<IIQQQ")  # version, flags, start_ip, post_commit_offset, abort_ip


class Memory:
    """The memory of T0."""

    def __init__(self, manifest: Manifest, spool: Spool, files: Mapping[int, int]) -> None:
        """`files`: start of a region to our descriptor of the file mapped there."""
        self._regions = manifest.regions
        self._starts = [region.start for region in manifest.regions]
        self._spool = spool
        self._files = files

    def region(self, address: int) -> RegionEntry | None:
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._regions[index].end:
            return None
        return self._regions[index]

    def read(self, address: int, size: int) -> bytes:
        """RebuildFailed where nothing was mapped."""
        data = b""
        while size:
            page = address & ~(PAGE - 1)
            piece = self._page(page)[address - page : address - page + size]
            data += piece
            address += len(piece)
            size -= len(piece)
        return data

    def word(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def _page(self, address: int) -> bytes:
        region = self.region(address)
        if region is None:
            raise RebuildFailed(f"nothing was mapped at {address:#x} at T0")
        if region.slot is not None:
            index = (region.slot + address - region.start) // PAGE
            if region.whole or self._spool.sums[index] != HOLE:
                return self._spool.get(index, 1)
        if region.start in self._files:
            data = os.pread(self._files[region.start], PAGE, region.offset + address - region.start)
            return data + bytes(PAGE - len(data))
        return bytes(PAGE)


def exit_pages(memory: Memory, thread: ThreadEntry, clear_child_tid: int) -> Iterator[int]:
    """Addresses in pages that the kernel writes when this thread ends, or when its rseq area is registered.

    The kernel takes no userfaultfd fault of an ending task: where such a page were missing, joiners would hang.
    """
    if clear_child_tid:
        yield clear_child_tid
    if thread.rseq_pointer:
        yield thread.rseq_pointer
        yield thread.rseq_pointer + thread.rseq_size - 1
    head = thread.robust_head
    if not head or memory.region(head) is None:
        return
    yield from (head, head + thread.robust_len - 1)
    offset = struct.unpack("<q", memory.read(head + 8, 8))[0]
    entry = memory.word(head)
    pending = memory.word(head + 16)
    if pending:
        yield (pending & ~1) + offset
    for _ in range(_MOST_ROBUST):
        entry &= ~1  # the lowest bit says that the futex is a priority inheriting one
        if entry == head or memory.region(entry) is None:
            return
        yield from (entry, entry + offset)
        entry = memory.word(entry)


def start_registers(memory: Memory, thread: ThreadEntry) -> bytes:
    """The registers to set at the thread's last stop, in the kernel's signal code.

    An interrupted call keeps its number and -ERESTART value: there the kernel restarts it, or lets a handler interrupt
    it. Only a restart block cannot be set, so such a call (nanosleep, poll, futex with a timeout) begins anew. One that
    was interrupted before shows as restart_syscall: its number is in the code before it, or else it ends with EINTR.
    """
    if len(thread.regs) != _REGS.size:
        raise RebuildFailed(f"thread {thread.tid} has a register image of {len(thread.regs)} bytes")
    regs = list(_REGS.unpack(thread.regs))
    if regs[_ORIG_RAX] == NR["restart_syscall"] and regs[_RAX] >= _LOWEST_ERROR:
        number = _call_number(memory, regs[_RIP])
        if number is None:
            regs[_RAX], regs[_ORIG_RAX] = _EINTR, _NO_CALL
        else:
            regs[_ORIG_RAX] = number
    interrupted = regs[_RAX] == _EINTR and regs[_ORIG_RAX] in _INTERRUPTED_BY_STOPS
    if regs[_ORIG_RAX] != _NO_CALL and (regs[_RAX] == _ERESTART_RESTARTBLOCK or interrupted):
        regs[_RAX] = _ERESTARTNOHAND
    section = memory.word(thread.rseq_pointer + _RSEQ_CS_OFFSET) if thread.rseq_pointer else 0
    if section and memory.region(section) is not None:
        _, _, start, length, abort = _RSEQ_CS.unpack(memory.read(section, _RSEQ_CS.size))
        if start <= regs[_RIP] < start + length:
            regs[_RIP] = abort
    return _REGS.pack(*regs)


def _call_number(memory: Memory, rip: int) -> int | None:
    """The number that the code at a system call loads just before it."""
    code = memory.read(rip - 7, 7)
    if code[0] != _LOAD_NUMBER or code[5:] != _SYSCALL:
        return None
    return int.from_bytes(code[1:5], "little")
