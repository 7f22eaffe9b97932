"""What a process and its threads have besides memory and files: dumped, rebuilt in another process, dumped again."""

from __future__ import annotations

import copy
import os
import resource
import signal
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puppet import Puppet, copy_manifest, dump, freeze, look, puppet, rebuild

from snapshots import places
from tuimig.core import errors, rawcall
from tuimig.core.model import Options
from tuimig.core.state import attributes, credentials, scheduling, seccomp, signals, status, timers
from tuimig.core.state.base import OUT, Build
from tuimig.core.syscalls import NR

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes credentials: needs root")
WHO = credentials.KIND
NOBODY = 65534


def through_json(section: msgspec.Struct) -> Any:
    """As the manifest carries it."""
    return msgspec.json.decode(msgspec.json.encode(section), type=type(section))


def by_thread(section: Any, of: Puppet) -> list[Any]:
    """Each thread's kind, in the order of the threads."""
    return [section.kinds[section.threads[tid]] for tid in of.tids]


# ---------------------------------------------------------------- signals


def test_actions_are_as_before() -> None:
    handler, restorer = 0x401000, 0x402000
    sigaction = struct.Struct("<QQQQ")
    with puppet() as source, puppet() as copy:
        for number, flags, mask in ((signal.SIGUSR1, 0x14000004, 1 << 63), (64, 0x0C000000, 5), (34, 0x54000000, 0)):
            image = sigaction.pack(handler, flags, restorer, mask)
            assert source.call(NR["rt_sigaction"], number, image, 0, 8).ret == 0
        default_with_flags = sigaction.pack(0, 2 | 0x04000000, restorer, 0)  # SIGCHLD: SA_NOCLDWAIT, still default
        assert source.call(NR["rt_sigaction"], signal.SIGCHLD, default_with_flags, 0, 8).ret == 0
        ignored = sigaction.pack(1, 0, 0, 0)
        assert source.call(NR["rt_sigaction"], signal.SIGQUIT, ignored, 0, 8).ret == 0
        [section] = dump([signals.KIND, WHO], source)[:1]
        found = {action.number: action for action in section.actions}
        assert found[64].mask == 5
        assert found[int(signal.SIGUSR1)].handler == handler
        assert found[int(signal.SIGQUIT)].handler == 1
        assert rebuild([signals.KIND], [through_json(section)], source, copy) == []
        assert dump([signals.KIND, WHO], copy)[0] == section


def test_a_signal_caught_after_the_look_is_noticed() -> None:
    with puppet() as source, look(source) as seen:
        probes = [*signals.KIND.probes(seen), *WHO.probes(seen)]
        source.call(NR["rt_sigaction"], 50, struct.pack("<QQQQ", 0x401000, 0, 0, 0), 0, 8)
        with pytest.raises(errors.FreezeFailed, match="signal 50"):
            signals.KIND.dump(freeze(source, seen, probes))


def test_the_kernel_delivers_to_a_restored_handler() -> None:
    with puppet() as source, puppet() as copy:
        ignore = struct.pack("<QQQQ", 1, 0, 0, 0)
        source.call(NR["rt_sigaction"], signal.SIGUSR2, ignore, 0, 8)
        rebuild([signals.KIND], dump([signals.KIND, WHO], source)[:1], source, copy)
        os.kill(copy.pid, signal.SIGUSR2)
        assert copy.call(NR["getpid"]).ret == copy.pid


# ---------------------------------------------------------------- interval and POSIX timers

ITIMER = struct.Struct("<4q")


def test_interval_timers_go_on() -> None:
    with puppet() as source, puppet() as copy:
        assert source.call(NR["setitimer"], 0, ITIMER.pack(7, 5, 100, 0), 0).ret == 0
        assert source.call(NR["setitimer"], 2, ITIMER.pack(0, 0, 50, 0), 0).ret == 0
        [section] = dump([timers.KIND], source)
        assert [(t.which, t.interval_us) for t in section.intervals] == [(0, 7000005), (2, 0)]
        rebuild([timers.KIND], [through_json(section)], source, copy)
        [again] = dump([timers.KIND], copy)
        for before, after in zip(section.intervals, again.intervals, strict=True):
            assert after.interval_us == before.interval_us
            assert before.value_us - 5_000_000 < after.value_us <= before.value_us + 10_000


def test_an_interval_timer_whose_signal_is_queued_goes_on() -> None:
    with puppet() as source:
        source.call(NR["rt_sigprocmask"], 0, struct.pack("<Q", 1 << (signal.SIGALRM - 1)), 0, 8)
        source.call(NR["setitimer"], 0, ITIMER.pack(60, 0, 0, 1000), 0)
        deadline = time.monotonic() + 5
        while not int(status.parse(Path(f"/proc/{source.pid}/status").read_bytes())["ShdPnd"], 16):
            assert time.monotonic() < deadline
        [section] = dump([timers.KIND], source)
        assert section.intervals == [timers.Interval(0, 60_000_000, 60_000_000)]


def test_posix_timers_keep_their_ids_and_targets() -> None:
    event = struct.Struct("<QiiI44x")
    with puppet(threads=1) as source, puppet(threads=1) as copy:
        made = []
        for clock, image in (
            (0, event.pack(1, signal.SIGUSR1, 0, 0)),
            (1, event.pack(2, 40, 4, source.tids[1])),
            (7, event.pack(3, 0, 1, 0)),
            (2, event.pack(0x7FFF12345678, 41, 0, 0)),
            (1, event.pack(5, 42, 0, 0)),
        ):
            answer = source.call(NR["timer_create"], clock, image, OUT, out=4)
            assert answer.ret == 0
            made.append(int.from_bytes(answer.data, "little"))
        assert source.call(NR["timer_delete"], made[2]).ret == 0  # a hole in the ids
        for number, image in ((made[0], ITIMER.pack(9, 1, 500, 2)), (made[1], ITIMER.pack(0, 0, 300, 0))):
            assert source.call(NR["timer_settime"], number, 0, image, 0).ret == 0
        assert source.call(NR["timer_settime"], made[3], 0, ITIMER.pack(0, 0, 90, 0), 0).ret == 0
        [section] = dump([timers.KIND], source)
        assert [t.id for t in section.posix] == [made[0], made[1], made[3], made[4]]
        assert section.posix[1].host_tid == source.tids[1]
        rebuild([timers.KIND], [through_json(section)], source, copy)
        [again] = dump([timers.KIND], copy)
        for before, after in zip(section.posix, again.posix, strict=True):
            assert (after.id, after.clock, after.notify, after.signal, after.value, after.interval_ns) == (
                before.id,
                before.clock,
                before.notify,
                before.signal,
                before.value,
                before.interval_ns,
            )
            assert before.value_ns - 5 * 10**9 < after.value_ns <= before.value_ns + 10**7
        assert again.posix[1].host_tid == copy.tids[1]
        fresh = copy.call(NR["timer_create"], 1, event.pack(0, signal.SIGUSR1, 0, 0), OUT, out=4)
        assert fresh.ret == 0  # ids are chosen by the kernel again
        assert int.from_bytes(fresh.data, "little") not in [t.id for t in again.posix]


def test_a_timer_on_a_threads_clock_is_refused() -> None:
    with puppet() as source:
        assert source.call(NR["timer_create"], 3, struct.pack("<QiiI44x", 1, 10, 0, 0), OUT, out=4).ret == 0
        with look(source) as seen:
            [obstacle] = timers.KIND.obstacles(seen)
            assert obstacle.name == "posix-timer"
            with pytest.raises(errors.Unsupported):
                timers.KIND.dump(freeze(source, seen, timers.KIND.probes(seen)))


def test_timers_made_after_the_look_are_found_or_it_fails() -> None:
    event = struct.pack("<QiiI44x", 1, 10, 0, 0)
    with puppet() as source, look(source) as seen:
        source.call(NR["timer_create"], 1, event, OUT, out=4)
        probes = timers.KIND.probes(seen)
        source.call(NR["timer_create"], 1, event, OUT, out=4)
        assert len(timers.KIND.dump(freeze(source, seen, probes)).posix) == 2
        for _ in range(timers.AHEAD):
            source.call(NR["timer_create"], 1, event, OUT, out=4)
        with pytest.raises(errors.FreezeFailed, match="Try again"):
            timers.KIND.dump(freeze(source, seen, probes))


def test_an_unknown_form_of_the_file_is_an_error() -> None:
    with pytest.raises(errors.EngineError, match="unknown form"):
        timers.parse("ID: 1\nsignal: 2/0\nnew: 1\n")


# ---------------------------------------------------------------- credentials


def capset(of: Puppet, effective: int, permitted: int, inheritable: int, tid: int = 0) -> None:
    header = struct.pack("<Ii", 0x20080522, 0)
    halves = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in (effective, permitted, inheritable)]
    assert of.call(NR["capset"], header, struct.pack("<6I", *halves), tid=tid).ret == 0


@needs_root
def test_equal_credentials_need_no_call() -> None:
    with puppet(threads=2) as source:
        [section] = dump([WHO], source)
        assert len(section.kinds) == 1
        assert credentials.change(credentials.own_credentials(), section.kinds[0], 1, set()) == []


def become_user(of: Puppet, tid: int) -> None:
    of.call(NR["setgroups"], 2, struct.pack("<2I", 1234, 7), tid=tid)
    of.call(NR["setresgid"], 100, 101, 102, tid=tid)
    of.call(NR["setresuid"], 1000, 1001, 1002, tid=tid)


def become_service(of: Puppet, tid: int) -> None:
    """A user with one capability kept, ambient too, and a small bounding set."""
    keep = 1 << 10
    of.call(NR["prctl"], 8, 1, 0, 0, 0, tid=tid)
    for number in range(41):
        if number != 10:
            of.call(NR["prctl"], credentials.PR_CAPBSET_DROP, number, 0, 0, 0, tid=tid)
    of.call(NR["setresuid"], NOBODY, NOBODY, NOBODY, tid=tid)
    capset(of, keep, keep, keep, tid=tid)
    assert of.call(NR["prctl"], 47, 2, 10, 0, 0, tid=tid).ret == 0
    assert of.call(NR["prctl"], 38, 1, 0, 0, 0, tid=tid).ret == 0


def become_weak_root(of: Puppet, tid: int) -> None:
    capset(of, 1 << 21, (1 << 21) | 1, 1 << 5, tid=tid)


def become_odd(of: Puppet, tid: int) -> None:
    """Securebits locked, another file system id."""
    assert of.call(NR["prctl"], credentials.PR_SET_SECUREBITS, 0x2F, 0, 0, 0, tid=tid).ret == 0
    of.call(NR["setfsgid"], 77, tid=tid)
    of.call(NR["setfsuid"], 78, tid=tid)


BECOME = [become_user, become_service, become_weak_root, become_odd]


@needs_root
@pytest.mark.parametrize("become", BECOME)
def test_credentials_are_as_before(become: Any) -> None:
    with puppet() as source, puppet() as copy:
        become(source, 0)
        [section] = dump([WHO], source)
        assert section.kinds[0] != credentials.own_credentials()
        warnings = rebuild([WHO], [through_json(section)], source, copy)
        assert warnings == []
        assert by_thread(dump([WHO], copy)[0], copy) == by_thread(section, source)


@needs_root
def test_each_thread_has_its_own() -> None:
    with puppet(threads=len(BECOME)) as source, puppet(threads=len(BECOME)) as copy:
        for become, tid in zip(BECOME, source.tids[1:], strict=True):
            become(source, tid)
        [section] = dump([WHO], source)
        assert len(section.kinds) == 1 + len(BECOME)
        rebuild([WHO], [through_json(section)], source, copy)
        assert by_thread(dump([WHO], copy)[0], copy) == by_thread(section, source)


@needs_root
def test_what_we_lack_is_said() -> None:
    ours = credentials.own_credentials()
    weaker = msgspec.structs.replace(
        ours,
        permitted=ours.permitted & ~(1 << 12),
        effective=ours.effective & ~(1 << 12),
        bounding=ours.bounding & ~(1 << 13),
    )
    warned: set[str] = set()
    credentials.change(weaker, ours, 1, warned)
    assert sorted(warned) == [
        "the copy lacks CAP_NET_ADMIN: we have not got it to give",
        "the copy lacks CAP_NET_RAW in its bounding set: we have not got it to give",
    ]


@needs_root
def test_threads_that_came_late_are_read_or_it_fails() -> None:
    with puppet(threads=1) as source, look(source) as seen:
        probes = [p for p in WHO.probes(seen) if not p.path.endswith(f"/{source.tids[1]}/status")]
        frozen = freeze(source, seen, probes)
        assert len(WHO.dump(frozen).threads) == 2
        frozen.tids = [*frozen.tids, 1 << 22]  # gone again
        assert WHO.dump(frozen).threads[1 << 22] == 0
        become_user(source, source.tids[1])
        with pytest.raises(errors.FreezeFailed, match="credentials"):
            WHO.dump(frozen)


# ---------------------------------------------------------------- attributes of the process


def set_limit(of: Puppet, number: int, soft: int, hard: int) -> None:
    assert of.call(NR["prlimit64"], 0, number, struct.pack("<QQ", soft, hard), 0).ret == 0


@needs_root
def test_attributes_are_as_before(tmp_path: Path) -> None:
    kinds = [attributes.KIND, WHO]
    with puppet() as source, puppet() as copy:
        source.call(NR["chdir"], os.fsencode(tmp_path) + b"\0")
        source.call(NR["umask"], 0o137)
        source.call(NR["personality"], 0x0040000)
        set_limit(source, resource.RLIMIT_NOFILE, 123, 456)
        set_limit(source, resource.RLIMIT_CORE, 0, 1 << 40)
        set_limit(source, resource.RLIMIT_STACK, 1 << 20, attributes.INFINITY)
        source.call(NR["prctl"], attributes.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        source.call(NR["prctl"], attributes.PR_SET_THP_DISABLE, 1, 0, 0, 0)
        become_user(source, 0)
        source.call(NR["prctl"], credentials.PR_SET_DUMPABLE, 1, 0, 0, 0)
        Path(f"/proc/{source.pid}/oom_score_adj").write_text("321")
        Path(f"/proc/{source.pid}/coredump_filter").write_text("0x7f")
        sections = [through_json(section) for section in dump(kinds, source)]
        found = sections[0]
        assert found.cwd == str(tmp_path)
        assert (found.umask, found.personality, sections[1].dumpable) == (0o137, 0x40000, 1)
        assert found.subreaper
        assert (found.oom_score_adj, found.coredump_filter) == (321, 0x7F)
        assert attributes.Limit(resource.RLIMIT_NOFILE, 123, 456) in found.limits
        assert len(found.limits) == 16
        assert rebuild(kinds, sections, source, copy) == []
        again = dump(kinds, copy)
        assert again[0] == found
        assert again[1].dumpable == 1
        assert os.getsid(copy.pid) == copy.pid


@needs_root
def test_not_dumpable_stays_so() -> None:
    kinds = [WHO]
    with puppet() as source, puppet() as copy:
        source.call(NR["prctl"], credentials.PR_SET_DUMPABLE, 0, 0, 0, 0)
        sections = dump(kinds, source)
        rebuild(kinds, sections, source, copy)
        assert copy.call(NR["prctl"], credentials.PR_GET_DUMPABLE, 0, 0, 0, 0).ret == 0


def test_a_hard_limit_that_cannot_be_raised_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "_may", lambda capability: False)
    number, (_, hard) = resource.RLIMIT_MEMLOCK, resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        number, hard = resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    warnings: list[str] = []
    [call] = attributes._limit_calls([attributes.Limit(number, attributes.INFINITY, attributes.INFINITY)], warnings)
    assert call.args[2] == struct.pack("<QQ", hard, hard)
    assert "unlimited" in warnings[0]
    assert "CAP_SYS_RESOURCE" in warnings[0]


def test_a_working_directory_that_is_gone_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    with puppet() as source:
        source.call(NR["chdir"], os.fsencode(place) + b"\0")
        with look(source) as seen:
            assert attributes.KIND.obstacles(seen) == []
            place.rmdir()
            [obstacle] = attributes.KIND.obstacles(seen)
            assert obstacle.name == "cwd"
            with pytest.raises(errors.Unsupported, match="working directory"):
                attributes.KIND.dump(freeze(source, seen, [*attributes.KIND.probes(seen), *WHO.probes(seen)]))
            place.mkdir()  # another directory of that name
            assert [o.name for o in attributes.KIND.obstacles(seen)] == ["cwd"]


def test_the_death_signal_of_a_parent_is_said_and_not_set() -> None:
    kinds = [attributes.KIND, WHO]
    with puppet() as source, puppet() as copy:
        source.call(NR["prctl"], 1, signal.SIGTERM, 0, 0, 0)
        sections = dump(kinds, source)
        assert sections[0].pdeathsig == signal.SIGTERM
        [warning] = rebuild(kinds, sections, source, copy)
        assert "parent" in warning
        assert dump(kinds, copy)[0].pdeathsig == 0


def test_a_process_that_ends_is_gone() -> None:
    with puppet() as source, look(source) as seen:
        os.kill(source.pid, signal.SIGKILL)
        os.waitpid(source.pid, 0)
        for kind in (attributes.KIND, timers.KIND):
            with pytest.raises((errors.TargetGone, errors.PrivilegeError)):
                kind.obstacles(seen)


# ---------------------------------------------------------------- scheduling


@needs_root
def test_scheduling_is_as_before() -> None:
    with puppet(threads=3) as source, puppet(threads=3) as copy:
        leader, batch, idle, real = source.tids
        os.setpriority(os.PRIO_PROCESS, batch, 7)
        os.sched_setscheduler(batch, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setscheduler(idle, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setscheduler(real, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(3))
        os.sched_setaffinity(idle, {min(os.sched_getaffinity(0))})
        rawcall.call("ioprio_set", 1, leader, (2 << 13) | 6)
        source.call(NR["prctl"], scheduling.PR_SET_TIMERSLACK, 123456, 0, 0, 0, tid=batch)
        [section] = dump([scheduling.KIND], source)
        before = by_thread(section, source)
        assert [s.policy for s in before] == [0, 3, 5, 1]
        assert (before[1].nice, before[1].slack_ns) == (7, 123456)
        assert len(before[2].cpus) == 1
        assert before[3].flags == 1
        warnings = rebuild([scheduling.KIND], [through_json(section)], source, copy)
        assert warnings == []
        assert by_thread(dump([scheduling.KIND], copy)[0], copy) == before


@needs_root
def test_processors_that_are_not_here_are_said() -> None:
    with puppet() as source, puppet() as copy:
        [section] = dump([scheduling.KIND], source)
        elsewhere = msgspec.structs.replace(section.kinds[0], cpus=[100000])
        section = msgspec.structs.replace(section, kinds=[elsewhere])
        [warning] = rebuild([scheduling.KIND], [section], source, copy)
        assert "processors" in warning


# ---------------------------------------------------------------- seccomp


def confine(of: Puppet, tid: int) -> None:
    """A filter of one instruction, which allows everything."""
    of.call(NR["prctl"], 38, 1, 0, 0, 0, tid=tid)
    place = of.call(NR["brk"], 0).ret
    assert of.call(NR["brk"], place + 4096).ret == place + 4096
    with open(f"/proc/{of.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(place)
        memory.write(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
    assert of.call(NR["prctl"], 22, 2, struct.pack("<HxxxxxxQ", 1, place), 0, 0, tid=tid).ret == 0


def test_a_thread_under_seccomp_is_refused() -> None:
    with puppet(threads=2) as source:
        confine(source, source.tids[2])
        with look(source) as seen:
            [obstacle] = seccomp.KIND.obstacles(seen)
        assert obstacle.name == "seccomp"
        assert obstacle.where == f"thread {source.tids[2]}"
        assert "a filter" in obstacle.why


def test_no_seccomp_is_no_obstacle() -> None:
    with puppet(threads=1) as source:
        assert dump([WHO, seccomp.KIND], source)[1] == seccomp.SeccompState()


def test_a_filter_at_the_freeze_is_refused() -> None:
    """One that came after the look: the status at T0 tells."""
    with puppet() as source, look(source) as seen:
        assert seccomp.KIND.obstacles(seen) == []
        confine(source, 0)
        with pytest.raises(errors.Unsupported, match="seccomp"):
            seccomp.KIND.dump(freeze(source, seen, WHO.probes(seen)))


# ---------------------------------------------------------------- all together


@needs_root
def test_a_rebuild_asks_for_nothing_where_nothing_differs(tmp_path: Path) -> None:
    """Calls for attributes that every process has are few: the rebuild of an ordinary process stays short."""
    kinds = [signals.KIND, timers.KIND, scheduling.KIND, seccomp.KIND, WHO, attributes.KIND]
    with puppet() as source, puppet() as copy:
        build = Build(copy_manifest(source, copy), Options())
        for kind, section in zip(kinds, dump(kinds, source), strict=True):
            kind.rebuild(section, build)  # type: ignore[attr-defined]
        assert sum(len(calls) for calls in build.calls.values()) < 40


# ---------------------------------------------------------------- sections are untrusted

KINDS = (signals.KIND, timers.KIND, scheduling.KIND, seccomp.KIND, attributes.KIND, WHO)
ODD = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([-1, 0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64]),
    st.text(max_size=3),
    st.none(),
    st.lists(st.integers(-5, 70000), max_size=3),
)


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """Sections of a process with something of everything, decoded, and the manifest they belong to."""
    with puppet(threads=1) as source:
        source.call(NR["setitimer"], 0, ITIMER.pack(7, 5, 100, 0), 0)
        source.call(NR["timer_create"], 1, struct.pack("<QiiI44x", 1, 10, 0, 0), OUT, out=4)
        sections = dump(KINDS, source)
        found = {k.name: msgspec.json.decode(msgspec.json.encode(s)) for k, s in zip(KINDS, sections, strict=True)}
        return found | {"manifest": copy_manifest(source, source)}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_malformed_section_is_an_error_of_ours(documents: dict[str, Any], data: st.DataObject) -> None:
    """Refused when it is decoded or rebuilt, or made into calls that fit the structures of the kernel."""
    kind: Any = data.draw(st.sampled_from(KINDS))
    document = copy.deepcopy(documents[kind.name])
    paths = places(document)
    if not paths:
        return
    path = data.draw(st.sampled_from(paths))
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = data.draw(ODD)
    build = Build(documents["manifest"], Options())
    try:
        section = msgspec.json.decode(msgspec.json.encode(document), type=kind.Section)
        kind.rebuild(section, build)
    except (msgspec.ValidationError, errors.SnapshotDamaged):
        return
    assert all(isinstance(arg, int | bytes) for calls in build.calls.values() for _, c in calls for arg in c.args)
