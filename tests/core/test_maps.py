"""Parsing maps and smaps: each kind of region, odd names, many regions."""

from __future__ import annotations

import time

import pytest

from tuimig.core.maps import kind_of, parse_maps
from tuimig.core.model import Kind

SMAPS = b"""\
5581c5a00000-5581c5b00000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Rss:                 512 kB
Anonymous:           508 kB
AnonHugePages:       256 kB
Swap:                  8 kB
ProtectionKey:         3
VmFlags: rd wr mr mw me ac sd
7f0000000000-7f0000001000 r--s 00002000 fe:00 4711                       /tmp/a file\\012with a newline
Size:                  4 kB
Rss:                   4 kB
VmFlags: rd mr me ms
"""


def test_figures_and_flags() -> None:
    heap, file = parse_maps(SMAPS)
    assert (heap.start, heap.end, heap.size) == (0x5581C5A00000, 0x5581C5B00000, 1 << 20)
    assert (heap.rss, heap.anonymous, heap.huge, heap.swap, heap.pkey) == (512 << 10, 508 << 10, 256 << 10, 8 << 10, 3)
    assert heap.flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd"}
    assert (heap.kind, file.kind) == (Kind.HEAP, Kind.SHARED_FILE)
    assert (file.path, file.offset, file.dev, file.inode) == ("/tmp/a file\nwith a newline", 0x2000, "fe:00", 4711)
    assert file.shared
    assert file.pkey == 0


@pytest.mark.parametrize(
    ("path", "perms", "flags", "kind"),
    [
        ("", "rw-p", "", Kind.ANON),
        ("[anon:glibc: malloc]", "rw-p", "", Kind.ANON),
        ("[heap]", "rw-p", "", Kind.HEAP),
        ("[stack]", "rw-p", "gd", Kind.STACK),
        ("[vdso]", "r-xp", "", Kind.KERNEL),
        ("[vvar]", "r--p", "io pf", Kind.KERNEL),
        ("[vvar_vclock]", "r--p", "io pf", Kind.KERNEL),
        ("[vsyscall]", "--xp", "", Kind.KERNEL),
        ("[uprobes]", "--xp", "", Kind.DEVICE),
        ("[anon_shmem:pool]", "rw-s", "", Kind.SHARED_ANON),
        ("/dev/zero", "rw-p", "", Kind.ANON),
        ("/dev/zero (deleted)", "rw-s", "", Kind.SHARED_ANON),
        ("/memfd:jit (deleted)", "rw-s", "", Kind.SHARED_ANON),
        ("/memfd:jit (deleted)", "rw-p", "", Kind.DELETED),
        ("/usr/lib/libc.so.6", "r-xp", "", Kind.FILE),
        ("/usr/lib/libc.so.6 (deleted)", "r-xp", "", Kind.DELETED),
        ("/var/lib/db", "rw-s", "", Kind.SHARED_FILE),
        ("/dev/shm/pool", "rw-s", "", Kind.SHARED_FILE),
        ("/SYSV00000000 (deleted)", "rw-s", "", Kind.DEVICE),
        ("/anon_hugepage (deleted)", "rw-p", "", Kind.DEVICE),
        ("/memfd:huge (deleted)", "rw-s", "ht", Kind.DEVICE),
        ("/secretmem (deleted)", "rw-s", "", Kind.DEVICE),
        ("/[aio] (deleted)", "rw-s", "", Kind.DEVICE),
        ("anon_inode:[io_uring]", "rw-s", "", Kind.DEVICE),
        ("socket:[1234]", "rw-s", "", Kind.DEVICE),
        ("/dev/dri/card0", "rw-s", "", Kind.DEVICE),
        ("/opt/mapped", "rw-s", "pf io", Kind.DEVICE),
        ("", "rw-p", "ss", Kind.DEVICE),
    ],
)
def test_kinds(path: str, perms: str, flags: str, kind: Kind) -> None:
    assert kind_of(path, perms, frozenset(flags.split())) is kind


def test_names_that_are_not_utf8_survive() -> None:
    (region,) = parse_maps(b"1000-2000 r--p 00000000 fe:00 1 /tmp/\xff\n")
    assert region.path.encode("utf-8", "surrogateescape") == b"/tmp/\xff"


def test_a_line_that_is_none() -> None:
    with pytest.raises(ValueError, match="not a line of a maps file"):
        parse_maps(b"1000-2000 r--p\n2000-3000 r--p 00000000 00:00 0\n")


def test_ten_thousand_regions_are_quick() -> None:
    one = SMAPS.split(b"\n7f00", 1)[0] + b"\n" + b"Locked:                0 kB\n" * 15
    text = b"".join(
        one.replace(b"5581c5a00000-5581c5b00000", b"%x-%x" % (i << 12, (i + 1) << 12)) for i in range(10_000)
    )
    began = time.perf_counter()
    regions = parse_maps(text)
    assert len(regions) == 10_000
    assert time.perf_counter() - began < 2.0
