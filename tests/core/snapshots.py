"""Snapshots made by hand, small and with every kind of content: for the tests of the directory."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec

from tuimig.core.manifest import FORMAT, Clocks, Host, Manifest, Process, RegionEntry, ThreadEntry
from tuimig.core.model import PAGE
from tuimig.core.snapshot import Writer
from tuimig.core.spool import ZERO_CONTENT, Spool

ADDRESS = 0x7F0000000000


def region(start: int, count: int, slot: int | None, **fields: object) -> RegionEntry:
    values: dict[str, object] = {
        "start": start,
        "end": start + count * PAGE,
        "perms": "rw-p",
        "offset": 0,
        "dev": "00:00",
        "inode": 0,
        "path": "",
        "kind": "anon",
        "treatment": "none" if slot is None else "protected",
        "rule": "test",
        "flags": ["rd", "wr"],
        "slot": slot,
        "whole": True,
        "pages": 0,
        "digest": "",
    }
    return RegionEntry(**(values | fields))  # type: ignore[arg-type]


def thread(tid: int, **fields: object) -> ThreadEntry:
    values: dict[str, object] = {
        "tid": tid,
        "host_tid": tid,
        "comm": "test",
        "regs": bytes(216),
        "xstate": bytes(832),
        "sigmask": 0,
        "robust_head": 0,
        "robust_len": 0,
        "rseq_pointer": 0,
        "rseq_size": 0,
        "rseq_signature": 0,
        "rseq_flags": 0,
        "pending": [],
    }
    return ThreadEntry(**(values | fields))  # type: ignore[arg-type]


def manifest(regions: list[RegionEntry], pages_size: int) -> Manifest:
    return Manifest(
        format=FORMAT,
        tuimig="0",
        created="2025-01-02T03:04:05+00:00",
        host=Host(arch="x86_64", page_size=PAGE, kernel="6.18", boot_id="b", xfeatures=7),
        clocks=Clocks(realtime_ns=3, monotonic_ns=2, boottime_ns=2),
        process=Process(pid=7, host_pid=70, ppid=1, pgid=7, sid=7, comm="test", cmdline=["./test"], exe="/bin/test"),
        regions=regions,
        threads=[thread(7), thread(8)],
        shared_pending=[bytes(128)],
        pages_size=pages_size,
        state={"sample": msgspec.Raw(b'{"n":1}')},
        frozen_us=1500,
    )


def write(directory: Path, seed: int = 1) -> Manifest:
    """Three regions with content (one sparse, one of a file with a zero page as content), one without."""
    sizes = (12, 3000, 5)
    regions, slot = [], 0
    for number, pages in enumerate(sizes):
        whole = number != 2
        kind = "anon" if whole else "file"
        path = "" if whole else "/lib/a.so"
        regions.append(region(ADDRESS + number * (1 << 30), pages, slot, whole=whole, kind=kind, path=path))
        slot += (pages + 1) * PAGE  # with a gap
    regions.append(region(ADDRESS + (3 << 30), 9, None, kind="kernel", path="[vdso]", perms="r-xp"))
    chance = random.Random(seed)
    with Writer.create(directory) as writer:
        with Spool(writer.pages_fd, slot // PAGE, writable=True) as spool:
            for page in [*range(0, 12, 2), 13, 14, 1500, 13 + 2999, 3014]:
                spool.put(page, chance.randbytes(PAGE))
            spool.sums[3016] = ZERO_CONTENT
            return writer.commit(manifest(regions, slot), spool.sums)


def rewrite(directory: Path, changed: Manifest | bytes) -> None:
    """Replace the manifest by one with a right checksum: what an attacker, not a bad disk, would do."""
    from tuimig.core.snapshot import layout

    data = changed if isinstance(changed, bytes) else msgspec.json.encode(changed)
    path = directory / layout.MANIFEST
    path.write_bytes(layout.wrap(data))


def flip(path: Path, offset: int, mask: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        old = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([old ^ mask]), offset)
    finally:
        os.close(fd)


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The paths of all values in a decoded JSON document."""
    below: list[tuple[object, ...]] = []
    if isinstance(value, dict):
        below = [p for key in value for p in places(value[key], (*path, key))]
    elif isinstance(value, list):
        below = [p for i, item in enumerate(value) for p in places(item, (*path, i))]
    return ([path] if path else []) + below
