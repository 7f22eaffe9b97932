"""The rebuild on its own: a child is dumped by tests/core/dumper.py, built again, and asked to check itself."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dumper
import msgspec
import psutil
import pytest
from harness.living import living
from harness.targets import compiled

from tuimig.core import destination, procfs, spawning
from tuimig.core.errors import EngineError, RebuildFailed, SnapshotDamaged
from tuimig.core.manifest import Manifest, Outline, RegionEntry
from tuimig.core.model import PAGE, Kind, Options
from tuimig.core.skeleton import Skeleton, sketch
from tuimig.core.state import credentials, memory, signals, threads
from tuimig.core.state.base import Build, Call, Stage
from tuimig.core.syscalls import NR

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
THREADS = 4


class Ends:
    """Stands for the descriptor kinds: gives the copy pipes of its own on 0 and 1."""

    name = "ends"

    class Section(msgspec.Struct):
        pass

    def __init__(self) -> None:
        self.extra: list[tuple[Stage, Call]] = []
        self.more: dict[int, int] = {}
        self.read, self.ask_fd = os.pipe()
        self.answer_fd, self.write = os.pipe()

    def probes(self, look: Any) -> list[Any]:
        return []

    def dump(self, frozen: Any) -> Section:
        return self.Section()

    def rebuild(self, section: Section, build: Build) -> None:
        build.place(0, self.read, cloexec=False)
        build.place(1, self.write, cloexec=False)
        build.place(2, 2, cloexec=False)
        for number, fd in self.more.items():
            build.place(number, fd, cloexec=True)
        for stage, call in self.extra:
            build.call(stage, call)

    def close(self) -> None:
        for fd in (self.read, self.write, self.ask_fd, self.answer_fd):
            os.close(fd)


class Source:
    """The target, what was dumped of it, and the copies made."""

    def __init__(self, kinds: tuple[Any, ...], ends: Ends) -> None:
        self.ends = ends
        self.kinds = kinds
        self.process = subprocess.Popen(
            [compiled("rebuilt")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={"MARK": "yes"}
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.pages_fd = os.memfd_create("pages")
        self.manifest, self.spool = dumper.dump(self.process.pid, kinds, self.pages_fd)
        self.picture = picture(self.process.pid)
        self.copies: list[destination.Copy] = []

    def build(
        self, manifest: Manifest | None = None, skeleton: Skeleton | None = None, **options: Any
    ) -> destination.Copy:
        copy = destination.build(manifest or self.manifest, self.spool, Options(**options), skeleton=skeleton)
        self.copies.append(copy)
        return copy

    def ask(self, command: str) -> str:
        os.write(self.ends.ask_fd, command.encode())
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.ends.answer_fd], [], [], 20)
            assert ready, f"no answer to {command}"
            line += os.read(self.ends.answer_fd, 1)
        return line.decode().strip()

    def end(self) -> None:
        for copy in self.copies:
            copy.kill()
            copy.reap()
            copy.close()
        self.process.kill()
        self.process.communicate()
        self.ends.close()
        self.spool.close()
        os.close(self.pages_fd)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    ends = Ends()
    kinds = (memory.KIND, threads.KIND, signals.KIND, credentials.KIND, ends)
    monkeypatch.setattr(destination, "KINDS", kinds)
    before = children()
    made = Source(kinds, ends)
    yield made
    made.end()
    assert children() == before, "processes are left behind"


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def picture(pid: int) -> dict[str, Any]:
    """What /proc shows of a process's memory."""
    regions = [(r.start, r.end, r.perms, r.offset, r.path, r.flags - {"sd"}) for r in procfs.read_regions(pid)]
    shown: dict[str, Any] = {name: procfs.read(pid, name) for name in ("auxv", "cmdline", "environ")}
    fields = procfs.read(pid, "stat").rpartition(b")")[2].split()
    shown["stat"] = [fields[i] for i in (23, 24, 25, 42, 43, 44, 45, 46, 47, 48)]
    shown["exe"] = os.readlink(f"/proc/{pid}/exe")
    shown["regions"] = regions
    shown["threads"] = sorted(
        Path(f"/proc/{pid}/task/{tid}/comm").read_text() for tid in os.listdir(f"/proc/{pid}/task")
    )
    return shown


@pytest.fixture(params=[False, True], ids=["from nothing", "from a skeleton"])
def early(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def outline(source: Source, regions: list[RegionEntry] | None = None) -> Outline:
    """Of some time before T0."""
    manifest = source.manifest
    clocks = msgspec.structs.replace(manifest.clocks, monotonic_ns=manifest.clocks.monotonic_ns - 10**6)
    bare = [msgspec.structs.replace(r, slot=None) for r in regions or manifest.regions]
    return Outline(clocks, manifest.process, bare, [t.tid for t in manifest.threads], [0, 1, 2])


def skeleton(source: Source, regions: list[RegionEntry] | None = None, **options: Any) -> Skeleton:
    made = sketch(outline(source, regions), Options(**options))
    assert made is not None
    return made


def as_before_t0(source: Source, change: str) -> list[RegionEntry]:
    """Regions of which some became others by T0."""
    regions = list(source.manifest.regions)
    heap = next(i for i, r in enumerate(regions) if r.kind == Kind.HEAP.value)
    text = next(i for i, r in enumerate(regions) if "libc" in r.path and "x" in r.perms)
    if change == "grown":
        regions[heap] = msgspec.structs.replace(regions[heap], end=regions[heap].end - PAGE)
    elif change == "other permissions":
        regions[heap] = msgspec.structs.replace(regions[heap], perms="r--p")
    elif change == "another file":
        regions[text] = msgspec.structs.replace(regions[text], kind=Kind.ANON.value, path="")
    elif change == "new":
        del regions[heap], regions[text]
    elif change == "gone":
        free = regions[heap].end + (1 << 30)
        more = msgspec.structs.replace(regions[heap], start=free, end=free + 4 * PAGE, kind=Kind.ANON.value, path="")
        regions.insert(heap + 1, more)
    return regions


@pytest.mark.parametrize("full", [True, False], ids=["full", "lazy"])
def test_the_copy_goes_on(source: Source, full: bool, early: bool) -> None:
    copy = source.build(full=full, skeleton=skeleton(source, full=full) if early else None)
    assert copy.early == early
    rounds = source.ask("r")
    assert source.ask("c") == f"good 0 {source.process.pid}"
    assert copy.inner_pid == source.process.pid
    for now, then in zip(source.ask("r").split(), rounds.split(), strict=True):
        assert int(now) > int(then) > 0, "every thread runs on"
    assert source.ask("s") == "0", "the stack grows"
    assert source.ask("b").split()[0] == "1", "the heap grows"
    assert source.ask("g") == str(signal.SIGUSR1 + 700), "a handler runs on the alternate stack"
    assert source.ask("p") == "1 1", "what was pending is pending"
    assert source.ask("u") != "0", "and is delivered"
    assert source.ask("f") == "42", "a child sees all of the memory"
    assert source.ask("j") == f"{THREADS} 130", (
        "threads are joined; the robust mutex's owner is known dead (EOWNERDEAD)"
    )
    assert source.ask("n") == "0", "new threads work"
    assert copy.wait_filled(20)
    assert source.ask("c") == f"good 0 {source.process.pid}"


@pytest.mark.parametrize("full", [True, False], ids=["full", "lazy"])
def test_proc_shows_the_same(source: Source, full: bool, early: bool) -> None:
    copy = source.build(full=full, skeleton=skeleton(source, full=full) if early else None)
    assert copy.wait_filled(20)
    shown = picture(copy.pid)
    assert [r for r in shown["regions"] if r not in source.picture["regions"]] == []
    assert shown == source.picture


@pytest.mark.parametrize("change", ["none", "grown", "other permissions", "another file", "new", "gone"])
def test_memory_that_changed_since_its_skeleton(source: Source, change: str) -> None:
    regions = as_before_t0(source, change)
    assert (regions == source.manifest.regions) == (change == "none")
    copy = source.build(skeleton=skeleton(source, regions))
    assert copy.early
    assert source.ask("c") == f"good 0 {source.process.pid}"
    assert source.ask("b").split()[0] == "1", "the heap grows"
    assert copy.wait_filled(20)
    source.process.kill()  # its answers would be the copy's
    shown = picture(copy.pid)
    assert [r[:5] for r in shown["regions"] if r[0] not in {x[0] for x in source.picture["regions"]}] == []


def test_a_skeleton_that_does_not_fit(source: Source) -> None:
    """The copy is built from nothing, and nothing is left of the skeleton."""
    manifest = source.manifest
    later = msgspec.structs.replace(manifest.clocks, monotonic_ns=manifest.clocks.monotonic_ns + 10**12)
    dead = skeleton(source)
    assert dead.stub is not None
    os.kill(dead.stub.pid, signal.SIGKILL)
    for unfit, given in (
        (skeleton(source, tcp="close"), manifest),  # other options
        (skeleton(source), msgspec.structs.replace(manifest, clocks=later)),  # its clocks would go back
        (dead, manifest),
    ):
        copy = source.build(given, skeleton=unfit)
        assert not copy.early
        assert unfit.stub is None
        assert source.ask("c") == f"good 0 {source.process.pid}"
        copy.kill()
        copy.reap()


def test_ignored_signals_are_ignored(source: Source, early: bool) -> None:
    """SIGTRAP too, by which injected batches end."""
    ignore = struct.pack("<QQQQ", 1, 0, 0, 0)
    numbers = (signal.SIGHUP, signal.SIGTRAP, signal.SIGSYS)
    source.ends.extra = [
        (Stage.SETUP, Call(f"ignore {number}", NR["rt_sigaction"], (number, ignore, 0, 8))) for number in numbers
    ]
    copy = source.build(skeleton=skeleton(source) if early else None)
    assert copy.early == early
    wanted = int(procfs.read_status(source.process.pid)["SigIgn"], 16)
    for number in numbers:
        wanted |= 1 << (number - 1)
    assert int(procfs.read_status(copy.pid)["SigIgn"], 16) == wanted


def test_what_was_mounted_since_its_skeleton(source: Source, tmp_path: Path, early: bool) -> None:
    """The copy sees what its source's files are opened in: a skeleton of before is not used."""
    place = tmp_path / "mounted"
    place.mkdir()
    source.ends.extra = [(Stage.SETUP, Call("change to it", NR["chdir"], (os.fsencode(place / "inside") + b"\0",)))]
    made = skeleton(source) if early else None
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        (place / "inside").mkdir()
        copy = source.build(skeleton=made)
        assert not copy.early
        assert os.stat(f"/proc/{copy.pid}/cwd").st_dev == os.stat(place).st_dev
        copy.kill()
        copy.reap()
    finally:
        subprocess.run(["umount", place], check=True)


def test_what_a_skeleton_does_not_manage_goes_from_nothing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    made = skeleton(source)

    def fails(*_: Any) -> None:
        raise RebuildFailed("no", syscall="pidfd_getfd", errno=errno.EPERM)

    monkeypatch.setattr(made, "_take", fails)
    copy = source.build(skeleton=made)
    assert not copy.early
    assert source.ask("c") == f"good 0 {source.process.pid}"


def test_signals_to_our_group_are_not_for_a_skeleton(source: Source) -> None:
    """Under the same id it is in our PID namespace; all that comes would wait for the copy."""
    source.process.kill()
    source.process.wait()
    made = skeleton(source, pid_namespace="host")
    assert made.stub is not None
    assert os.getpgid(made.stub.pid) == made.stub.pid
    os.kill(made.stub.pid, signal.SIGUSR2)
    copy = source.build(skeleton=made, pid_namespace="host")
    assert not copy.early
    assert source.ask("c") == f"good 0 {source.process.pid}"


def test_a_skeleton_that_cannot_be_made(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is none: no error, nothing left open."""
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
        assert sketch(outline(source), Options()) is None
    with monkeypatch.context() as patch:
        patch.setattr(spawning, "spawn", lambda *_: (_ for _ in ()).throw(EngineError("no memory for the stub")))
        assert sketch(outline(source), Options()) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_skeleton_ends_with_its_builder(source: Source) -> None:
    made = skeleton(source)
    assert made.stub is not None
    pid = made.stub.pid
    made.close()
    assert not Path(f"/proc/{pid}").exists()


def test_descriptors_of_a_skeleton(source: Source) -> None:
    """In gaps, at the lowest free numbers, and among those that the builder itself has."""
    fds = [os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC) for _ in range(40)]
    try:
        source.ends.more = {number: fds[i] for i, number in enumerate([*range(3, 30), 33, 34, 50, *range(53, 60)])}
        copy = source.build(skeleton=skeleton(source))
        assert copy.early
        shown = {int(name) for name in os.listdir(f"/proc/{copy.pid}/fd")}
        assert shown == {0, 1, 2, *source.ends.more}
        assert all(os.readlink(f"/proc/{copy.pid}/fd/{n}") == "/dev/zero" for n in source.ends.more)
        flags = {n: procfs.read(copy.pid, f"fdinfo/{n}") for n in (0, 3, 50)}
        assert [b"02" in flags[n].splitlines()[1] for n in (3, 50)] == [True, True], "close on exec"
        assert source.ask("c") == f"good 0 {source.process.pid}"
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("early_too", [False, True], ids=["from nothing", "from a skeleton"])
def test_clocks_go_on_from_t0(source: Source, early_too: bool) -> None:
    before = time.monotonic_ns() - 10**6  # of the outline
    made = skeleton(source, full=True) if early_too else None
    time.sleep(0.01)
    source.build(full=True, skeleton=made)
    clock = int(source.ask("t"))
    elapsed = time.monotonic_ns() - before
    assert 0 < clock - source.manifest.clocks.monotonic_ns <= elapsed


def test_under_the_same_id_where_it_is_free(source: Source) -> None:
    source.process.kill()
    source.process.wait()
    copy = source.build(full=True, pid_namespace="host")
    assert copy.pid == source.process.pid
    assert copy.init_pid is None
    assert source.ask("c") == f"good 0 {source.process.pid}"
    assert source.ask("j") == f"{THREADS} 130"


def test_as_first_process_of_its_namespace(source: Source) -> None:
    """A container's main process has id 1; glibc keeps ids in memory, so only self checks without them can pass."""
    manifest = source.manifest
    leader = msgspec.structs.replace(manifest.threads[0], tid=1)
    others = [msgspec.structs.replace(t, tid=i) for i, t in enumerate(manifest.threads[1:], 50)]
    process = msgspec.structs.replace(manifest.process, pid=1)
    copy = source.build(msgspec.structs.replace(manifest, process=process, threads=[leader, *others]), full=True)
    assert copy.init_pid is None
    assert source.ask("c").split()[::2] == ["good", "1"]


def test_taken_id_is_refused_with_a_cure(source: Source) -> None:
    with pytest.raises(RebuildFailed, match=rf"process id {source.process.pid} is taken.*--pid-namespace"):
        source.build(pid_namespace="host")


@pytest.mark.parametrize("stage", list(Stage))
def test_failed_call_names_itself_and_leaves_nothing(source: Source, stage: Stage) -> None:
    before = children()
    source.ends.extra.append((stage, Call("open what is not there", NR["open"], (b"/no/such/file\0", 0))))
    with pytest.raises(RebuildFailed, match=r"cannot open what is not there \(open: .*errno 2\)"):
        source.build()
    assert children() == before
    source.ends.extra[0] = (stage, Call("open what may be missing", NR["open"], (b"/no/such/file\0", 0), allow=(2,)))
    source.build()
    assert source.ask("c").startswith("good")


def test_changed_file_is_found_before_anything_is_built(source: Source) -> None:
    regions = list(source.manifest.regions)
    index = next(i for i, r in enumerate(regions) if r.kind == Kind.FILE.value)
    regions[index] = msgspec.structs.replace(regions[index], file_size=regions[index].file_size + 1)
    with pytest.raises(RebuildFailed, match="not the file that was mapped") as caught:
        source.build(msgspec.structs.replace(source.manifest, regions=regions))
    assert caught.value.subject == regions[index].path


def test_foreign_vdso_is_refused(source: Source) -> None:
    section = msgspec.json.decode(source.manifest.state["memory"], type=memory.MemorySection)
    foreign = msgspec.structs.replace(section, vdso="00" * 16)
    state = {**source.manifest.state, "memory": msgspec.Raw(msgspec.json.encode(foreign))}
    with pytest.raises(RebuildFailed, match="vdso"):
        source.build(msgspec.structs.replace(source.manifest, state=state))


def test_unknown_state_is_refused(source: Source) -> None:
    state = {**source.manifest.state, "quantum": msgspec.Raw(b"{}")}
    with pytest.raises(SnapshotDamaged, match="quantum"):
        source.build(msgspec.structs.replace(source.manifest, state=state))


@pytest.mark.parametrize("full", [True, False], ids=["full", "lazy"])
def test_damaged_page_never_reaches_a_copy(source: Source, full: bool) -> None:
    region = max((r for r in source.manifest.regions if r.slot is not None), key=lambda r: r.size)
    assert region.slot is not None
    first = region.slot // PAGE
    page = next(i for i in range(first, first + region.size // PAGE) if source.spool.sums[i] > 1)
    source.spool.sums[page] ^= 4
    if full:
        with pytest.raises(SnapshotDamaged):
            source.build(full=True)
        return
    try:
        copy = source.build()
    except SnapshotDamaged:
        return  # the background fill was there before the copy's first instruction
    with pytest.raises(SnapshotDamaged):
        copy.wait_filled(20)
    ready, _, _ = select.select([copy.pidfd], [], [], 20)
    assert ready, "the copy is ended rather than shown a damaged page"


def test_death_of_the_builder_ends_what_it_built(source: Source) -> None:
    """SIGKILL to the building process at moments spread over the build: no process of the copy may stay."""
    before = children()
    for delay_ms in (1, 3, 6, 10, 15, 20, 30, 45):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            source.ends.extra[:] = [(Stage.FINISH, Call("wait", NR["nanosleep"], (bytes([60, *bytes(15)]), 0)))]
            try:
                destination.build(source.manifest, source.spool, Options(full=True))
            finally:
                os._exit(1)
        os.close(write)
        ready, _, _ = select.select([read], [], [], delay_ms / 1000)
        assert not ready
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        for orphan in children() - before:  # they come to us, the subreaper
            pidfd = os.pidfd_open(int(orphan))
            ready, _, _ = select.select([pidfd], [], [], 20)
            os.close(pidfd)
            assert ready, f"{delay_ms} ms: {orphan} stays"
            os.waitpid(int(orphan), 0)
    program = source.manifest.process.exe
    running = [p.pid for p in living(psutil.Process().children(recursive=True)) if p.exe() == program]
    running.remove(source.process.pid)
    assert [procfs.read(pid, "status").decode() for pid in running] == []


@pytest.mark.parametrize("victim", ["init", "stub"])
def test_stub_killed_at_any_moment_is_told(source: Source, victim: str) -> None:
    """SIGKILL to what is being built: an error, no hang, nothing left; or it was running already, and then is dead."""
    before = children()
    outcomes = []
    for turn in range(30):
        killer = threading.Thread(target=kill_newcomer, args=(before, victim, turn / 1000))
        killer.start()
        try:
            copy = source.build(full=turn % 2 == 0)
        except RebuildFailed:
            outcomes.append("failed")
        else:
            outcomes.append("ran")
            source.copies.remove(copy)
            copy.kill()
            copy.reap()
            copy.close()
        killer.join()
        assert children() == before
    assert "failed" in outcomes


def kill_newcomer(before: set[str], victim: str, delay_s: float) -> None:
    """Wait for a new child of ours, wait a little more, kill it or the child that it has by then."""
    until = time.monotonic() + 10
    new: set[str] = set()
    while not new and time.monotonic() < until:
        new = children() - before
    select.select([], [], [], delay_s)
    for pid in new:
        with contextlib.suppress(OSError):
            inner = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(int(inner[0]) if victim == "stub" and inner else int(pid), signal.SIGKILL)


def test_refused_time_namespace_is_told(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses offsets that would make a clock negative; the copy then runs by this host's clocks."""
    monkeypatch.setattr(spawning, "_text", lambda offsets: "monotonic -4000000000 0\n")
    notes: list[str] = []
    copy = destination.build(source.manifest, source.spool, Options(), notes.append)
    source.copies.append(copy)
    assert [note for note in notes if "time namespace was refused" in note]
    assert abs(int(source.ask("t")) - time.monotonic_ns()) < 60 * 10**9
    assert source.ask("c").startswith("good")


@pytest.mark.parametrize("soft", [64, 1024])
def test_descriptors_up_to_the_limit_in_any_order(source: Source, soft: int) -> None:
    """Places that are our own descriptors' numbers crosswise, and one just below the limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ends = source.ends
    ends.more = {ends.write: ends.read, ends.read: ends.write, limits[1] - 1: ends.write}
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    try:
        copy = source.build(full=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert source.ask("c").startswith("good")
    numbers = {int(name) for name in os.listdir(f"/proc/{copy.pid}/fd")}
    assert numbers == {0, 1, 2, *ends.more}
    for number, fd in ends.more.items():
        assert os.readlink(f"/proc/{copy.pid}/fd/{number}") == os.readlink(f"/proc/self/fd/{fd}")
    shown = procfs.read(copy.pid, "limits").decode()
    assert re.search(rf"Max open files +{soft} +{limits[1]} ", shown), "the limit is lifted only while it is built"


def test_descriptor_beyond_every_limit_is_told(source: Source) -> None:
    source.ends.more = {(1 << 31) - 2: source.ends.read}
    with pytest.raises(RebuildFailed, match=r"cannot place descriptor 2147483646 .*limit of open files"):
        source.build(full=True)


def test_missing_init_has_a_cure(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spawning.native, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(RebuildFailed, match=r"init program .* is missing.*make build"):
        source.build()


def test_thread_id_taken_inside_the_namespace(source: Source) -> None:
    """Two threads with one id cannot be: found as the kernel refuses, and nothing stays."""
    manifest = source.manifest
    twice = [*manifest.threads, msgspec.structs.replace(manifest.threads[1], comm="twice")]
    with pytest.raises(RebuildFailed, match=rf"thread id {manifest.threads[1].tid} is taken"):
        source.build(msgspec.structs.replace(manifest, threads=twice))
