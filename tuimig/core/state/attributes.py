"""What belongs to the process as a whole: working directory, umask, limits, personality, and the settings of prctl.

Read inside the freeze by calls and from /proc. Limits and the personality come late in the rebuild, since they would
bind the rebuild itself. The copy leads a session of its own: a terminal's signals for us must not reach it.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Final

import msgspec

from tuimig.core import procfs
from tuimig.core.errors import EngineError, Obstacle, Unsupported
from tuimig.core.manifest import Strict
from tuimig.core.state import status
from tuimig.core.state.base import OUT, Answer, Build, Call, Frozen, Look, Probe, ProbeKind, Stage
from tuimig.core.state.untrusted import U32, U64, words
from tuimig.core.syscalls import NR

PR_GET_PDEATHSIG: Final = 2
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_THP_DISABLE: Final = 41
PR_GET_THP_DISABLE: Final = 42
PR_SET_MEMORY_MERGE: Final = 67
PR_GET_MEMORY_MERGE: Final = 68
PATH_ROOM: Final = 1024  # bytes that a call made in the target can bring back
CAP_SYS_RESOURCE: Final = 1 << 24
# The names of /proc/PID/limits by resource number.
_LIMITS: Final = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max resident set": resource.RLIMIT_RSS,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max file locks": 10,
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}
INFINITY: Final = (1 << 64) - 1
# Asked by calls made in the leader: key, number, arguments, bytes wanted.
_ASKED: Final[tuple[tuple[str, str, tuple[int, ...], int], ...]] = (
    ("cwd", "getcwd", (OUT, PATH_ROOM), PATH_ROOM),
    ("pdeathsig", "prctl", (PR_GET_PDEATHSIG, OUT), 4),
    ("subreaper", "prctl", (PR_GET_CHILD_SUBREAPER, OUT), 4),
    ("thp_disable", "prctl", (PR_GET_THP_DISABLE,), 0),
    ("memory_merge", "prctl", (PR_GET_MEMORY_MERGE,), 0),
)
_FILES: Final = ("limits", "oom_score_adj", "coredump_filter", "personality")
_CGROUP: Final = "attributes.cgroup"  # a note: it is only shown, so it need not be of T0


class Limit(Strict, frozen=True):
    """`2**64 - 1` is no limit."""

    number: Annotated[int, msgspec.Meta(ge=0, le=15)]
    soft: U64
    hard: U64

    def __post_init__(self) -> None:
        words(self.soft, self.hard)


class AttributeState(Strict, frozen=True):
    """`cgroup`: its path in each hierarchy, as /proc shows it; the copy lives in ours."""

    cwd: Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$", max_length=PATH_ROOM)]
    umask: Annotated[int, msgspec.Meta(ge=0, le=0o777)]
    limits: list[Limit]
    personality: U32
    pdeathsig: Annotated[int, msgspec.Meta(ge=0, le=64)]
    subreaper: bool
    thp_disable: U32
    memory_merge: bool
    oom_score_adj: Annotated[int, msgspec.Meta(ge=-1000, le=1000)]
    coredump_filter: U32
    cgroup: str


class Attributes:
    name: ClassVar[str] = "attributes"
    Section: ClassVar[type[msgspec.Struct]] = AttributeState

    def obstacles(self, look: Look) -> list[Obstacle]:
        with procfs.about(look.pid, "readlink"):
            path = os.readlink(f"/proc/{look.pid}/cwd")
            theirs = os.stat(f"/proc/{look.pid}/cwd")
        try:
            same = os.path.samestat(os.stat(path), theirs)
        except OSError:  # nothing there, or nothing that we may see
            same = False
        if not same:
            return [_no_directory(look.pid, path)]
        if len(os.fsencode(path)) >= PATH_ROOM:
            cure = "Let it change to a shorter one"
            return [Obstacle("cwd", f"process {look.pid}", f"its working directory has {len(path)} letters", cure)]
        return []

    def probes(self, look: Look) -> list[Probe]:
        look.notes[_CGROUP] = procfs.read(look.pid, "cgroup").decode("utf-8", "replace")
        calls = [Probe(f"attributes.{key}", ProbeKind.CALL, NR[nr], args, out=out) for key, nr, args, out in _ASKED]
        files = [Probe(f"attributes.{name}", ProbeKind.FILE, path=f"/proc/{look.pid}/{name}") for name in _FILES]
        return calls + files

    def dump(self, frozen: Frozen) -> AttributeState:
        def ask(key: str) -> Answer:
            answer = frozen.calls[f"attributes.{key}"]
            if answer.ret < 0:
                raise EngineError(f"its {key} could not be read", subject=_subject(frozen), errno=-answer.ret)
            return answer

        merge = frozen.calls["attributes.memory_merge"].ret  # EINVAL before Linux 6.4, or without KSM
        return AttributeState(
            cwd=_cwd(frozen),
            umask=int(status.of_leader(frozen)["Umask"], 8),
            limits=parse_limits(ask("limits").data),
            personality=int(ask("personality").data, 16),
            pdeathsig=_integer(ask("pdeathsig")),
            subreaper=_integer(ask("subreaper")) != 0,
            thp_disable=ask("thp_disable").ret,
            memory_merge=merge > 0,
            oom_score_adj=int(ask("oom_score_adj").data),
            coredump_filter=int(ask("coredump_filter").data or b"0", 16),
            cgroup=frozen.look.notes[_CGROUP],
        )

    def rebuild(self, section: AttributeState, build: Build) -> None:
        def setup(what: str, name: str, *args: int | bytes, allow: tuple[int, ...] = ()) -> None:
            build.call(Stage.SETUP, Call(what, NR[name], args, allow))

        def finish(what: str, name: str, *args: int | bytes) -> None:
            build.call(Stage.FINISH, Call(what, NR[name], args))

        setup("lead a session of its own", "setsid", allow=(errno.EPERM,))  # it does already
        setup(f"change to the working directory {section.cwd}", "chdir", os.fsencode(section.cwd) + b"\0")
        setup("set the umask", "umask", section.umask)
        if section.thp_disable:
            setup("disable huge pages", "prctl", PR_SET_THP_DISABLE, 1, section.thp_disable & ~1, 0, 0)
        if section.subreaper:
            finish("make it a subreaper", "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if section.memory_merge:
            _merge_memory(build)
        finish("set the personality", "personality", section.personality)
        for call in _limit_calls(section.limits, build.warnings):
            build.call(Stage.FINISH, call)
        _outside(section, build)
        if section.pdeathsig:
            build.warnings.append(
                f"the source gets signal {section.pdeathsig} when its parent ends; the copy does not: it has another"
            )


# ---------------------------------------------------------------- T0


def parse_limits(data: bytes) -> list[Limit]:
    """The rows of /proc/PID/limits."""
    found = []
    for line in data.decode("ascii").splitlines()[1:]:
        name, soft, hard = line[:26].strip(), *line[26:].split()[:2]
        if name not in _LIMITS:
            raise EngineError(f"/proc/PID/limits has an unknown row {name!r}")
        found.append(Limit(_LIMITS[name], _value(soft), _value(hard)))
    return sorted(found, key=lambda limit: limit.number)


def _value(text: str) -> int:
    return INFINITY if text == "unlimited" else int(text)


def _integer(answer: Answer) -> int:
    return int.from_bytes(answer.data[:4], "little", signed=True)


def _cwd(frozen: Frozen) -> str:
    answer = frozen.calls["attributes.cwd"]
    path = answer.data[: max(answer.ret - 1, 0)]
    if not path.startswith(b"/"):
        raise Unsupported(
            "its working directory changed before the freeze, to one that cannot be named",
            [_no_directory(frozen.look.pid, os.fsdecode(path))],
        )
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        raise Unsupported(
            "its working directory has a name that is not UTF-8", [_no_directory(frozen.look.pid, repr(path))]
        ) from None


def _no_directory(pid: int, path: str) -> Obstacle:
    why = f"its working directory is not to be found under its name, {path}"
    return Obstacle("cwd", f"process {pid}", why, "Let it change to a directory that exists")


def _subject(frozen: Frozen) -> str:
    return f"process {frozen.look.pid}"


# ---------------------------------------------------------------- the copy


def _limit_calls(limits: list[Limit], warnings: list[str]) -> list[Call]:
    """Where a hard limit cannot be raised, as much of it as can be had."""
    calls = []
    may_raise = _may(CAP_SYS_RESOURCE)
    names = {number: name for name, number in _LIMITS.items()}
    for limit in limits:
        soft, hard = limit.soft, limit.hard
        ours = resource.getrlimit(limit.number)[1] & INFINITY
        if hard > ours and not may_raise:
            warnings.append(
                f"the copy's hard limit `{names[limit.number]}` is {ours}, not {_text(hard)}: "
                "raising it takes CAP_SYS_RESOURCE"
            )
            hard = ours
            soft = min(soft, hard)
        image = soft.to_bytes(8, "little") + hard.to_bytes(8, "little")
        calls.append(Call(f"set the limit `{names[limit.number]}`", NR["prlimit64"], (0, limit.number, image, 0)))
    return calls


def _text(limit: int) -> str:
    return "unlimited" if limit == INFINITY else str(limit)


def _merge_memory(build: Build) -> None:
    if not _may(CAP_SYS_RESOURCE):
        build.warnings.append("the copy's memory is not merged (KSM) as the source's is: it takes CAP_SYS_RESOURCE")
        return
    arguments = (PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
    build.call(Stage.FINISH, Call("let its memory be merged", NR["prctl"], arguments))


def _may(capability: int) -> bool:
    with open("/proc/thread-self/status", "rb") as file:
        return bool(int(status.parse(file.read())["CapEff"], 16) & capability)


def _outside(section: AttributeState, build: Build) -> None:
    """What only a file of /proc sets, and what can only be said."""
    pid = build.manifest.process.pid

    def writer(name: str, value: str) -> Callable[[Mapping[int, int]], None]:
        def write(tids: Mapping[int, int]) -> None:
            with open(f"/proc/{tids[pid]}/{name}", "w", encoding="ascii") as file:
                file.write(value)

        return write

    if section.oom_score_adj < _own_oom_score() and not _may(CAP_SYS_RESOURCE):
        build.warnings.append(
            f"the copy's oom_score_adj is {_own_oom_score()}, not {section.oom_score_adj}: "
            "lowering it takes CAP_SYS_RESOURCE"
        )
    else:
        build.outside("set its oom_score_adj", writer("oom_score_adj", str(section.oom_score_adj)))
    build.outside("set its coredump_filter", writer("coredump_filter", hex(section.coredump_filter)))
    with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
        ours = file.read()
    if ours != section.cgroup:
        build.warnings.append(f"the copy runs in our control group ({_short(ours)}), not in {_short(section.cgroup)}")


def _own_oom_score() -> int:
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def _short(cgroup: str) -> str:
    return ", ".join(line.split(":", 2)[-1] for line in cgroup.split()) or "none"


KIND = Attributes()
