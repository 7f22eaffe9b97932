"""Parses `/proc/PID/maps` and `smaps` into regions, and tells what kind each region is.

Pure: bytes in, values out. 10,000 regions take well under a second.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Final

from tuimig.core.model import Kind, Region

DELETED: Final = " (deleted)"
KERNEL_NAMES: Final = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"})
# VmFlags that no file can stand for: memory of a device, hugetlbfs pages, a shadow stack.
DEVICE_FLAGS: Final = frozenset({"pf", "io", "ht", "ss"})
# smaps lines that a region keeps, in bytes where the line says kB.
_FIGURES: Final = {
    b"Rss": "rss",
    b"Swap": "swap",
    b"Anonymous": "anonymous",
    b"AnonHugePages": "huge",
    b"ProtectionKey": "pkey",
}
# A line of maps, and the lines of smaps below it: these begin with a capital letter, an address never does.
_ENTRY: Final = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) +(\S{4}) +([0-9a-f]+) +(\S+) +(\d+) *([^\n]*)(\n(?:[A-Z][^\n]*\n)*)"
)


def kind_of(path: str, perms: str, flags: frozenset[str] = frozenset()) -> Kind:
    """The kind of a region, from its line in maps and, where they were read, its VmFlags."""
    shared = perms[3] == "s"
    if path in KERNEL_NAMES:
        return Kind.KERNEL
    if flags & DEVICE_FLAGS:
        return Kind.DEVICE
    if path.startswith("["):
        if path == "[heap]":
            return Kind.HEAP
        if path.startswith("[stack"):
            return Kind.STACK
        if path.startswith("[anon_shmem:"):
            return Kind.SHARED_ANON
        return Kind.ANON if path.startswith("[anon:") else Kind.DEVICE  # [uprobes]: code of a debugger's
    if not path:
        return Kind.SHARED_ANON if shared else Kind.ANON
    if not path.startswith("/"):  # anon_inode:[io_uring], socket:[123], (unreachable)/path
        return Kind.DEVICE
    if path == "/dev/zero" and not shared:
        return Kind.ANON
    if path == "/dev/zero" + DELETED:
        return Kind.SHARED_ANON if shared else Kind.DELETED
    if _is_device(path):
        return Kind.DEVICE
    if path.endswith(DELETED):
        return Kind.SHARED_ANON if shared else Kind.DELETED
    return Kind.SHARED_FILE if shared else Kind.FILE


def _is_device(path: str) -> bool:
    if path.endswith(DELETED):
        return path.startswith(("/SYSV", "/anon_hugepage", "/secretmem", "/[aio]"))
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")


def parse_maps(text: bytes) -> list[Region]:
    """Regions of a `maps` or `smaps` file in address order; figures and flags where the text has them."""
    regions, at = [], 0
    for found in _ENTRY.finditer(text):
        if found.start() != at:
            break
        at = found.end()
        regions.append(_region(found))
    if at != len(text):
        raise ValueError(f"not a line of a maps file: {text[at:].splitlines()[0]!r}")
    return regions


def _region(found: re.Match[bytes]) -> Region:
    start, end, perms, offset, dev, inode, name, details = found.groups()
    figures: dict[str, int] = {}
    for key, attribute in _FIGURES.items():
        value = _value(details, key)
        if value and value != b"0 kB":
            figures[attribute] = int(value.removesuffix(b" kB")) * (1024 if value.endswith(b" kB") else 1)
    flags = _flags(_value(details, b"VmFlags"))
    # The kernel escapes newlines in names, nothing else.
    path = os.fsdecode(name.replace(b"\\012", b"\n")) if name else ""
    permissions = _text(perms)
    return Region(
        int(start, 16),
        int(end, 16),
        permissions,
        int(offset, 16),
        _text(dev),
        int(inode),
        path,
        kind_of(path, permissions, flags),
        flags=flags,
        **figures,
    )


def _value(details: bytes, key: bytes) -> bytes:
    """What stands behind a key, empty where it is not there. Ten times as fast as looking at each line."""
    at = details.find(b"\n" + key + b":")
    return details[at + len(key) + 2 : details.index(b"\n", at + 1)].strip() if at >= 0 else b""


@functools.lru_cache(maxsize=1024)
def _text(word: bytes) -> str:
    return word.decode("ascii")


@functools.lru_cache(maxsize=1024)
def _flags(words: bytes) -> frozenset[str]:
    return frozenset(words.decode("ascii").split())
