"""What a process frees, moves and maps anew after the last round of pre-copy: nothing of it is in the picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuimig.core.model import PAGE, Event, Options, Round
from tuimig.core.policy import Policy
from tuimig.core.session import Session
from tuimig.core.snapshot import open_snapshot

MIB = 1 << 20
SIZE = 32 * MIB

PROGRAM = f"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
word = ctypes.c_size_t
MIB, SIZE = {MIB}, {SIZE}
def mapped(size, at=0, flags=0x22):
    return libc.mmap(ctypes.c_void_p(at), word(size), 3, flags, -1, word(0))
def remap(at, old, new, flags=0, to=0):
    return libc.mremap(ctypes.c_void_p(at), word(old), word(new), flags, ctypes.c_void_p(to))
def free(at, size):
    assert libc.madvise(ctypes.c_void_p(at), word(size), 4) == 0
at = (mapped(SIZE + 2 * MIB) + 2 * MIB - 1) & ~(2 * MIB - 1)
other = mapped(8 * MIB)
ctypes.memset(at, 7, SIZE)
ctypes.memset(other, 9, 8 * MIB)
print(at, flush=True)
middle = at + 8 * MIB
what = sys.stdin.readline().strip()
if what == "tables":  # whole page tables go
    free(middle, 8 * MIB)
elif what == "pages":
    for page in range(0, 8 * MIB, 12288):
        free(middle + page, 4096)
elif what == "zero":  # and are read again
    free(middle, 8 * MIB)
    ctypes.string_at(middle, 8 * MIB)
elif what == "anew":
    assert mapped(8 * MIB, middle, 0x32) == middle
elif what == "written anew":
    assert mapped(8 * MIB, middle, 0x32) == middle
    ctypes.memset(middle, 3, 8 * MIB)
elif what == "moved":
    assert remap(other, 8 * MIB, 8 * MIB, 3, middle) == middle
elif what == "shrunk":  # the same mapping, without its tables
    end = at + SIZE
    libc.munmap(ctypes.c_void_p(end), word(MIB))
    assert remap(at, SIZE, SIZE - 8 * MIB) == at
    assert remap(at, SIZE - 8 * MIB, SIZE) == at
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def program() -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        try:
            assert it.stdout is not None
            yield it, int(it.stdout.readline())
        finally:
            it.kill()


def stored(directory: Path, start: int, size: int) -> bytes:
    """What a snapshot has of these addresses."""
    picture = bytearray(size)
    with open_snapshot(directory) as snapshot, open(directory / "pages", "rb") as pages:
        for region in snapshot.manifest.regions:
            begin, end = max(start, region.start), min(start + size, region.start + region.size)
            if region.slot is not None and begin < end:
                pages.seek(region.slot + begin - region.start)
                picture[begin - start : end - start] = pages.read(end - begin)
    return bytes(picture)


@pytest.mark.parametrize("what", ["nothing", "tables", "pages", "zero", "anew", "written anew", "moved", "shrunk"])
def test_gone_before_the_freeze(need: Callable[..., None], place: Path, quiet: Path, what: str) -> None:
    need(root=True)
    with program() as (process, address):
        done = False

        def listener(event: Event) -> None:
            nonlocal done
            if isinstance(event, Round) and event.number == 1 and not done:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(what + "\n")
                process.stdin.flush()
                assert process.stdout.readline() == "done\n"
                done = True

        report = Session(listener).snapshot(process.pid, place / "snap", Policy(), Options(verify=True, yes=True))
        assert done
        assert report.precopy is not None
        assert report.precopy.valid_pages > 20 * MIB // PAGE, "nothing was pre-copied: this test proves nothing"
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as now:
            now.seek(address)
            assert stored(place / "snap", address, SIZE) == now.read(SIZE)
