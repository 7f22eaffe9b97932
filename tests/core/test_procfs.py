"""Looking at real processes: regions, identity, descriptors, what happens when they go away."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuimig.core import procfs
from tuimig.core.errors import PrivilegeError, TargetGone
from tuimig.core.model import Kind, Options


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def test_our_own_regions() -> None:
    with mmap.mmap(-1, 1 << 20) as shared, mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE) as private:
        shared[0], private[0] = 1, 1
        regions = procfs.read_regions(os.getpid())
    kinds = {region.kind for region in regions}
    assert {Kind.ANON, Kind.STACK, Kind.FILE, Kind.KERNEL, Kind.SHARED_ANON} <= kinds
    assert all(a.end <= b.start for a, b in itertools.pairwise(regions))
    stack = next(region for region in regions if region.kind is Kind.STACK)
    assert "gd" in stack.flags
    assert stack.rss > 0
    bare = procfs.read_regions(os.getpid(), with_figures=False)
    assert {r.flags for r in bare} == {frozenset()}
    assert next(r for r in bare if r.kind is Kind.STACK).end == stack.end


def test_a_file_whose_name_says_deleted_is_not(tmp_path: Path) -> None:
    for name, gone in (("kept (deleted)", False), ("gone", True)):
        path = tmp_path / name
        path.write_bytes(b"x" * 4096)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ):
            if gone:
                path.unlink()
            region = next(r for r in procfs.read_regions(os.getpid()) if name in r.path)
        assert region.kind is (Kind.DELETED if gone else Kind.FILE)
        assert region.path.endswith("(deleted)")


def test_identity_of_a_process_that_ends(sleeper: subprocess.Popen[bytes]) -> None:
    with procfs.Identity.pin(sleeper.pid) as identity:
        identity.check()
        assert identity.alive()
        assert identity.started == procfs.start_time(sleeper.pid)
        sleeper.kill()
        sleeper.wait()
        assert not identity.alive()
        with pytest.raises(TargetGone, match="ended"):
            identity.check()


def test_a_name_with_brackets_does_not_confuse_the_start_time() -> None:
    code = "import sys; open('/proc/self/comm','w').write(') S 1 (x'); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        theirs, ours = procfs.start_time(process.pid), procfs.start_time(os.getpid())
        assert ours <= theirs < ours + 3600 * os.sysconf("SC_CLK_TCK")
    finally:
        process.communicate()


@pytest.mark.parametrize("pid", [0, -1, 1 << 22, 999_999_999])
def test_nobody_there(pid: int) -> None:
    with pytest.raises(TargetGone):
        procfs.Identity.pin(pid)


def test_a_thread_is_not_a_process() -> None:
    seen: list[int] = []
    gate, started = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (seen.append(threading.get_native_id()), started.set(), gate.wait()))
    thread.start()
    started.wait()
    try:
        with pytest.raises(TargetGone, match="not a process"):
            procfs.Identity.pin(seen[0])
    finally:
        gate.set()
        thread.join()


def test_descriptors_that_share_a_description() -> None:
    first = os.open("/dev/null", os.O_RDONLY)
    second = os.dup(first)
    third = os.open("/dev/null", os.O_RDONLY)
    fourth = os.dup(third)
    try:
        found = procfs.read_descriptors(os.getpid())
    finally:
        for fd in (first, second, third, fourth):
            os.close(fd)
    assert found[first].same_as == found[second].same_as == first
    assert found[third].same_as == found[fourth].same_as == third
    assert found[first].link == "/dev/null"
    assert found[first].cloexec


def test_many_descriptors_of_one_name() -> None:
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    dups = {fd: os.dup(fd) for fd in opened[::3]}
    try:
        found = procfs.read_descriptors(os.getpid())
    finally:
        for fd in (*opened, *dups.values()):
            os.close(fd)
    assert all(found[fd].same_as == fd for fd in opened)
    assert all(found[copy].same_as == fd for fd, copy in dups.items())


def test_a_look_holds_everything_and_lets_go(sleeper: subprocess.Popen[bytes]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with procfs.look(sleeper.pid, Options()) as look:
        assert look.status["Name"] == "sleep"
        assert look.tids == [sleeper.pid]
        assert os.fstat(look.duplicate(0)).st_rdev == os.stat("/dev/null").st_rdev
        assert look.duplicate(0) == look.duplicate(0)
        with pytest.raises(OSError, match="Bad file"):
            look.duplicate(77)
    with pytest.raises(OSError, match="Bad file"):
        look.duplicate(0)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_look_at_a_zombie() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TargetGone):
        procfs.look(process.pid, Options())
    process.wait()


def test_a_process_of_somebody_else(need: Callable[..., None]) -> None:
    need(root=True)
    code = (
        "import os, sys\n"
        "from tuimig.core import procfs\n"
        "from tuimig.core.model import Options\n"
        "from tuimig.core.errors import PrivilegeError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: procfs.look(int(sys.argv[1]), Options())\n"
        "except PrivilegeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(os.getpid())], capture_output=True, text=True)
    assert "may not look into the process" in done.stdout, done.stderr
    assert PrivilegeError.exit_code == 3


def test_the_list_of_processes(sleeper: subprocess.Popen[bytes]) -> None:
    lines = {line.pid: line for line in procfs.processes()}
    mine = lines[sleeper.pid]
    assert mine.command == "sleep 60"
    assert mine.readable
    assert not mine.kernel
    assert lines[os.getpid()].threads >= 1


def test_threads_are_listed_leader_first() -> None:
    code = (
        "import threading, sys\n"
        "for _ in range(3): threading.Thread(target=sys.stdin.read, daemon=True).start()\n"
        "print(flush=True); threading.Event().wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        tids = procfs.read_tids(process.pid)
        assert tids[0] == process.pid
        assert len(tids) == 4
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
