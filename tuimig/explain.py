"""What is happening, in a few plain sentences for somebody who knows what a page is. Pure: it makes no system call.

`IDEAS` is what holds for every run; `docs/how-it-works.md` has the same words. `explain` adds what this run has shown
so far: its figures, its addresses, its threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tuimig.core.model import (
    Connection,
    Detail,
    Fault,
    FaultKind,
    Frozen,
    Handover,
    Plan,
    Progress,
    Report,
    Round,
    Treatment,
)
from tuimig.words import count, duration, plural, safe, size


@dataclass(frozen=True, slots=True)
class Idea:
    """One phase. `calls`: the system calls and ioctls that do it."""

    title: str
    text: str
    calls: tuple[str, ...]


IDEAS: Final[Mapping[str, Idea]] = {
    "look": Idea(
        "Looking, while it runs",
        "Nothing is stopped yet. We read the map of the process's memory, its threads and its open files, and "
        "decide for each region: eager, which is copied while the process stands still, or protected, which "
        "is captured while it runs. What cannot be copied exactly is refused now, not later.",
        ("read /proc/PID/maps, smaps, fdinfo", "pidfd_open"),
    ),
    "connect": Idea(
        "Finding the other side",
        "The process that will receive the copy is started, and both sides compare what they are: version, "
        "architecture, page size, features of the processor. A difference that matters ends it here, with "
        "nothing stopped.",
        ("socket", "connect"),
    ),
    "attach": Idea(
        "Getting a hand on its page faults",
        "One thread is stopped for some microseconds. We make it call userfaultfd, take the descriptor over, "
        "and close the one it has. From now on the kernel can tell us when somebody writes to a page that we "
        "protect. Should we die in that moment, the call returns by itself and the thread goes on.",
        ("ptrace(PTRACE_SEIZE)", "userfaultfd", "pidfd_getfd", "rt_sigreturn"),
    ),
    "precopy": Idea(
        "Copying ahead",
        "Memory is copied while the process runs, and the kernel notes which pages are written meanwhile. "
        "Those are copied again, round after round, until few are left or no round gains on the one before. "
        "What is copied now need not be copied or protected in the freeze.",
        ("ioctl(UFFDIO_WRITEPROTECT)", "ioctl(PAGEMAP_SCAN)", "process_vm_readv"),
    ),
    "freeze": Idea(
        "The freeze: T0",
        "All threads stop. In these milliseconds we read their registers, copy the eager regions, and "
        "write-protect the protected ones: no content of them is copied, only their page table entries change. This "
        "instant is T0, and the copy will be the process exactly as it is now. Then all threads go on.",
        ("ptrace(PTRACE_INTERRUPT)", "process_vm_readv", "ioctl(UFFDIO_REGISTER)", "ioctl(UFFDIO_WRITEPROTECT)"),
    ),
    "capture": Idea(
        "Copy-on-write, by hand",
        "The process runs, and we owe the copy every page as it was at T0. Workers sweep through the "
        "protected pages and save them. Where the process is faster and writes to one that is not saved yet, "
        "the kernel stops that one thread and tells us; we save the old page, remove its protection and wake "
        "the thread. Each page is saved once, and at the end a scan proves that none was lost.",
        ("read(userfaultfd)", "process_vm_readv", "ioctl(UFFDIO_WRITEPROTECT)", "ioctl(PAGEMAP_SCAN)"),
    ),
    "commit": Idea(
        "Making it last",
        "All of T0 is in the file. Now it is flushed to the disk, and the manifest is written under another "
        "name and renamed: a snapshot is either whole or plainly unfinished.",
        ("fsync", "rename"),
    ),
    "restore": Idea(
        "Building the copy",
        "A new process is made, in a PID namespace of its own, so that it can have the old process and thread "
        "ids. By system calls that we make it do, it drops its own memory and maps regions at the old "
        "addresses; threads, files, signals and timers follow, the registers last. Most of its pages are not "
        "there yet.",
        ("clone3(set_tid)", "mmap", "prctl(PR_SET_MM_MAP)", "ptrace(PTRACE_SETREGS)"),
    ),
    "fill": Idea(
        "Pages on demand",
        "The copy runs, with holes in its memory. Where it touches a page that is missing, the kernel stops "
        "that thread and tells us; we put the page there and it goes on. Meanwhile the other pages are filled "
        "in the background. When the last is in, nothing of ours is left in it.",
        ("ioctl(UFFDIO_REGISTER, MODE_MISSING)", "read(userfaultfd)", "ioctl(UFFDIO_COPY)"),
    ),
    "done": Idea(
        "Both run",
        "The copy is the process as it was at T0, and from there on each goes its own way: what one writes "
        "the other never sees.",
        (),
    ),
}


# What "done" is for the other verbs, and for what did not come to its end.
ENDS: Final[Mapping[str, Idea]] = {
    "snapshot": Idea(
        "The picture is kept",
        "The process runs on, and T0 lies in a directory: all of its memory and state at that instant. It can be "
        "restored as often as you like, also long after the process has ended.",
        (),
    ),
    "move": Idea(
        "It runs there, and only there",
        "The copy has every page and goes on where the process stood still at T0. The source has been ended: at no "
        "moment did both run.",
        (),
    ),
    "restore": Idea(
        "It runs again",
        "The copy goes on from T0, as if no time had passed for it but what its clocks say. The snapshot is not "
        "touched, and can be restored again.",
        (),
    ),
    "ended": Idea("The copy has been ended", "It was a process of its own: its source did not notice.", ()),
    "failed": Idea(
        "It ended before its time",
        "What had been built or written of it is taken away. Why, and what that means for the process:",
        (),
    ),
}


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known at the moment that is explained. Whatever is not known yet is left as it is here."""

    phase: str
    verb: str = "clone"
    pid: int = 0
    command: str = ""
    plan: Plan = Plan(())  # noqa: RUF009  immutable
    round: Round | None = None  # the last one of pre-copy
    frozen: Frozen | None = None
    progress: Progress = Progress("look")  # noqa: RUF009
    details: Mapping[str, Detail] | None = None
    last_fault: Fault | None = None
    region_of_fault: str = ""
    attempts: int = 1
    connection: Connection | None = None  # to a destination on another host
    handover: Handover | None = None  # of a move
    remote: Progress | None = None  # the destination's
    report: Report | None = None
    error: str = ""  # why it is over without a report
    copy_ended: bool = False
    waiting_for: str = ""  # step mode: the phase that comes when a key is pressed


@dataclass(frozen=True, slots=True)
class Explanation:
    """`idea` holds for every run, `here` are sentences about this one."""

    idea: Idea
    here: tuple[str, ...]
    next: str = ""


def explain(now: Situation) -> Explanation:
    if now.error:
        return Explanation(ENDS["failed"], (f"{safe(now.error)}.",))
    phase = "done" if now.report is not None else now.phase
    idea = IDEAS.get(phase, IDEAS["look"])
    if phase == "done":
        idea = ENDS.get("ended" if now.copy_ended and now.verb == "clone" else now.verb, idea)
    sentences = [*_HERE.get(phase, _nothing)(now), *_line(now), _handed(now)]
    here = tuple(sentence for sentence in sentences if sentence)
    following = IDEAS.get(now.waiting_for)
    return Explanation(idea, here, f"Next, at a key: {following.title}." if following else "")


def _nothing(_: Situation) -> list[str]:
    return []


def _look(now: Situation) -> list[str]:
    decisions = now.plan.decisions
    if not decisions:
        return [f"Process {now.pid}."] if now.pid else []
    numbers = {t: sum(d.treatment is t for d in decisions) for t in Treatment}
    largest = max(decisions, key=lambda d: d.region.rss)
    region = largest.region
    return [
        f"Process {now.pid} has {plural(len(decisions), 'region')}: {numbers[Treatment.EAGER]} eager "
        f"({size(now.plan.bytes(Treatment.EAGER))}), {numbers[Treatment.PROTECTED]} protected "
        f"({size(now.plan.bytes(Treatment.PROTECTED))}), {numbers[Treatment.NONE]} that a file or the kernel provides.",
        f"The largest is {safe(region.name)} at {region.start:#x} with {size(region.rss)} in memory; it is "
        f"{largest.treatment.value}, because: {safe(largest.why)}."
        if region.rss
        else "",
    ]


def _attach(now: Situation) -> list[str]:
    again = f"This is attempt {now.attempts}: the one before was thrown away." if now.attempts > 1 else ""
    return [f"The thread that makes the call belongs to process {now.pid}; the others run on meanwhile.", again]


def _precopy(now: Situation) -> list[str]:
    last = now.round
    over_there = (
        [
            f"{count(now.progress.sent_pages)} pages have gone to the destination. One that is written after it has "
            "gone goes again, over the same stream, so that the last to arrive is the last that was read."
        ]
        if now.progress.sent_pages
        else []
    )
    if last is None:
        return over_there
    if last.number == 0:
        return [f"The first round copied all {count(last.copied_pages)} pages that there are.", *over_there]
    return [
        f"Round {last.number}: {count(last.dirty_pages)} pages had been written since the round before, "
        f"{count(int(last.dirty_per_second))} a second; {count(last.copied_pages)} were copied again"
        + (f", {count(last.hot_pages)} that are written all the time are left to the end." if last.hot_pages else "."),
        *over_there,
    ]


def _freeze(now: Situation) -> list[str]:
    return _frozen(now.frozen) if now.frozen else ["It is measured now; its parts are told when it is over."]


def _frozen(frozen: Frozen) -> list[str]:
    words = [f"Process and threads stood still for {duration(frozen.frozen_us)}."]
    if frozen.parts:
        name, most = max(frozen.parts.items(), key=lambda part: part[1])
        much = "Most" if 2 * most > frozen.frozen_us else "The largest part"
        words.append(f"{much} of it, {duration(most)}, went to {PARTS.get(name, name)}.")
    return words


PARTS: Final = {
    "stop": "stopping the threads",
    "maps": "reading the map of its memory again",
    "threads": "reading the threads' registers",
    "calls": "calls that its threads make for us (what only they can ask for)",
    "probes": "reading its files and queues",
    "descriptors": "reading its descriptors",
    "proof": "finding out what pre-copy has read and nobody has written since",
    "dirty": "copying what was written since the last round",
    "there": "building the copy there",
    "verify": "hashing its pages (--verify)",
    "eager": "copying the eager regions",
    "scan": "finding the pages that are there",
    "arm": "write-protecting the pages (arming)",
    "thaw": "letting the threads go",
}


def _capture(now: Situation) -> list[str]:
    progress = now.progress
    words = _frozen(now.frozen)[:1] if now.frozen else []
    if progress.pages_total:
        words.append(
            f"{count(progress.pages_done)} of {count(progress.pages_total)} pages are saved: "
            f"{count(progress.swept_pages)} by the sweep, {count(progress.wp_faults)} because of a write; "
            f"{count(progress.zero_pages)} hold only zeros and need no room."
        )
    words.append(_fault(now, FaultKind.WP))
    words.append(_usual(now, "source"))
    if progress.guard_stops:
        words.append(
            f"The guard stopped {count(progress.guard_stops)} system calls that could have freed memory, and saved "
            f"what they would have taken."
        )
    return words


def _fill(now: Situation) -> list[str]:
    progress = now.progress
    words = []
    if progress.phase == "fill" and progress.pages_total:
        words.append(
            f"{count(progress.pages_done)} of {count(progress.pages_total)} pages are in the copy; "
            f"{count(progress.demand_faults)} times it could not wait and fetched one itself."
        )
    return [*words, _fault(now, FaultKind.MISSING), _usual(now, "copy")]


def _fault(now: Situation, kind: FaultKind) -> str:
    fault = now.last_fault
    if fault is None or fault.kind is not kind:
        return ""
    where = f" in {safe(now.region_of_fault)}" if now.region_of_fault else ""
    waited = duration(fault.latency_ns / 1000)
    if kind is FaultKind.WP:
        return (
            f"Thread {fault.tid} wrote to {fault.address:#x}{where}; the kernel parked it; our handler saved the old "
            f"page and let it go after {waited}."
        )
    return (
        f"Thread {fault.tid} of the copy touched {fault.address:#x}{where}, which was not there; the kernel parked it; "
        f"our filler put {plural(fault.pages, 'page')} there and let it go after {waited}."
    )


def _usual(now: Situation, side: str) -> str:
    detail = (now.details or {}).get(side)
    if detail is None or detail.histogram.count < 2:
        return ""
    times = detail.histogram.times
    return f"Of {count(detail.histogram.count)} faults half were served within {duration(times.p50)}."


def _restore(now: Situation) -> list[str]:
    if not now.plan.decisions:
        return []
    regions = f"Its {plural(len(now.plan.decisions), 'region')} get their old addresses"
    if now.verb in ("restore", "move"):  # there is no source, or it stands still
        return [f"{regions}."]
    return [f"{regions}; process {now.pid}, the source, runs on and notices nothing of it."]


def _done(now: Situation) -> list[str]:
    report = now.report
    if report is None:
        return []
    words = []
    if report.frozen_us is not None:
        words += _frozen(Frozen(report.frozen_us, report.frozen))
    if report.new_pid is not None and report.downtime_us is not None:
        since = "after it was started" if report.verb == "restore" else "after T0"
        words.append(
            f"Process {report.new_pid} made its first step {duration(report.downtime_us)} {since}"
            + (f" and had all of its {size(report.bytes)} {duration(report.fill_us)} later." if report.fill_us else ".")
        )
    if report.directory is not None and report.new_pid is None:
        words.append(f"The picture of T0, {size(report.bytes)}, is in {safe(report.directory)}.")
    words.append(
        f"{plural(report.wp_faults, 'write')} had to wait for a page to be saved, "
        f"{_touches(report.demand_faults)} for a page to come."
    )
    if report.attempts > 1:
        words.append(f"It took {report.attempts} attempts; the last one ran {_guarded(report)}.")
    return words


def _line(now: Situation) -> list[str]:
    """The connection, and what lies at its other end. When all is over it is nobody's concern."""
    line, there = now.connection, now.remote
    if line is None or now.report is not None:
        return []
    to, why = safe(line.destination), f" ({safe(line.text)})" if line.text else ""
    words = {
        "connecting": f"The connection to {to} is being made.",
        "connected": f"The connection to {to} stands; pages that are asked for never wait behind the others.",
        "lost": f"The connection to {to} is lost{why}. Both sides hold: we keep the pages of T0, and threads of the "
        f"copy wait in their faults. It is tried again"
        + (f" for another {line.left_s:.0f} s, and goes on where it stopped." if line.left_s else "."),
        "given-up": f"The connection to {to} has been given up{why}.",
    }
    arrived = ""
    if there is not None and there.arrived_pages:
        arrived = f"{count(there.arrived_pages)} pages have arrived there"
        if there.round_trip_us is not None and there.round_trip_us.max:
            arrived += f"; half of those that were asked for came within {duration(there.round_trip_us.p50)}"
        arrived += "."
    return [words.get(line.state, ""), arrived]


def _handed(now: Situation) -> str:
    """A move: who may run. The two never both do."""
    if now.handover is None or now.report is not None:
        return ""
    return HANDOVER.get((now.handover.source, now.handover.destination), "")


_TOLD: Final = (
    "We have told the destination to run, and do not know yet whether it does: from here on the source stays stopped "
    "whatever happens, so that the two never both run."
)
HANDOVER: Final = {
    ("frozen", "building"): "The source stands still while the copy is built. If anything fails it goes on from T0.",
    ("frozen", "built"): "The copy is built and stands one step from running. If anything fails the source goes on.",
    ("stopped", "built"): "The copy is built and stands one step from running; the source is stopped for good.",
    ("stopped", "told"): _TOLD,
    ("stopped", "unknown"): _TOLD,
    ("stopped", "running"): "The copy runs, the source is stopped. It is ended when the copy has every page.",
    ("stopped", "filled"): "The copy has every page and needs nobody. Now the source is ended.",
    ("ended", "filled"): "The copy has every page; the source has been ended.",
    ("runs", "failed"): "The copy could not be built or run; the source goes on from T0 as if nothing had been.",
}


def _touches(number: int) -> str:
    return "1 touch" if number == 1 else f"{count(number)} touches"


def _guarded(report: Report) -> str:
    return "under the guard, at the cost of its system calls" if report.guard == "guarded" else "without the guard"


_HERE: Final = {
    "look": _look,
    "attach": _attach,
    "precopy": _precopy,
    "freeze": _freeze,
    "capture": _capture,
    "restore": _restore,
    "fill": _fill,
    "done": _done,
}


def text(shown: Explanation) -> str:
    """As plain text, for the command line's step mode."""
    lines = [shown.idea.title, shown.idea.text, *shown.here]
    if shown.idea.calls:
        lines.append(f"System calls: {', '.join(shown.idea.calls)}.")
    return "\n".join([*lines, *([shown.next] if shown.next else [])])
