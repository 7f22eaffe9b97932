"""Who each thread is: user and group ids, supplementary groups, the five capability sets, securebits, no_new_privs.

Kernel credentials belong to threads. The copy starts with ours; each thread is brought to its own last of all, for no
privilege is left after it. What is equal already is not set, so that anyone can restore processes of their own.
"""

from __future__ import annotations

import os
import struct
from typing import Annotated, ClassVar, Final

import msgspec

from tuimig.core import rawcall
from tuimig.core.errors import EngineError, Obstacle
from tuimig.core.manifest import Strict
from tuimig.core.state import status
from tuimig.core.state.base import Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.state.untrusted import U32, U63, of_thread
from tuimig.core.syscalls import NR

PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_SECUREBITS: Final = 28
PR_GET_SECUREBITS: Final = 27
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
MOST_GROUPS: Final = 700  # what an injected call's data holds
DUMPABLE_ROOT_ONLY: Final = 2
_BITS: Final = "credentials.securebits"
_DUMPABLE: Final = "credentials.dumpable"
CAP_SETPCAP: Final = 1 << 8
_CAPABILITY_HEADER: Final = struct.pack("<Ii", 0x20080522, 0)  # version 3, this thread
# fmt: off
_CAPABILITIES: Final = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)
# fmt: on


class Credentials(Strict, frozen=True):
    """`uids`, `gids`: real, effective, saved, file system. Capability sets are masks by capability number."""

    uids: tuple[U32, U32, U32, U32]
    gids: tuple[U32, U32, U32, U32]
    groups: Annotated[list[U32], msgspec.Meta(max_length=MOST_GROUPS)]
    inheritable: U63
    permitted: U63
    effective: U63
    bounding: U63
    ambient: U63
    securebits: U32
    no_new_privs: bool


class CredentialState(Strict, frozen=True):
    """Distinct credentials, and which of them each thread (host id) has.

    `label`: that of the security module. `dumpable`: of the process; a change of credentials clears it.
    """

    kinds: list[Credentials]
    threads: dict[int, int]
    label: str
    dumpable: Annotated[int, msgspec.Meta(ge=0, le=2)]


class Kind:
    name: ClassVar[str] = "credentials"
    Section: ClassVar[type[msgspec.Struct]] = CredentialState

    def obstacles(self, look: Look) -> list[Obstacle]:
        count = len(look.status.get("Groups", "").split())
        if count <= MOST_GROUPS:
            return []
        why = f"it is in {count} supplementary groups, more than {MOST_GROUPS}"
        return [Obstacle("groups", f"process {look.pid}", why, "Start it with fewer groups (setpriv --groups)")]

    def probes(self, look: Look) -> list[Probe]:
        """No file shows securebits. Every thread is asked for them only where threads differ: it costs a call each."""
        seen = [from_status(fields) for tid in look.tids if (fields := status.now(look, tid))]
        kind = ProbeKind.CALL if seen[1:] == seen[:-1] else ProbeKind.CALL_EACH
        bits = Probe(_BITS, kind, NR["prctl"], (PR_GET_SECUREBITS,))
        dumpable = Probe(_DUMPABLE, ProbeKind.CALL, NR["prctl"], (PR_GET_DUMPABLE,))
        return [bits, dumpable, *status.probes(look)]

    def dump(self, frozen: Frozen) -> CredentialState:
        kinds: list[Credentials] = []
        threads = {}
        for tid, found in status.each(frozen, "credentials", from_status).items():
            bits = (frozen.each[_BITS][tid] if _BITS in frozen.each else frozen.calls[_BITS]).ret
            if bits < 0:
                raise EngineError(f"the securebits of thread {tid} could not be read", syscall="prctl", errno=-bits)
            own = msgspec.structs.replace(found, securebits=bits)
            if own not in kinds:
                kinds.append(own)
            threads[tid] = kinds.index(own)
        return CredentialState(kinds, threads, _label(frozen.look.pid), frozen.calls[_DUMPABLE].ret)

    def rebuild(self, section: CredentialState, build: Build) -> None:
        ours = own_credentials()
        warned: set[str] = set()
        for thread in build.manifest.threads:
            wanted = of_thread(section.kinds, section.threads, thread.host_tid)
            for call in change(ours, wanted, thread.tid, warned):
                build.call(Stage.CREDENTIALS, call, thread.tid)
        build.warnings.extend(sorted(warned))
        if section.dumpable == DUMPABLE_ROOT_ONLY:
            build.warnings.append("the source could be dumped by root only; the copy is as fs.suid_dumpable says")
        else:
            dumpable = (PR_SET_DUMPABLE, section.dumpable, 0, 0, 0)
            build.call(Stage.CREDENTIALS, Call("set whether it may be dumped", NR["prctl"], dumpable))
        label = _label(os.getpid())
        if section.label != label:
            build.warnings.append(f"the copy has the security label {label!r}; the source had {section.label!r}")


def from_status(fields: dict[str, str]) -> Credentials:
    """From /proc/PID/task/TID/status, which does not show securebits."""
    return Credentials(
        uids=_four(fields["Uid"]),
        gids=_four(fields["Gid"]),
        groups=sorted(int(word) for word in fields["Groups"].split()),
        inheritable=int(fields["CapInh"], 16),
        permitted=int(fields["CapPrm"], 16),
        effective=int(fields["CapEff"], 16),
        bounding=int(fields["CapBnd"], 16),
        ambient=int(fields.get("CapAmb", "0"), 16),
        securebits=0,
        no_new_privs=fields.get("NoNewPrivs", "0") == "1",
    )


def own_credentials() -> Credentials:
    """What the copy starts with: those of the calling thread."""
    with open("/proc/thread-self/status", "rb") as file:
        found = from_status(status.parse(file.read()))
    return msgspec.structs.replace(found, securebits=_own_securebits())


def change(ours: Credentials, wanted: Credentials, tid: int, warned: set[str]) -> list[Call]:
    """The calls that bring a thread from one to the other, in the one order in which each is still allowed.

    Capabilities that we lack cannot be given: they are left out, and said in `warned`.
    """
    if ours == wanted:
        return []
    permitted = wanted.permitted & ours.permitted
    effective = wanted.effective & permitted
    may_inherit = ours.bounding if ours.effective & CAP_SETPCAP else ours.bounding & ours.permitted
    inheritable = wanted.inheritable & (ours.inheritable | may_inherit)
    ambient = wanted.ambient & permitted & inheritable
    for what, lost in (
        ("", (wanted.permitted & ~permitted) | (wanted.effective & ~effective)),
        (" in its inheritable set", wanted.inheritable & ~inheritable),
        (" in its ambient set", wanted.ambient & ~ambient),
        (" in its bounding set", wanted.bounding & ~ours.bounding),
    ):
        if lost:
            warned.add(f"the copy lacks {names(lost)}{what}: we have not got it to give")
    calls = _Calls(tid)
    if inheritable != ours.inheritable:  # while the bounding set still allows it
        calls.capset(ours.effective, ours.permitted, inheritable)
    ids_change = (ours.uids, ours.gids, ours.groups) != (wanted.uids, wanted.gids, wanted.groups)
    keeping = ours.securebits
    if ids_change and ours.permitted:  # else a change of user ids would take the capabilities that are still needed
        keeping |= SECBIT_NO_SETUID_FIXUP
        if keeping != ours.securebits:
            calls.prctl("keep capabilities over the change of ids", PR_SET_SECUREBITS, keeping)
    for number in _bits(ours.bounding & ~wanted.bounding):
        calls.prctl(f"drop {names(1 << number)} from the bounding set", PR_CAPBSET_DROP, number)
    if ids_change:
        calls.ids(ours, wanted)
    if ours.ambient or ambient:
        calls.prctl("clear the ambient capabilities", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        for number in _bits(ambient):
            calls.prctl(f"raise ambient {names(1 << number)}", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
    if keeping != wanted.securebits:
        calls.prctl("set the securebits", PR_SET_SECUREBITS, wanted.securebits)
    if wanted.no_new_privs and not ours.no_new_privs:
        calls.prctl("set no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    if ours.no_new_privs and not wanted.no_new_privs:
        warned.add("the copy has no_new_privs set, as tuimig has; it cannot be cleared")
    if (permitted, effective) != (ours.permitted, ours.effective):
        calls.capset(effective, permitted, inheritable)
    return calls.made


class _Calls:
    """Calls of one thread, with its id in what they say."""

    def __init__(self, tid: int) -> None:
        self.made: list[Call] = []
        self._tid = tid

    def add(self, what: str, name: str, *args: int | bytes) -> None:
        self.made.append(Call(f"{what} of thread {self._tid}", NR[name], args))

    def prctl(self, what: str, *args: int) -> None:
        self.add(what, "prctl", *args, *[0] * (5 - len(args)))

    def capset(self, effective: int, permitted: int, inheritable: int) -> None:
        halves = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in (effective, permitted, inheritable)]
        self.add("set the capabilities", "capset", _CAPABILITY_HEADER, struct.pack("<6I", *halves))

    def ids(self, ours: Credentials, wanted: Credentials) -> None:
        """Groups before users. The file system ids follow the effective ones, so they come after them."""
        if ours.groups != wanted.groups:
            groups = struct.pack(f"<{len(wanted.groups)}I", *wanted.groups)
            self.add("set the supplementary groups", "setgroups", len(wanted.groups), groups or 0)
        for what, change_all, change_fs, before, after in (
            ("group", "setresgid", "setfsgid", ours.gids, wanted.gids),
            ("user", "setresuid", "setfsuid", ours.uids, wanted.uids),
        ):
            if before != after:
                self.add(f"set the {what} ids", change_all, *after[:3])
                if after[3] != after[1]:
                    self.add(f"set the file system {what} id", change_fs, after[3])


def names(mask: int) -> str:
    """Capabilities as people write them."""
    return ", ".join(
        f"CAP_{_CAPABILITIES[n].upper()}" if n < len(_CAPABILITIES) else f"capability {n}" for n in _bits(mask)
    )


def _bits(mask: int) -> list[int]:
    return [n for n in range(64) if mask >> n & 1]


def _four(text: str) -> tuple[int, int, int, int]:
    real, effective, saved, file_system = (int(word) for word in text.split())
    return real, effective, saved, file_system


def _own_securebits() -> int:
    return rawcall.call("prctl", PR_GET_SECUREBITS, 0, 0, 0, 0)


def _label(pid: int) -> str:
    """The security module's word on a process; empty where there is none, or it does not tell."""
    try:
        with open(f"/proc/{pid}/attr/current", "rb") as file:
            return file.read().rstrip(b"\0\n").decode("utf-8", "replace")
    except OSError:
        return ""


KIND = Kind()
