"""The host's probes and the obstacles of real processes: each kind is provoked, found, and named with a cure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from tuimig.core import check, procfs
from tuimig.core.errors import Obstacle, TargetGone, Unsupported
from tuimig.core.model import Kind, Options, Region
from tuimig.core.rawcall import KCMP_FILES

OPTIONS = Options(stdio="null", tcp="close")


@contextlib.contextmanager
def program(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that has run `code` and then sleeps. Ended with its whole group."""
    text = f"{code}\nimport signal\nprint(flush=True)\nsignal.pause()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", "the program did not start"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def names(pid: int) -> dict[str, Obstacle]:
    return {obstacle.name: obstacle for obstacle in check.check_process(pid, OPTIONS)}


def test_probes_say_what_they_found() -> None:
    probes = {probe.name: probe for probe in check.probe_host()}
    assert probes["architecture"].ok
    assert probes["kcmp"].ok
    assert all(probe.detail for probe in probes.values())
    assert all(probe.cure for probe in probes.values() if not probe.ok)
    if os.geteuid() == 0:
        assert probes["chosen thread ids"].ok, probes["chosen thread ids"].detail


def test_probes_leave_nothing_behind() -> None:
    before, children = set(os.listdir("/proc/self/fd")), set(psutil.Process().children())
    check.probe_host()
    assert set(os.listdir("/proc/self/fd")) == before
    assert set(psutil.Process().children()) <= children


def test_probes_fail_without_privileges(need: Callable[..., None]) -> None:
    need(root=True)
    code = (
        "import os\n"
        "from tuimig.core.host import probe_host\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(*[p.name for p in probe_host() if not p.ok and p.cure], sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"CAP_SYS_PTRACE", "chosen thread ids", "PID namespaces"} <= set(done.stdout.splitlines())


def test_a_plain_process_has_no_obstacle() -> None:
    with program("") as process:
        assert check.check_process(process.pid, OPTIONS) == []


def test_gone() -> None:
    with pytest.raises(TargetGone):
        check.check_process(1 << 22, OPTIONS)


def test_zombie() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert set(names(process.pid)) == {"zombie"}
    process.wait()


def test_kernel_thread() -> None:
    kernel = next((line for line in procfs.processes() if line.kernel), None)
    if kernel is None:
        pytest.skip("no kernel thread is visible here (a PID namespace)")
    assert set(names(kernel.pid)) == {"kernel-thread"}


def test_ourselves() -> None:
    assert set(names(os.getpid())) == {"self"}


def test_traced() -> None:
    code = (
        "import os, ctypes, signal\n"
        "child = os.fork()\n"
        "if child == 0: signal.pause()\n"
        "ctypes.CDLL(None).ptrace(0x4206, child, None, None)\n"
        "os.write(1, str(child).encode() + b' ')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code + "import sys; os.write(1, b'\\n'); signal.pause()"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        found = names(child)
        assert str(process.pid) in found["traced"].why
        assert "children" in names(process.pid)
        assert names(process.pid)["children"].asks
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_somebody_shares_its_memory() -> None:
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "stack = ctypes.create_string_buffer(65536)\n"
        "top = (ctypes.addressof(stack) + 65536) & ~15\n"
        "sleep = ctypes.cast(libc.pause, ctypes.c_void_p)\n"
        "child = libc.clone(sleep, ctypes.c_void_p(top), 0x100 | 17, None)\n"  # CLONE_VM
        "assert child > 0\n"
    )
    with program(code) as process:
        found = names(process.pid)
    assert not found["shared-address-space"].asks


def test_shared_memory_that_others_map() -> None:
    code = (
        "import mmap, os, signal\n"
        "region = mmap.mmap(-1, 8192); region[0] = 1\n"
        "if os.fork() == 0:\n"
        "    while True: signal.pause()\n"
    )
    with program(code) as process:
        found = names(process.pid)
    assert found["shared-memory"].asks
    assert "/dev/zero" in found["shared-memory"].where


def test_sysv_shared_memory() -> None:
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.shmat.restype = ctypes.c_void_p\n"
        "number = libc.shmget(0, 8192, 0o1600)\n"
        "at = libc.shmat(number, None, 0)\n"
        "libc.shmctl(number, 0, None)\n"  # goes with its last user
    )
    with program(code) as process:
        found = names(process.pid)
    assert "SYSV" in found["sysv-shm"].where
    assert not found["sysv-shm"].asks


def test_a_userfaultfd_of_its_own(need: Callable[..., None]) -> None:
    need(root=True)
    code = (
        "import ctypes, fcntl, mmap, struct\n"
        "libc = ctypes.CDLL(None)\n"
        "fd = libc.syscall(323, 0o2004000)\n"
        "fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack('=QQQ', 0xAA, 0, 0)))\n"
        "region = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(region))\n"
        "fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack('=QQQQ', address, 1 << 20, 1, 0)))\n"
    )
    with program(code) as process:
        found = check.check_process(process.pid, OPTIONS)
    whys = [obstacle.why for obstacle in found if obstacle.name == "userfaultfd"]
    assert any("1 of its regions" in why for why in whys)  # the descriptor itself is found as well


def test_an_aio_context() -> None:
    code = (
        "import ctypes\n"
        "context = ctypes.c_ulong(0)\n"
        "assert ctypes.CDLL(None).syscall(206, 8, ctypes.byref(context)) == 0\n"
    )
    with program(code) as process:
        assert not names(process.pid)["aio"].asks


def test_a_numa_policy() -> None:
    if not os.path.exists("/proc/self/numa_maps"):
        pytest.skip("a kernel without NUMA")
    code = (
        "import ctypes, mmap\n"
        "libc = ctypes.CDLL(None)\n"
        "region = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE)\n"
        "address = ctypes.c_ulong(ctypes.addressof(ctypes.c_char.from_buffer(region)))\n"
        "mask = ctypes.c_ulong(1)\n"
        "assert libc.syscall(237, address, ctypes.c_ulong(8192), 2, ctypes.byref(mask), ctypes.c_ulong(64), 0) == 0\n"
    )
    with program(code) as process:
        found = names(process.pid)
    assert found["numa-policy"].asks
    assert "bind" in found["numa-policy"].why


def test_a_chroot(need: Callable[..., None]) -> None:
    need(root=True)
    with program("import os, signal; os.chroot('/proc'); os.chdir('/')") as process:
        assert "chroot" in names(process.pid)


def test_a_network_namespace(need: Callable[..., None]) -> None:
    need(root=True)
    code = (
        "import ctypes, socket\n"
        "assert ctypes.CDLL(None).unshare(0x40000000 | 0x04000000) == 0\n"  # network, host name
        "kept = socket.socket()\n"
    )
    with program(code) as process:
        found = names(process.pid)
    assert not found["network-namespace"].asks
    assert found["uts-namespace"].asks


def test_a_thread_with_descriptors_of_its_own() -> None:
    code = (
        "import ctypes, threading\n"
        "ready = threading.Event()\n"
        "def apart():\n"
        "    assert ctypes.CDLL(None).unshare(0x400) == 0\n"
        "    ready.set(); threading.Event().wait()\n"
        "threading.Thread(target=apart, daemon=True).start(); ready.wait()\n"
    )
    with program(code) as process:
        assert "descriptors" in names(process.pid)["unshared-thread"].why


def test_a_thread_on_its_way_out_has_let_go_of_its_descriptors() -> None:
    """The leader's exit leaves its entry behind, which is what any thread looks like in its last moments."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "print(flush=True); ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with program(code) as process:
        other = next(tid for tid in procfs.read_tids(process.pid) if tid != process.pid)
        while not procfs.thread_exiting(process.pid, process.pid):
            os.sched_yield()
        assert not check._differs(other, process.pid, KCMP_FILES)
        assert not procfs.thread_exiting(process.pid, other)


def test_a_thread_id_that_another_process_has_by_now() -> None:
    with program("") as process, program("") as stranger, procfs.look(process.pid, OPTIONS) as look:
        look.tids = [*look.tids, stranger.pid]
        assert check.check_look(look) == []


@pytest.mark.parametrize(
    ("path", "flags", "kind", "pkey", "name"),
    [
        ("anon_inode:[io_uring]", "", Kind.DEVICE, 0, "io_uring"),
        ("/anon_hugepage (deleted)", "ht", Kind.DEVICE, 0, "hugetlb"),
        ("[uprobes]", "", Kind.DEVICE, 0, "uprobes"),
        ("/dev/dri/card0", "pf io", Kind.DEVICE, 0, "device-memory"),
        ("", "ss", Kind.DEVICE, 0, "shadow-stack"),
        ("", "", Kind.ANON, 3, "protection-key"),
    ],
)
def test_regions_that_cannot_be_had_here(path: str, flags: str, kind: Kind, pkey: int, name: str) -> None:
    region = Region(0x1000, 0x2000, "rw-p", 0, "00:00", 0, path, kind, flags=frozenset(flags.split()), pkey=pkey)
    with program("") as process, procfs.look(process.pid, OPTIONS) as look:
        look.regions = [*look.regions, region]
        found = check.check_look(look)
    assert name in {obstacle.name for obstacle in found}
    assert str(region) in {obstacle.where for obstacle in found}


def test_pinned_memory() -> None:
    with program("") as process, procfs.look(process.pid, OPTIONS) as look:
        look.status = {**look.status, "VmPin": "64 kB"}
        assert "pinned" in {obstacle.name for obstacle in check.check_look(look)}


def test_every_obstacle_has_a_cure() -> None:
    code = "import os, signal, mmap\nif os.fork() == 0: signal.pause()\n"
    with program(code) as process:
        for obstacle in check.check_process(process.pid, OPTIONS):
            assert obstacle.why
            assert obstacle.cure
            assert obstacle.where


def test_refusing() -> None:
    hard = Obstacle("a", "b", "c", "d")
    soft = replace(hard, asks=True)
    check.refuse([], Options(), "x")
    check.refuse([soft], Options(yes=True), "x")
    with pytest.raises(Unsupported, match="--yes") as caught:
        check.refuse([soft], Options(), "x")
    assert caught.value.obstacles == (soft,)
    with pytest.raises(Unsupported, match="cannot be migrated") as caught:
        check.refuse([soft, hard], Options(yes=True), "x")
    assert caught.value.obstacles == (hard,)
    assert caught.value.exit_code == 5
