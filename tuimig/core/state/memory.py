"""The memory descriptor: where code, data, heap, stack, arguments and environment lie; the auxiliary vector; the
executable; the vdso. The regions themselves are in the manifest; `core/mapping.py` maps them again.

All is set by one prctl after the regions stand, with pointers inside its argument, so destination.py makes that call.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, RebuildFailed, Unsupported
from tuimig.core.manifest import Strict
from tuimig.core.model import Kind, Region
from tuimig.core.state.base import Build, Call, Frozen, Look, Probe, ProbeKind
from tuimig.core.syscalls import NR

PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
_MM_MAP: Final = struct.Struct("<11QQIi")  # struct prctl_mm_map: addresses, auxv, its size, exe descriptor
# fields of /proc/PID/stat, counted from 1 as in proc(5)
_STAT: Final = {
    "start_code": 26,
    "end_code": 27,
    "start_stack": 28,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
    "arg_start": 48,
    "arg_end": 49,
    "env_start": 50,
    "env_end": 51,
}


class MemorySection(Strict, frozen=True):
    """Addresses of the memory descriptor; `vdso`: blake2b-16 hex of the vdso's bytes, empty where there is none."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes
    vdso: str


class Memory:
    name: ClassVar[str] = "memory"
    Section: ClassVar[type[msgspec.Struct]] = MemorySection

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        if _exe(look.pid).endswith(" (deleted)"):
            found.append(
                Obstacle(
                    "deleted-program",
                    f"process {look.pid}",
                    f"its program file {_exe(look.pid).removesuffix(' (deleted)')} is gone from the disk",
                    "Restart the process with the program that is there now",
                )
            )
        for region in look.regions:
            if region.kind is Kind.KERNEL and region.path == "[vdso]" and _foreign_vdso(look.pid, region):
                found.append(
                    Obstacle(
                        "foreign-vdso",
                        str(region),
                        "its vdso is not the one that this kernel gives to 64-bit programs",
                        "Only processes with the kernel's own 64-bit vdso can be migrated",
                    )
                )
        return found

    def probes(self, look: Look) -> list[Probe]:
        return [
            Probe("memory.brk", ProbeKind.CALL, NR["brk"], (0,)),
            Probe("memory.stat", ProbeKind.FILE, path=f"/proc/{look.pid}/stat"),
            Probe("memory.auxv", ProbeKind.FILE, path=f"/proc/{look.pid}/auxv"),
        ]

    def dump(self, frozen: Frozen) -> MemorySection:
        for key in ("memory.brk", "memory.stat", "memory.auxv"):
            if frozen.calls[key].ret < 0:
                raise Unsupported(
                    f"{key.removeprefix('memory.')} could not be read at T0", errno=-frozen.calls[key].ret
                )
        # the name in parentheses may hold anything, also spaces and parentheses
        fields = frozen.calls["memory.stat"].data.rpartition(b")")[2].split()
        addresses = {name: int(fields[number - 3]) for name, number in _STAT.items()}
        has_vdso = any(region.path == "[vdso]" for region in frozen.regions)
        return MemorySection(
            brk=frozen.calls["memory.brk"].ret,
            auxv=frozen.calls["memory.auxv"].data,
            vdso=own_vdso() if has_vdso else "",
            **addresses,
        )

    def rebuild(self, section: MemorySection, build: Build) -> None:
        if section.vdso and section.vdso != own_vdso():
            raise RebuildFailed(
                "this kernel's vdso is not the one the process was captured with",
                subject=build.manifest.process.exe,
                cure="Restore it under the kernel of the source: " + build.manifest.host.kernel,
            )


KIND = Memory()


def mm_map_call(section: MemorySection, exe_number: int, data_address: int) -> Call:
    """Set the memory descriptor. `exe_number`: the copy's descriptor of its program; the call's data will lie at
    `data_address`. (Kernel: the addresses must be mapped in part; exe needs CAP_CHECKPOINT_RESTORE.)
    """
    s = section
    packed = _MM_MAP.pack(
        *(s.start_code, s.end_code, s.start_data, s.end_data, s.start_brk, s.brk),
        *(s.start_stack, s.arg_start, s.arg_end, s.env_start, s.env_end),
        data_address + _MM_MAP.size,
        len(s.auxv),
        exe_number,
    )
    return Call("set the memory descriptor", NR["prctl"], (PR_SET_MM, PR_SET_MM_MAP, packed + s.auxv, _MM_MAP.size, 0))


def own_vdso() -> str:
    """Digest of the vdso that this kernel maps into 64-bit programs, ours among them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, _, end = line.split()[0].partition("-")
            return _digest("self", int(start, 16), int(end, 16))
    return ""


def _foreign_vdso(pid: int, region: Region) -> bool:
    try:
        return _digest(str(pid), region.start, region.end) != own_vdso()
    except OSError:  # not ours to read, or gone: attaching says which
        return False


def _digest(pid: str, start: int, end: int) -> str:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        return hashlib.blake2b(memory.read(end - start), digest_size=16).hexdigest()


def _exe(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:  # not ours to read, or gone: attaching says which
        return ""
