"""How the copy's memory is laid out again: which calls map each region, from which file, with which content.

Plans only; destination.py carries the plan out. Files are opened and their identity is checked here, before anything is
built. Regions that share one object of shared memory get one object again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tuimig.core.errors import RebuildFailed
from tuimig.core.manifest import RegionEntry
from tuimig.core.model import PAGE, Kind, Treatment
from tuimig.core.state.base import Call
from tuimig.core.stub import Content
from tuimig.core.syscalls import NR

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_DROPPABLE: Final = 0x08
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MREMAP_MAYMOVE_FIXED: Final = 0x1 | 0x2
MLOCK_ONFAULT: Final = 1
PR_SET_VMA: Final = 0x53564D41
PR_SET_VMA_ANON_NAME: Final = 0
_PROTECTIONS: Final = {"r": 1, "w": 2, "x": 4}
# VmFlags word -> madvise advice; the last three are refused where the kernel is built without the feature
_ADVICE: Final = {"sr": 2, "rr": 1, "dc": 10, "wf": 18, "dd": 16, "hg": 14, "nh": 15, "mg": 12}
_OPTIONAL_ADVICE: Final = frozenset({"hg", "nh", "mg"})
_TASK_SIZE: Final = (1 << 47) - PAGE
_MARGIN: Final = 2 << 20  # around the scratch: stacks keep a gap below them, the heap grows


@dataclass(frozen=True, slots=True)
class Mapped:
    """One region to be mapped: how, and our descriptor of the file behind it, -1 where there is none."""

    region: RegionEntry
    flags: int
    fd: int
    offset: int


@dataclass(slots=True)
class Mapping:
    """The plan. `fds` are ours, opened for it; `lazy` holds indexes into the manifest's regions."""

    mapped: list[Mapped] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    lazy: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    shared: dict[tuple[str, int], int] = field(default_factory=dict)  # (dev, inode) at T0 -> our descriptor
    warnings: list[str] = field(default_factory=list)

    def calls(self, numbers: dict[int, int]) -> list[Call]:
        """Map everything. `numbers`: our descriptor -> the copy's number for it meanwhile."""
        return [call for m in self.mapped for call in map_calls(m, numbers.get(m.fd, -1))]

    def late_calls(self) -> list[Call]:
        """What must wait until content is written and lazy regions are registered: protection, locks and seals."""
        return [call for m in self.mapped for call in _late_calls(m.region)]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def plan(regions: Sequence[RegionEntry]) -> Mapping:
    """Open and check what is mapped. RebuildFailed names the region and the file."""
    mapping = Mapping()
    files: dict[tuple[str, int], int] = {}
    try:
        for index, region in enumerate(regions):
            kind = Kind(region.kind)
            if kind is Kind.KERNEL:
                continue
            mapping.mapped.append(_plan_region(regions, region, kind, mapping, files))
            _plan_content(region, index, kind, mapping)
    except BaseException:
        mapping.close()
        raise
    return mapping


def _plan_region(
    regions: Sequence[RegionEntry], region: RegionEntry, kind: Kind, mapping: Mapping, files: dict[tuple[str, int], int]
) -> Mapped:
    if kind is Kind.DEVICE:
        raise RebuildFailed("memory of a device cannot be mapped again", subject=_label(region))
    flags = MAP_FIXED_NOREPLACE
    if "nr" in region.flags:
        flags |= MAP_NORESERVE
    if kind in (Kind.FILE, Kind.SHARED_FILE):
        # what was opened for writing may be made writable again (VM_MAYWRITE)
        writable = kind is Kind.SHARED_FILE and ("mw" in region.flags or "w" in region.perms)
        mode = os.O_RDWR if writable else os.O_RDONLY
        fd = files.get((region.path, mode), -1)
        if fd < 0:
            fd = files[region.path, mode] = _open(region, mode)
            mapping.fds.append(fd)
            if writable:
                mapping.warnings.append(
                    f"{region.path} is mapped shared: the copy writes to the file that its source has"
                )
        _check_identity(region, kind, fd)
        return Mapped(region, flags | (MAP_SHARED if kind is Kind.SHARED_FILE else MAP_PRIVATE), fd, region.offset)
    if kind is Kind.SHARED_ANON:
        return Mapped(region, flags | MAP_SHARED, _backing(regions, region, mapping), region.offset)
    if "gd" in region.flags or kind is Kind.STACK:
        flags |= MAP_GROWSDOWN
    flags |= MAP_DROPPABLE if "dp" in region.flags else MAP_PRIVATE
    return Mapped(region, flags | MAP_ANONYMOUS, -1, 0)


def _plan_content(region: RegionEntry, index: int, kind: Kind, mapping: Mapping) -> None:
    if region.slot is None:
        return
    if region.treatment == Treatment.PROTECTED.value:
        mapping.lazy.append(index)
        return
    first, n_pages = region.slot // PAGE, region.size // PAGE
    if kind is Kind.SHARED_ANON:
        mapping.contents.append(Content(region.offset, first, n_pages, mapping.shared[region.dev, region.inode]))
    else:
        mapping.contents.append(Content(region.start, first, n_pages))


def _open(region: RegionEntry, mode: int) -> int:
    try:
        if not stat.S_ISREG(os.stat(region.path).st_mode):  # to open a device may do something
            raise RebuildFailed("it is not a regular file any more", subject=region.path)
        return os.open(region.path, mode | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise RebuildFailed(
            f"cannot open the file mapped at {region.start:#x}",
            subject=region.path,
            syscall="open",
            errno=error.errno or 0,
            cure="Put the same file there that the source had",
        ) from None


def _check_identity(region: RegionEntry, kind: Kind, fd: int) -> None:
    """A private mapping's unchanged pages come from the file, so it must be the one of T0.

    A shared one's content is the file, whatever it is now; it only must reach as far.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise RebuildFailed("it is not a regular file any more", subject=region.path)
    if region.file_size < 0:
        return
    if kind is Kind.SHARED_FILE:
        if status.st_size < min(region.file_size, region.offset + region.size):
            raise RebuildFailed(
                f"it is shorter ({status.st_size} bytes) than at T0 ({region.file_size})",
                subject=region.path,
                cure="Put the file there that the source had",
            )
        return
    if (status.st_size, status.st_mtime_ns) != (region.file_size, region.file_mtime_ns):
        raise RebuildFailed(
            "it is not the file that was mapped at T0 (size or modification time differ)",
            subject=region.path,
            cure="Install the same version there, with its time stamps, or take a new snapshot",
        )


def _backing(regions: Sequence[RegionEntry], region: RegionEntry, mapping: Mapping) -> int:
    """Our descriptor of a new object of shared memory, one for all regions that had the same one at T0."""
    key = (region.dev, region.inode)
    if key not in mapping.shared:
        same = [r for r in regions if r.kind == Kind.SHARED_ANON.value and (r.dev, r.inode) == key]
        size = max([r.offset + r.size for r in same] + [r.file_size for r in same])
        if region.path.startswith("/memfd:"):
            name = region.path.removeprefix("/memfd:").removesuffix(" (deleted)")
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
        else:
            fd = _shared_object(size)
        mapping.fds.append(fd)
        mapping.shared[key] = fd
    return mapping.shared[key]


def _shared_object(size: int) -> int:
    """What MAP_SHARED|MAP_ANONYMOUS makes has a file behind it that only map_files gives a descriptor of."""
    with mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as memory:
        address = _address_of(memory)
        end = address + -(-size // PAGE) * PAGE
        return os.open(f"/proc/self/map_files/{address:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)


def _address_of(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    del view
    return address


def _label(region: RegionEntry) -> str:
    return f"{region.start:x}-{region.end:x} {region.path or 'anon'}"


def _protection(region: RegionEntry) -> int:
    return sum(bit for letter, bit in _PROTECTIONS.items() if letter in region.perms[:3])


def _was_writable(region: RegionEntry) -> bool:
    """Writable once, then not any more. The copy's region takes the same way.

    The kernel goes on accounting for such memory where it has pages of its own, and keeps it apart from its neighbours.
    """
    return "ac" in region.flags and not region.perms.endswith("s") and "w" not in region.perms


def map_calls(m: Mapped, number: int) -> Iterator[Call]:
    """`number`: the copy's descriptor of its file."""
    region, label = m.region, _label(m.region)
    protection = _protection(region)
    if _was_writable(region):
        protection |= _PROTECTIONS["w"]
    yield Call(f"map {label}", NR["mmap"], (region.start, region.size, protection, m.flags, number, m.offset))
    for prefix in ("[anon:", "[anon_shmem:"):
        if region.path.startswith(prefix):
            name = region.path.removeprefix(prefix).removesuffix("]").encode() + b"\0"
            naming = (PR_SET_VMA, PR_SET_VMA_ANON_NAME, region.start, region.size, name)
            yield Call(f"name {label}", NR["prctl"], naming, allow=(errno.EINVAL,))
    for word, advice in _ADVICE.items():
        if word in region.flags:
            allow = (errno.EINVAL,) if word in _OPTIONAL_ADVICE else ()
            yield Call(f"advise ({word}) {label}", NR["madvise"], (region.start, region.size, advice), allow)


def _late_calls(region: RegionEntry) -> Iterator[Call]:
    label = _label(region)
    lazy = region.treatment == Treatment.PROTECTED.value
    if _was_writable(region):
        yield Call(f"protect {label}", NR["mprotect"], (region.start, region.size, _protection(region)))
    if "lo" in region.flags:
        # on fault, else the lock would wait for every missing page; inaccessible pages cannot be brought in (ENOMEM)
        flags = MLOCK_ONFAULT if lazy or "lf" in region.flags else 0
        yield Call(f"lock {label}", NR["mlock2"], (region.start, region.size, flags), allow=(errno.ENOMEM,))
    if "sl" in region.flags:
        yield Call(f"seal {label}", NR["mseal"], (region.start, region.size, 0))


# ---------------------------------------------------------------- the stub's own layout

Range = tuple[int, int]


def free_range(size: int, *taken: Iterable[Range]) -> int:
    """An address where `size` bytes, and a margin around them, are free in all the layouts."""
    floor = 1 << 32
    for start, end in sorted(r for layout in taken for r in layout):
        if end <= floor:
            continue
        if start - floor >= size + 2 * _MARGIN:
            break
        floor = max(floor, end)
    if floor + size + 2 * _MARGIN > _TASK_SIZE:
        raise RebuildFailed("no free range for the scratch pages in the copy's address space")
    return floor + _MARGIN


def clear_calls(keep: Sequence[Range]) -> list[Call]:
    """Unmap everything but the ranges to keep."""
    calls, floor = [], 0
    for start, end in [*sorted(keep), (_TASK_SIZE, _TASK_SIZE)]:
        if start > floor:
            calls.append(Call(f"unmap {floor:x}-{start:x}", NR["munmap"], (floor, start - floor)))
        floor = end
    return calls


@dataclass(frozen=True, slots=True)
class KernelRegion:
    """vdso, vvar, vvar_vclock."""

    name: str
    start: int
    end: int


def move_calls(ours: Sequence[KernelRegion], theirs: Sequence[KernelRegion], spare: int) -> list[Call]:
    """Move the kernel's regions from where the stub has them to where the copy had them.

    `spare`: a range free in both layouts, as large as all of them, for where old and new places overlap.
    """
    new = {region.name: region for region in theirs}
    if [(r.name, r.end - r.start) for r in ours if r.name in new] != [(r.name, r.end - r.start) for r in theirs]:
        raise RebuildFailed(
            "this kernel's vdso and vvar regions differ in number or size from those at T0",
            cure="Restore it under the kernel of the source",
        )
    calls = [Call(f"unmap {r.name}", NR["munmap"], (r.start, r.end - r.start)) for r in ours if r.name not in new]
    moves = [(region, new[region.name].start) for region in ours if region.name in new]
    if all(region.start == target for region, target in moves):
        return calls
    old_start, old_end = min(r.start for r in ours), max(r.end for r in ours)
    if any(target < old_end and old_start < target + r.end - r.start for r, target in moves):
        aside = []
        for region, target in moves:
            size = region.end - region.start
            calls.append(_move(region, spare))
            aside.append((KernelRegion(region.name, spare, spare + size), target))
            spare += size
        moves = aside
    return calls + [_move(region, target) for region, target in moves]


def _move(region: KernelRegion, target: int) -> Call:
    size = region.end - region.start
    arguments = (region.start, size, size, MREMAP_MAYMOVE_FIXED, target)
    return Call(f"move {region.name} to {target:#x}", NR["mremap"], arguments)
