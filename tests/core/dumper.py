"""A plain stop-and-copy dumper for tests of the rebuild: it needs neither userfaultfd nor the source engine.

It holds a child with ptrace from the calling thread, reads everything while all threads are stopped, and detaches.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tuimig.core import procfs
from tuimig.core.manifest import FORMAT, Clocks, Host, Manifest, Process, RegionEntry, ThreadEntry
from tuimig.core.model import PAGE, Kind, Options, Treatment
from tuimig.core.spool import ZERO_CONTENT, Spool
from tuimig.core.state.base import OUT, Answer, Descriptor, Frozen, Probe, ProbeKind

SEIZE, INTERRUPT, DETACH, SYSCALL = 0x4206, 0x4207, 17, 24
GETREGSET, SETREGSET, GETSIGMASK, PEEKSIGINFO, RSEQ = 0x4204, 0x4205, 0x420A, 0x4209, 0x420F
PRSTATUS, XSTATE = 1, 0x202
WALL = 0x40000000
REGS = struct.Struct("<27Q")
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, tid: int, address: int, data: Any) -> int:
    result = libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), ctypes.c_void_p(address), data)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x} on {tid}")
    return int(result)


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class PeekArgs(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32))


def get_regset(tid: int, kind: int) -> bytes:
    buffer = ctypes.create_string_buffer(16384)
    vector = Iovec(ctypes.addressof(buffer), len(buffer))
    ptrace(GETREGSET, tid, kind, ctypes.byref(vector))
    return buffer.raw[: vector.length]


def set_regs(tid: int, regs: bytes) -> None:
    buffer = ctypes.create_string_buffer(regs, len(regs))
    vector = Iovec(ctypes.addressof(buffer), len(regs))
    ptrace(SETREGSET, tid, PRSTATUS, ctypes.byref(vector))


def pending(tid: int, flags: int) -> list[bytes]:
    infos = ctypes.create_string_buffer(128 * 32)
    wanted = PeekArgs(0, flags, 32)
    n = ptrace(PEEKSIGINFO, tid, ctypes.addressof(wanted), infos)
    return [infos.raw[i * 128 : i * 128 + 128] for i in range(n)]


class Held:
    """All threads of a process, stopped by us."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tids = procfs.read_tids(pid)
        for tid in self.tids:
            ptrace(SEIZE, tid, 0, 1)
            ptrace(INTERRUPT, tid, 0, 0)
        for tid in self.tids:
            os.waitpid(tid, WALL)
        self.mem = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        self.regions = procfs.read_regions(pid)
        libc_text = next(r for r in self.regions if "libc" in r.path and "x" in r.perms)
        code = os.pread(self.mem, libc_text.size, libc_text.start)
        self.syscall = libc_text.start + code.index(b"\x0f\x05")

    def call(self, tid: int, probe: Probe) -> Answer:
        """The probe's call, with its buffer far below the thread's stack; the bytes there are put back."""
        saved = get_regset(tid, PRSTATUS)
        regs = list(REGS.unpack(saved))
        buffer = (regs[19] - 8192) & ~63
        before = os.pread(self.mem, 1024, buffer)
        os.pwrite(self.mem, probe.data or bytes(probe.out), buffer)
        arguments = [buffer if a == OUT else a for a in (*probe.args, 0, 0, 0, 0, 0, 0)][:6]
        for slot, value in zip((14, 13, 12, 7, 9, 8), arguments, strict=True):
            regs[slot] = value
        regs[10], regs[15], regs[16] = probe.nr, (1 << 64) - 1, self.syscall
        set_regs(tid, REGS.pack(*regs))
        for _ in range(2):
            ptrace(SYSCALL, tid, 0, 0)
            os.waitpid(tid, WALL)
        ret = struct.unpack("<q", get_regset(tid, PRSTATUS)[80:88])[0]
        data = os.pread(self.mem, probe.out, buffer) if probe.out else b""
        os.pwrite(self.mem, before, buffer)
        # back into the signal stop, where an interrupted call may be set up to restart
        ptrace(INTERRUPT, tid, 0, 0)
        ptrace(7, tid, 0, 0)
        os.waitpid(tid, WALL)
        set_regs(tid, saved)
        return Answer(ret, data)

    def let_go(self) -> None:
        for tid in self.tids:
            ptrace(DETACH, tid, 0, 0)
        os.close(self.mem)


def thread(tid: int) -> ThreadEntry:
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    libc.syscall(274, tid, ctypes.byref(head), ctypes.byref(length))
    rseq = ctypes.create_string_buffer(24)
    ptrace(RSEQ, tid, 24, rseq)
    pointer, size, signature, flags = struct.unpack("<QIII", rseq.raw[:20])
    mask = ctypes.c_uint64()
    ptrace(GETSIGMASK, tid, 8, ctypes.byref(mask))
    return ThreadEntry(
        tid=tid,
        host_tid=tid,
        comm=Path(f"/proc/{tid}/comm").read_text().rstrip("\n"),
        regs=get_regset(tid, PRSTATUS),
        xstate=get_regset(tid, XSTATE),
        sigmask=mask.value,
        robust_head=head.value,
        robust_len=length.value,
        rseq_pointer=pointer,
        rseq_size=size,
        rseq_signature=signature,
        rseq_flags=flags,
        pending=pending(tid, 0),
    )


def dump(pid: int, kinds: Sequence[Any], pages_fd: int, protect_above: int = 1 << 20) -> tuple[Manifest, Spool]:
    """The manifest and a spool (its pages_fd is never closed: a test's process is short) of a child."""
    with procfs.look(pid, Options()) as look:
        return _dump(look, kinds, pages_fd, protect_above)


def _dump(look: Any, kinds: Sequence[Any], pages_fd: int, protect_above: int) -> tuple[Manifest, Spool]:
    pid = look.pid
    probes = [probe for kind in kinds for probe in kind.probes(look)]
    held = Held(pid)
    clocks = Clocks(time.time_ns(), time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    threads = [thread(tid) for tid in held.tids]
    calls, each = {}, {}
    for probe in probes:
        if probe.kind is ProbeKind.CALL:
            calls[probe.key] = held.call(pid, probe)
        elif probe.kind is ProbeKind.CALL_EACH:
            each[probe.key] = {tid: held.call(tid, probe) for tid in held.tids}
        elif probe.kind is ProbeKind.FILE:
            data = Path(probe.path).read_bytes()
            calls[probe.key] = Answer(len(data), data)
    descriptors: dict[int, Descriptor] = dict(look.descriptors)
    frozen = Frozen(look, clocks, descriptors, held.regions, held.tids, calls, each)
    spool, regions = _store(held, pages_fd, protect_above)
    shared = pending(pid, 1)
    exe = os.readlink(f"/proc/{pid}/exe")
    held.let_go()
    state = {kind.name: msgspec.Raw(msgspec.json.encode(kind.dump(frozen))) for kind in kinds}
    process = Process(pid, pid, os.getpid(), os.getpgid(pid), os.getsid(pid), threads[0].comm, [exe], exe)
    manifest = Manifest(
        format=FORMAT,
        tuimig="test",
        created="2026-01-01T00:00:00Z",
        host=Host(os.uname().machine, PAGE, os.uname().release, "", 0),
        clocks=clocks,
        process=process,
        regions=regions,
        threads=threads,
        shared_pending=shared,
        pages_size=spool.n_pages * PAGE,
        state=state,
        frozen_us=0,
    )
    return msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest), spool


def _store(held: Held, pages_fd: int, protect_above: int) -> tuple[Spool, list[RegionEntry]]:
    stored = [r for r in held.regions if r.kind not in (Kind.KERNEL, Kind.SHARED_FILE)]
    spool = Spool(pages_fd, sum(r.size for r in stored) // PAGE, True)
    entries, first = [], 0
    for region in held.regions:
        whole = region.kind is not Kind.FILE
        treatment, slot, status = Treatment.NONE, None, None
        if region in stored:
            slot = first * PAGE
            large = region.size >= protect_above and region.kind in (Kind.ANON, Kind.HEAP, Kind.STACK)
            treatment = Treatment.PROTECTED if large else Treatment.EAGER
            if whole:
                for offset in range(0, region.size, 1 << 20):
                    size = min(1 << 20, region.size - offset)
                    spool.put(first + offset // PAGE, os.pread(held.mem, size, region.start + offset))
            else:
                _store_changed(held, region, spool, first)
            first += region.size // PAGE
        if region.kind in (Kind.FILE, Kind.SHARED_FILE):
            status = os.stat(region.path)
        entries.append(
            RegionEntry(
                start=region.start,
                end=region.end,
                perms=region.perms,
                offset=region.offset,
                dev=region.dev,
                inode=region.inode,
                path=region.path,
                kind=region.kind.value,
                treatment=treatment.value,
                rule="test",
                flags=sorted(region.flags),
                slot=slot,
                whole=whole,
                pages=0,
                digest="",
                file_size=status.st_size if status else -1,
                file_mtime_ns=status.st_mtime_ns if status else -1,
            )
        )
    return spool, entries


def _store_changed(held: Held, region: Any, spool: Spool, first: int) -> None:
    """Pages of a private file mapping that are not the file's any more (pagemap: present and not of a file)."""
    with open(f"/proc/{held.pid}/pagemap", "rb", buffering=0) as pagemap:
        for index in range(region.size // PAGE):
            pagemap.seek((region.start // PAGE + index) * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
            if entry >> 62 and not entry >> 61 & 1:
                page = os.pread(held.mem, PAGE, region.start + index * PAGE)
                spool.put(first + index, page)
                if not any(page):
                    spool.sums[first + index] = ZERO_CONTENT
