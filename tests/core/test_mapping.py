"""The plan of the copy's memory, and what of T0 the rebuild itself has to read: without any process."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dumper
import msgspec
import pytest

from tuimig.core import mapping, t0
from tuimig.core.errors import RebuildFailed
from tuimig.core.manifest import RegionEntry, ThreadEntry
from tuimig.core.mapping import KernelRegion
from tuimig.core.model import PAGE
from tuimig.core.spool import ZERO_CONTENT, Spool
from tuimig.core.syscalls import NR

ENTRY = RegionEntry(0x10000, 0x14000, "rw-p", 0, "00:00", 0, "", "anon", "none", "test", [], None, True, 0, "")
THREAD = ThreadEntry(7, 7, "x", b"", b"", 0, 0, 0, 0, 0, 0, 0, [])


class FakeManifest:
    def __init__(self, *regions: RegionEntry) -> None:
        self.regions = list(regions)


def plan(*regions: RegionEntry) -> mapping.Mapping:
    return mapping.plan(regions)


# ---------------------------------------------------------------- moving vdso and vvar


def moved(ours: list[KernelRegion], theirs: list[KernelRegion], spare: int) -> dict[int, str]:
    """The layout after the calls, page by page; a move onto a page that is there would destroy it."""
    pages = {address: r.name for r in ours for address in range(r.start, r.end, PAGE)}
    for call in mapping.move_calls(ours, theirs, spare):
        if call.nr == NR["munmap"]:
            start, size = call.args
            assert isinstance(start, int)
            assert isinstance(size, int)
            for address in range(start, start + size, PAGE):
                del pages[address]
            continue
        old, size, new_size, _, new = (a for a in call.args if isinstance(a, int))
        assert size == new_size
        taken = [pages.pop(old + offset) for offset in range(0, size, PAGE)]
        for index, name in enumerate(taken):
            assert new + index * PAGE not in pages, "a move destroys another region"
            pages[new + index * PAGE] = name
    return pages


def kernel_regions(base: int) -> list[KernelRegion]:
    names = (("[vvar]", 4), ("[vvar_vclock]", 2), ("[vdso]", 2))
    regions = []
    for name, size in names:
        regions.append(KernelRegion(name, base, base + size * PAGE))
        base += size * PAGE
    return regions


@pytest.mark.parametrize("shift", range(-10, 11))
def test_kernel_regions_move_over_each_other(shift: int) -> None:
    theirs = kernel_regions((100 + shift) * PAGE)
    wanted = {address: r.name for r in theirs for address in range(r.start, r.end, PAGE)}
    assert moved(kernel_regions(100 * PAGE), theirs, 1000 * PAGE) == wanted


def test_kernel_regions_that_the_source_lacked_go() -> None:
    assert moved(kernel_regions(100 * PAGE), [], 1000 * PAGE) == {}


def test_kernel_regions_of_another_size_are_refused() -> None:
    theirs = kernel_regions(0x7000 * PAGE)
    theirs[2] = KernelRegion("[vdso]", theirs[2].start, theirs[2].end + PAGE)
    with pytest.raises(RebuildFailed, match="vdso"):
        mapping.move_calls(kernel_regions(100 * PAGE), theirs, 0)


# ---------------------------------------------------------------- ranges


def test_scratch_lies_apart_from_both_layouts() -> None:
    ours = [(5 << 32, (5 << 32) + PAGE), (1 << 47, 1 << 48)]
    theirs = [(1 << 32, 5 << 32), ((5 << 32) + (3 << 20), 6 << 32)]
    address = mapping.free_range(1 << 16, ours, theirs)
    for start, end in ours + theirs:
        assert address + (1 << 16) + (1 << 20) <= start or address - (1 << 20) >= end


def test_no_room_for_scratch_is_told() -> None:
    with pytest.raises(RebuildFailed, match="no free range"):
        mapping.free_range(1 << 16, [(0, (1 << 47) - (1 << 20))])


def test_everything_is_unmapped_but_what_is_kept() -> None:
    keep = [(0x5000, 0x9000), (0x20000, 0x21000)]
    ranges = [call.args for call in mapping.clear_calls(keep)]
    assert ranges[:2] == [(0, 0x5000), (0x9000, 0x17000)]
    assert ranges[2] == (0x21000, (1 << 47) - PAGE - 0x21000)


# ---------------------------------------------------------------- files and shared objects


def test_one_object_for_regions_that_shared_one() -> None:
    shared = msgspec.structs.replace(ENTRY, perms="rw-s", kind="shared-anon", treatment="eager", inode=9, slot=0)
    upper = msgspec.structs.replace(shared, start=0x20000, end=0x22000, offset=0x2000, slot=0x4000)
    other = msgspec.structs.replace(shared, start=0x30000, end=0x31000, inode=10, path="/memfd:cache (deleted)")
    planned = plan(shared, upper, other)
    first, second, third = planned.mapped
    assert first.fd == second.fd != third.fd
    assert os.fstat(first.fd).st_size == 0x4000
    assert os.readlink(f"/proc/self/fd/{third.fd}") == "/memfd:cache (deleted)"
    assert os.readlink(f"/proc/self/fd/{first.fd}") == "/dev/zero (deleted)", "as MAP_SHARED|MAP_ANONYMOUS makes it"
    assert [(c.address, c.fd) for c in planned.contents[:2]] == [(0, first.fd), (0x2000, first.fd)]
    planned.close()


def test_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(bytes(0x4000))
    status = path.stat()
    entry = msgspec.structs.replace(
        ENTRY, kind="file", path=str(path), file_size=status.st_size, file_mtime_ns=status.st_mtime_ns
    )
    plan(entry).close()
    os.utime(path, ns=(0, 1))
    with pytest.raises(RebuildFailed, match=r"not the file that was mapped.*Install the same version"):
        plan(entry)
    path.unlink()
    with pytest.raises(RebuildFailed, match=r"errno 2.*Put the same file there"):
        plan(entry)


def test_shared_file_only_has_to_be_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.write_bytes(bytes(0x5000))
    entry = msgspec.structs.replace(
        ENTRY, perms="rw-s", kind="shared-file", path=str(path), file_size=0x4000, file_mtime_ns=5, flags=["mw"]
    )
    planned = plan(entry)
    assert planned.warnings == [f"{path} is mapped shared: the copy writes to the file that its source has"]
    planned.close()
    os.truncate(path, 0x3FFF)
    with pytest.raises(RebuildFailed, match="shorter"):
        plan(entry)


def test_no_descriptor_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_bytes(b"x")
    entry = msgspec.structs.replace(ENTRY, kind="file", path=str(path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RebuildFailed):
        plan(entry, msgspec.structs.replace(entry, path=str(tmp_path / "gone")))
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- T0


@pytest.fixture
def spool() -> Iterator[Spool]:
    fd = os.memfd_create("pages")
    with Spool(fd, 4, True) as made:
        yield made
    os.close(fd)


def memory_with(spool: Spool, words: dict[int, int]) -> t0.Memory:
    """Four pages at 0x10000 that hold these 64-bit words."""
    data = bytearray(4 * PAGE)
    for address, word in words.items():
        struct.pack_into("<Q", data, address - 0x10000, word & (1 << 64) - 1)
    spool.put(0, data)
    return t0.Memory(FakeManifest(msgspec.structs.replace(ENTRY, slot=0)), spool, {})  # type: ignore[arg-type]


def test_pages_of_a_private_file_are_its_own_or_the_files(spool: Spool, tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE + b"c" * PAGE + b"d" * 10)
    spool.put(1, b"B" * PAGE)
    spool.sums[2] = ZERO_CONTENT
    entry = msgspec.structs.replace(ENTRY, kind="file", path=str(path), slot=0, whole=False)
    with path.open("rb") as file:
        memory = t0.Memory(FakeManifest(entry), spool, {entry.start: file.fileno()})  # type: ignore[arg-type]
        assert memory.read(0x10FFF, 2) == b"aB"
        assert memory.read(0x12000, 1) == b"\0", "a zero page that hides the file's"
        assert memory.read(0x13008, 4) == b"dd\0\0", "beyond the file's end"
        with pytest.raises(RebuildFailed, match="0x14000"):
            memory.read(0x13FFF, 2)


def test_every_held_robust_futex_is_found(spool: Spool) -> None:
    head, first, second, pending, offset = 0x10100, 0x11100, 0x12100, 0x13F00, -32
    words = {
        head: first | 1,  # a priority inheriting one
        head + 8: offset,
        head + 16: pending,
        first: second,
        second: head,
    }
    thread = msgspec.structs.replace(
        THREAD, robust_head=head, robust_len=24, rseq_pointer=0x10FF0, rseq_size=32, rseq_signature=1
    )
    pages = set(t0.exit_pages(memory_with(spool, words), thread, 0x10ABC))
    assert {head, first, first + offset, second, second + offset, pending + offset} <= pages
    assert {0x10ABC, 0x10FF0, 0x10FF0 + 31} <= pages, "an area over two pages needs both"


def test_endless_robust_list_ends(spool: Spool) -> None:
    words = {0x10100: 0x11000, 0x11000: 0x12000, 0x12000: 0x11000}
    thread = msgspec.structs.replace(THREAD, robust_head=0x10100, robust_len=24)
    assert len(list(t0.exit_pages(memory_with(spool, words), thread, 0))) < 10_000


@pytest.mark.parametrize(("rip", "wanted"), [(0x4000, 0x9999), (0x400F, 0x9999), (0x4010, 0x4010), (0x3FFF, 0x3FFF)])
def test_restartable_sequence_is_aborted(spool: Spool, rip: int, wanted: int) -> None:
    area, section = 0x10200, 0x11000
    words = {area + 8: section, section: 0, section + 8: 0x4000, section + 16: 0x10, section + 24: 0x9999}
    thread = msgspec.structs.replace(THREAD, regs=registers(rip=rip), rseq_pointer=area, rseq_size=32)
    assert dumper.REGS.unpack(t0.start_registers(memory_with(spool, words), thread))[16] == wanted


def registers(**values: int) -> bytes:
    places = {"rax": 10, "orig_rax": 15, "rip": 16}
    regs: list[Any] = [0] * 27
    regs[15] = (1 << 64) - 1
    for name, value in values.items():
        regs[places[name]] = value & (1 << 64) - 1
    return dumper.REGS.pack(*regs)


@pytest.mark.parametrize(
    ("rax", "call", "wanted", "why"),
    [
        (-512, "read", -512, "the kernel decides"),
        (-516, "nanosleep", -514, "a restart block cannot be set"),
        (-4, "epoll_wait", -514, "interrupted by our stop"),
        (-4, "read", -4, "a real EINTR stays"),
        (-516, "", -516, "not in a call"),
    ],
)
def test_interrupted_calls(spool: Spool, rax: int, call: str, wanted: int, why: str) -> None:
    number = NR[call] if call else -1
    thread = msgspec.structs.replace(THREAD, regs=registers(rax=rax, orig_rax=number, rip=5))
    out = dumper.REGS.unpack(t0.start_registers(memory_with(spool, {}), thread))
    assert (out[10], out[15], out[16]) == (wanted & (1 << 64) - 1, number & (1 << 64) - 1, 5), why


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe that has taken the name would hold whoever opens it for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RebuildFailed, match="not a regular file"):
        plan(msgspec.structs.replace(ENTRY, kind="file", path=str(tmp_path / "pipe")))
