"""What in a process stands in the way of a migration, found while it runs; and the host's probes (host.py).

Generic obstacles are here; each kind of state in `core/state/` adds its own. Nothing is stopped, nothing is changed.
"""

from __future__ import annotations

import errno
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from tuimig.core import journals, procfs
from tuimig.core.errors import Obstacle, PrivilegeError, TargetGone, Unsupported
from tuimig.core.host import Probe, probe_host
from tuimig.core.model import Kind, Options, Region
from tuimig.core.policy import OWN_USERFAULTFD
from tuimig.core.rawcall import KCMP_FILES, KCMP_FS, KCMP_VM, kcmp
from tuimig.core.state.base import Look

__all__ = ["Probe", "check_look", "check_process", "probe_host", "refuse"]

ELF_CLASS_32: Final = 1
EM_X86_64: Final = 62
SHADOW_STACK: Final = "ss"
VFORK_PATIENCE_S: Final = 5.0  # a busy machine may keep the child waiting


def check_process(pid: int, options: Options) -> list[Obstacle]:
    """All obstacles of a process. Raises TargetGone, PrivilegeError."""
    early = _cannot_be_looked_at(pid)
    if early:
        return early
    with procfs.look(pid, options) as look:
        return check_look(look)


def check_look(look: Look) -> list[Obstacle]:
    """The same for a look that was taken already."""
    from tuimig.core.state import KINDS

    found = [
        *_cannot_be_looked_at(look.pid),
        *_names(look),
        *_moved(look),
        *_tracing(look),
        *_sharing(look),
        *_regions(look),
        *_placement(look),
        *_shared_memory(look),
        *_threads(look),
        *_surroundings(look),
    ]
    for kind in KINDS:
        found += kind.obstacles(look)
    return found


def refuse(obstacles: list[Obstacle], options: Options, subject: str) -> None:
    """Raises Unsupported for obstacles that stand; those that only ask are passed with `--yes`."""
    standing = [obstacle for obstacle in obstacles if not (obstacle.asks and options.yes)]
    if not standing:
        return
    only_ask = all(obstacle.asks for obstacle in standing)
    raise Unsupported(
        "needs your consent" if only_ask else "holds state that cannot be migrated",
        standing,
        subject=subject,
        cure="Accept with --yes" if only_ask else "",
    )


# ---------------------------------------------------------------- what cannot even be looked at


def _cannot_be_looked_at(pid: int) -> list[Obstacle]:
    where = f"process {pid}"
    status = procfs.read_status(pid)
    if status.get("State", "").startswith(("Z", "X")):
        return [Obstacle("zombie", where, "it has ended", "Nothing is left to migrate")]
    if status.get("Kthread") == "1" or "VmSize" not in status:
        return [Obstacle("kernel-thread", where, "it is a part of the kernel", "Choose a user process")]
    if pid == os.getpid():
        return [Obstacle("self", where, "this is tuimig itself", "Choose another process")]
    if int(status.get("Tgid", pid)) != pid:
        return [Obstacle("thread", where, f"this is a thread of {status['Tgid']}", f"Use PID {status['Tgid']}")]
    try:
        with procfs.about(pid), open(f"/proc/{pid}/exe", "rb") as file:
            header = file.read(20)
    except TargetGone:
        return [Obstacle("no-exe", where, "its program file cannot be read", "None: it is ending or a kernel helper")]
    if len(header) == 20 and header[4] == ELF_CLASS_32:
        name = "x32" if int.from_bytes(header[18:20], "little") == EM_X86_64 else "32-bit"
        return [Obstacle(name, where, f"it is a {name} program", "Only 64-bit programs can be migrated")]
    return []


# ---------------------------------------------------------------- the process


def _moved(look: Look) -> Iterator[Obstacle]:
    """Stopped by a move that failed after its hand-over: its copy may have run, or run now."""
    if look.status.get("State", "").startswith("T") and (left := journals.stops(look.pid)) is not None:
        yield Obstacle(
            "move-in-doubt",
            f"journal {left.path}",
            f"a move to {left.destination} has left it stopped, its journal says {left.state}",
            f"What to do: {left.todo}",
            asks=True,
        )


def _tracing(look: Look) -> Iterator[Obstacle]:
    tracer = look.status.get("TracerPid", "0")
    if tracer not in ("0", str(os.getpid())):  # between two attempts it may be ourselves
        cure = "Detach the debugger or strace first"
        yield Obstacle("traced", f"process {look.pid}", f"process {tracer} traces it", cure)
    if look.status.get("x86_Thread_features", "").find("shstk") >= 0:
        yield _shadow_stack(f"process {look.pid}")
    pinned = look.status.get("VmPin", "0 kB").split()[0]
    if pinned != "0":
        yield Obstacle(
            "pinned",
            f"process {look.pid}",
            f"{pinned} kB of its memory are pinned: a device or io_uring writes there without a fault",
            "Close what pins it (io_uring buffers, RDMA, vfio, packet rings)",
        )


def _shadow_stack(where: str) -> Obstacle:
    why = "it runs with a hardware shadow stack"
    return Obstacle("shadow-stack", where, why, "Start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off")


def _sharing(look: Look) -> Iterator[Obstacle]:
    """Processes that share its memory, and children, which would not be copied."""
    for pid in _process_ids() if look.regions else ():  # kernel threads all have the same memory, none
        if pid != look.pid and _shares_for_long(look.pid, pid):
            yield Obstacle(
                "shared-address-space",
                f"process {pid}",
                "it shares the target's whole memory (vfork or CLONE_VM)",
                "Wait until it has called exec, or end it",
            )
    children: list[int] = []
    for tid in look.tids:
        try:
            children += [int(word) for word in procfs.read(look.pid, f"task/{tid}/children").split()]
        except TargetGone:
            continue  # that thread has ended
    if children:
        yield Obstacle(
            "children",
            "processes " + ", ".join(map(str, children)),
            "only the process itself is copied: the copy has no children, and wait() says so there",
            "Accept with --yes, or wait until they have ended",
            asks=True,
        )


def _shares_for_long(left: int, right: int) -> bool:
    """A vfork child shares the memory until it calls exec: the freeze waits for that, so only lasting ones count."""
    until = time.monotonic() + VFORK_PATIENCE_S
    while _same(left, right, KCMP_VM):
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def _process_ids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _same(left: int, right: int, kind: int) -> bool:
    """Whether two tasks share; one that ended, or that we may not see, does not share with one that we may."""
    try:
        return kcmp(left, right, kind) == 0
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EPERM, errno.EACCES):
            return False
        raise


def _threads(look: Look) -> Iterator[Obstacle]:
    for tid in look.tids[1:]:
        for kind, what in ((KCMP_FILES, "descriptors"), (KCMP_FS, "working directory")):
            if _differs(look.pid, tid, kind):
                yield Obstacle(
                    "unshared-thread",
                    f"thread {tid}",
                    f"it has {what} of its own (CLONE_{'FILES' if kind == KCMP_FILES else 'FS'})",
                    "None: threads of a copy share them",
                )


def _differs(pid: int, tid: int, kind: int) -> bool:
    """A thread on its way out has let go of its table already, and its id may be another process's by now."""
    try:
        return kcmp(pid, tid, kind) != 0 and not procfs.thread_exiting(pid, tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        return False


# ---------------------------------------------------------------- its memory


def _names(look: Look) -> Iterator[Obstacle]:
    """A manifest is UTF-8."""
    names = [("thread", look.status.get("Name", "")), ("command line", " ".join(procfs.read_cmdline(look.pid)))]
    names += [(str(region), region.path) for region in look.regions]
    for where, name in names:
        if not name.isascii() and name != name.encode("utf-8", "replace").decode():
            yield Obstacle("name", where, f"its name is not UTF-8: {name[:200]!r}", "Rename that file or thread")


def _regions(look: Look) -> Iterator[Obstacle]:
    own = [region for region in look.regions if region.flags & OWN_USERFAULTFD]
    if own:
        yield Obstacle(
            "userfaultfd",
            str(own[0]),
            f"{len(own)} of its regions are registered with a userfaultfd already",
            "End what uses it: another tuimig session, a garbage collector or a virtual machine monitor",
        )
    for region in look.regions:
        if SHADOW_STACK in region.flags:
            yield _shadow_stack(str(region))
        elif region.kind is Kind.DEVICE:
            yield _device(region)
        elif region.pkey:
            why = f"it carries memory protection key {region.pkey}"
            yield Obstacle("protection-key", str(region), why, "None yet: keys are not restored")


def _device(region: Region) -> Obstacle:
    path, where = region.path, str(region)
    if path.startswith("/[aio]"):
        why = "it has an AIO context, which the kernel writes to on its own"
        return Obstacle("aio", where, why, "Let it end its AIO context (io_destroy), or switch libaio off in it")
    if "io_uring" in path:
        why = "an io_uring ring, which the kernel writes to on its own"
        return Obstacle("io_uring", where, why, "Switch io_uring off in the program")
    if path.startswith("/SYSV"):
        return Obstacle("sysv-shm", where, "System V shared memory", "None yet: use a program mode without it")
    if "ht" in region.flags or path.startswith("/anon_hugepage"):
        return Obstacle("hugetlb", where, "memory from hugetlbfs", "Run it with transparent huge pages instead")
    if path == "[uprobes]":
        return Obstacle(
            "uprobes", where, "a tracer has put probes into its code", "Remove the uprobes (perf, bpftrace)"
        )
    return Obstacle("device-memory", where, "memory of a device or special file", "Let the program unmap it first")


def _placement(look: Look) -> Iterator[Obstacle]:
    """NUMA policies (of a region, or of the thread that stands behind it) are not in the snapshot."""
    try:
        lines = procfs.read(look.pid, "numa_maps").splitlines()
    except TargetGone:
        return  # a kernel without NUMA has no such file; whether the process is there, others have asked
    special = [line.decode("utf-8", "replace") for line in lines if line.split()[1:2] != [b"default"]]
    if special:
        yield Obstacle(
            "numa-policy",
            f"region at {special[0].split()[0]}",
            f"{len(special)} regions have a NUMA policy ({special[0].split()[1]}); the copy has the default one",
            "Accept with --yes, and set it anew (migratepages)",
            asks=True,
        )


def _shared_memory(look: Look) -> Iterator[Obstacle]:
    """Shared memory without a file that others map too: what they write during the copying cannot be vouched for."""
    mine = {(r.dev, r.inode): r for r in look.regions if r.kind is Kind.SHARED_ANON and r.inode}
    if not mine:
        return
    others: dict[tuple[str, int], set[int]] = defaultdict(set)
    for pid in _process_ids():
        if pid == look.pid:
            continue
        try:
            text = procfs.read(pid, "maps")
        except (TargetGone, PrivilegeError):
            continue
        for line in text.splitlines():
            words = line.split(None, 5)
            key = (words[3].decode("ascii"), int(words[4]))
            if key in mine:
                others[key].add(pid)
    for key, pids in others.items():
        yield Obstacle(
            "shared-memory",
            str(mine[key]),
            f"process {', '.join(map(str, sorted(pids)))} maps it too and may write while it is copied; "
            "the copy gets memory of its own",
            "Accept with --yes if nobody writes there now",
            asks=True,
        )


# ---------------------------------------------------------------- its surroundings


def _surroundings(look: Look) -> Iterator[Obstacle]:
    where = f"process {look.pid}"
    with procfs.about(look.pid):
        root = os.readlink(f"/proc/{look.pid}/root")
    if root != "/":
        yield Obstacle("chroot", where, f"its root directory is {root}", "None yet: run tuimig inside that root")
    differs = {name for name in ("user", "net", "mnt", "ipc", "uts") if _namespace(look.pid, name)}
    if "user" in differs:
        why = "it lives in another user namespace, where user ids mean something else"
        yield Obstacle("user-namespace", where, why, "Run tuimig inside that namespace (nsenter -U)")
    sockets = [d.number for d in look.descriptors.values() if d.link.startswith("socket:")]
    if "net" in differs and sockets:
        yield Obstacle(
            "network-namespace",
            f"descriptor {sockets[0]}",
            f"it has {len(sockets)} sockets in another network namespace",
            f"Run tuimig there: nsenter -t {look.pid} -n tuimig ...",
        )
    meaning = {"mnt": "paths mean ours in the copy", "ipc": "System V and POSIX queues are ours in the copy"}
    for name, option in (("mnt", "--mount"), ("ipc", "--ipc"), ("uts", "--uts")):
        if name in differs:
            yield Obstacle(
                f"{name}-namespace",
                where,
                f"it lives in another {name} namespace; {meaning.get(name, 'the copy sees our host name')}",
                f"Run tuimig there (nsenter -t {look.pid} {option}), or accept with --yes",
                asks=True,
            )


def _namespace(pid: int, name: str) -> bool:
    """Whether the process is in another namespace of this kind than we are."""
    with procfs.about(pid):
        theirs = os.stat(f"/proc/{pid}/ns/{name}")
    ours = os.stat(f"/proc/self/ns/{name}")
    return (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino)
