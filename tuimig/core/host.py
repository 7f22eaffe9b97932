"""Can this host do it: one probe a line, each tries the feature itself, never a version, and says the cure.

The probes leave nothing behind. Ptrace is tried on a child of ours, clone3's privileges with a thread id that is taken,
so that the kernel answers EEXIST instead of making a process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import ioctl
from typing import Final

from tuimig.core.model import PAGE
from tuimig.core.rawcall import KCMP_VM, call, kcmp, pidfd_getfd

UFFD_API: Final = 0xAA
UFFDIO_API: Final = 0xC018AA3F
USERFAULTFD_IOC_NEW: Final = 0xAA00
PAGEMAP_SCAN: Final = 0xC0606610
PAGE_IS_PRESENT: Final = 1 << 3
FEATURES: Final = {
    "PAGEFAULT_FLAG_WP": 0,
    "EVENT_FORK": 1,
    "EVENT_REMAP": 2,
    "EVENT_REMOVE": 3,
    "EVENT_UNMAP": 6,
    "THREAD_ID": 8,
    "EXACT_ADDRESS": 11,
    "WP_UNPOPULATED": 13,
    "POISON": 14,
}
PTRACE_DETACH: Final = 17
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_GET_RSEQ_CONFIGURATION: Final = 0x420F
PTRACE_O_TRACESYSGOOD: Final = 1
PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21
CLONE_NEWTIME: Final = 0x80
CLONE_NEWPID: Final = 0x20000000
CAP_SYS_PTRACE: Final = 19
CAP_SYS_ADMIN: Final = 21
CONTAINER_CURE: Final = "In a container, grant it (and let its seccomp profile allow the call)"


@dataclass(frozen=True, slots=True)
class Probe:
    """One line of `tuimig check`. `required`: without it nothing works; else `needed_for` says what is lost."""

    name: str
    ok: bool
    needed_for: str
    detail: str
    cure: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class _Trial:
    """A probe to run. `run` gives the detail, or raises OSError."""

    name: str
    run: Callable[[], str]
    needed_for: str
    cure: str
    required: bool = True


def probe_host() -> list[Probe]:
    return [_tried(trial) for trial in _trials()]


def _tried(trial: _Trial) -> Probe:
    try:
        detail = trial.run()
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        reason = f"{what}{error.strerror} (errno {error.errno})" if error.errno else str(error)
        return Probe(trial.name, False, trial.needed_for, reason, trial.cure, trial.required)
    return Probe(trial.name, True, trial.needed_for, detail, "", trial.required)


def _trials() -> list[_Trial]:
    capabilities = _effective_capabilities()
    return [
        _Trial("architecture", _architecture, "everything", "Run on x86-64 with 4 KiB pages"),
        _Trial(
            "userfaultfd",
            _userfaultfd,
            "protecting and filling memory",
            "A kernel with CONFIG_USERFAULTFD, and CAP_SYS_PTRACE or sysctl vm.unprivileged_userfaultfd=1",
        ),
        _Trial(
            "/dev/userfaultfd",
            _userfaultfd_device,
            "targets of other users, which may not call userfaultfd() themselves",
            "Run as root, or give yourself access to /dev/userfaultfd",
            required=False,
        ),
        _Trial("PAGEMAP_SCAN", _pagemap_scan, "proof that no page was lost", "A kernel with PAGEMAP_SCAN (6.7)"),
        _Trial("ptrace", _ptrace, "stopping the process", "CAP_SYS_PTRACE. " + CONTAINER_CURE),
        _Trial(
            "CAP_SYS_PTRACE",
            lambda: _capability(capabilities, CAP_SYS_PTRACE),
            "processes of other users; following fork in a copy that is still being filled",
            "Run as root. " + CONTAINER_CURE,
        ),
        _Trial(
            "yama",
            lambda: _yama(capabilities),
            "processes that are not our children",
            "sysctl kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE",
        ),
        _Trial(
            "seccomp suspend",
            _seccomp_suspend,
            "targets under a seccomp filter",
            "CAP_SYS_ADMIN, and no seccomp filter on tuimig itself",
            required=False,
        ),
        _Trial(
            "rseq configuration",
            _rseq,
            "threads that use restartable sequences (glibc 2.35 and later)",
            "A kernel with PTRACE_GET_RSEQ_CONFIGURATION (5.13)",
        ),
        _Trial("pidfd_getfd", _pidfd_getfd, "taking open files", "A kernel with pidfd_getfd (5.6). " + CONTAINER_CURE),
        _Trial("kcmp", _kcmp, "finding shared open files and memory", "A kernel with CONFIG_KCMP. " + CONTAINER_CURE),
        _Trial("process_vm_readv", _process_vm_readv, "the sweep", "A kernel with CONFIG_CROSS_MEMORY_ATTACH"),
        _Trial("memfd", _memfd, "a local copy", "A kernel with memfd_create"),
        _Trial(
            "chosen thread ids",
            lambda: _clone3(0, [os.getpid()]),
            "restore: threads keep their ids",
            "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN. " + CONTAINER_CURE,
        ),
        _Trial(
            "PID namespaces",
            lambda: _clone3(CLONE_NEWPID, [1, os.getpid()]),
            "a copy beside its source",
            "CAP_SYS_ADMIN, and a kernel with CONFIG_PID_NS",
        ),
        _Trial(
            "time namespaces",
            lambda: _clone3(CLONE_NEWTIME, [os.getpid()]),
            "a copy whose monotonic clock goes on from T0",
            "CAP_SYS_ADMIN, and a kernel with CONFIG_TIME_NS",
        ),
    ]


# ---------------------------------------------------------------- the single probes


def _architecture() -> str:
    machine, page = platform.machine(), os.sysconf("SC_PAGE_SIZE")
    if machine != "x86_64" or page != PAGE:
        raise OSError(f"{machine} with pages of {page} bytes")
    return f"{machine}, {page} bytes a page"


def _api(fd: int) -> str:
    answer = bytearray(struct.pack("=QQQ", UFFD_API, 0, 0))
    ioctl(fd, UFFDIO_API, answer)
    features = struct.unpack("=QQQ", answer)[1]
    missing = [name for name, bit in FEATURES.items() if not features >> bit & 1]
    if missing:
        raise OSError(f"the kernel lacks {', '.join(missing)}")
    return f"all features that are needed (0x{features:x})"


def _userfaultfd() -> str:
    fd = call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _api(fd)
    finally:
        os.close(fd)


def _userfaultfd_device() -> str:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        fd = ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return _api(fd)
        finally:
            os.close(fd)
    finally:
        os.close(device)


def _pagemap_scan() -> str:
    page = ctypes.create_string_buffer(2 * PAGE)
    start = ctypes.addressof(page) & ~(PAGE - 1)
    found = (ctypes.c_uint64 * 3)()
    fields = (96, 0, start, start + PAGE, 0, ctypes.addressof(found), 1, 0, 0, PAGE_IS_PRESENT, 0, PAGE_IS_PRESENT)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = ioctl(fd, PAGEMAP_SCAN, bytearray(struct.pack("=12Q", *fields)))
    finally:
        os.close(fd)
    if count != 1:
        raise OSError(f"a page that is there was not found ({count} ranges)")
    return "finds a page that is there"


@contextmanager
def _child() -> Iterator[int]:
    """A process of ours that waits, ended afterwards. It ends with us too, at whatever moment a signal ends us."""
    reader, writer = os.pipe()
    actions = [
        (os.POSIX_SPAWN_DUP2, reader, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),  # who waits for the end of our output does not wait for it
    ]
    try:
        pid = os.posix_spawnp("cat", ["cat"], {"PATH": os.defpath}, file_actions=actions)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            while not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
                pass  # a ptrace stop that was on its way
    finally:
        os.close(reader)
        os.close(writer)


def _ptrace() -> str:
    with _child() as pid:
        call("ptrace", PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD)
        call("ptrace", PTRACE_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, 0)
        call("ptrace", PTRACE_DETACH, pid, 0, 0)
    return "seizes, stops and lets go"


def _seccomp_suspend() -> str:
    with _child() as pid:
        call("ptrace", PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP)
    return "filters can be suspended for an injected call"


def _rseq() -> str:
    answer = ctypes.create_string_buffer(24)
    with _child() as pid:
        call("ptrace", PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD)
        call("ptrace", PTRACE_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, 0)
        call("ptrace", PTRACE_GET_RSEQ_CONFIGURATION, pid, len(answer), ctypes.addressof(answer))
    return "readable"


def _effective_capabilities() -> int:
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:"))


def _capability(held: int, number: int) -> str:
    if not held >> number & 1:
        raise OSError("not held")
    return "held"


def _yama(capabilities: int) -> str:
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", "rb") as file:
            scope = int(file.read())
    except FileNotFoundError:
        return "not in this kernel"
    if scope == 3 or (scope > 0 and not capabilities >> CAP_SYS_PTRACE & 1):
        raise OSError(f"ptrace_scope is {scope}")
    return f"ptrace_scope is {scope}"


def _pidfd_getfd() -> str:
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(pidfd_getfd(pidfd, pidfd))
    finally:
        os.close(pidfd)
    return "works"


def _kcmp() -> str:
    if kcmp(os.getpid(), os.getpid(), KCMP_VM) != 0:
        raise OSError("finds a process different from itself")
    return "works"


def _process_vm_readv() -> str:
    source, target = ctypes.create_string_buffer(b"tuimig", 6), ctypes.create_string_buffer(6)
    remote = (ctypes.c_uint64 * 2)(ctypes.addressof(source), 6)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(target), 6)
    read = call("process_vm_readv", os.getpid(), ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if read != 6 or target.raw != b"tuimig":
        raise OSError(f"{read} bytes of 6 were read")
    return "works"


def _memfd() -> str:
    os.close(os.memfd_create("tuimig-check", os.MFD_CLOEXEC))
    return "works"


def _clone3(flags: int, set_tid: list[int]) -> str:
    """Asks for a child under an id that is taken: EEXIST means that all privileges were there."""
    ids = (ctypes.c_int32 * len(set_tid))(*set_tid)
    args = struct.pack("=11Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(ids), len(set_tid), 0)
    buffer = ctypes.create_string_buffer(args, len(args))
    try:
        child = call("clone3", ctypes.addressof(buffer), len(args))
    except OSError as error:
        if error.errno == errno.EEXIST:
            return "allowed"
        raise
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    raise OSError(f"the kernel gave out an id that was taken ({child})")
