"""The stub's memory becomes the copy's layout; and a stub that is laid out before T0, from an outline of the process.

The skeleton has the id, the clocks, the scratch and the mappings. From T0 on it is given its descriptors and what is
different in its memory, or it is ended and a stub is made from nothing: it is never needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tuimig.core import mapping as layout
from tuimig.core import procfs, spawning
from tuimig.core.engine import lib
from tuimig.core.errors import RebuildFailed, TuimigError
from tuimig.core.manifest import Clocks, Manifest, Outline, RegionEntry
from tuimig.core.maps import parse_maps
from tuimig.core.model import Kind, Options
from tuimig.core.state.base import Call
from tuimig.core.stub import SCRATCH, Place, Stub
from tuimig.core.syscalls import NR

_APART: Final = 64  # between the highest descriptor of the process and those of ours: it opens more until T0
_BEHIND_NS: Final = 5_000_000  # the most that its clocks are waited for
_DATA_MOST: Final = int(lib.TM_STUB_DATA)

_Key = tuple[tuple[Call, ...], tuple[int, int, int]]


def lay_out(stub: Stub, regions: Sequence[RegionEntry], mapping: layout.Mapping, numbers: dict[int, int]) -> None:
    """Replace the stub's memory by the regions. `numbers`: our descriptors of files -> the stub's."""
    ours = _kernel_regions(stub)
    scratch = (stub.scratch, stub.scratch + SCRATCH)
    calls = layout.clear_calls([scratch, *((r.start, r.end) for r in ours)])
    calls += layout.move_calls(ours, _kernel_of(regions), scratch[1])
    run(stub, calls + mapping.calls(numbers))


def run(stub: Stub, calls: Sequence[Call]) -> list[int]:
    """In the leader."""
    return stub.run([(0, call) for call in calls])


def _kernel_regions(stub: Stub) -> list[layout.KernelRegion]:
    regions = parse_maps(Path(f"/proc/{stub.pid}/maps").read_bytes())
    return [
        layout.KernelRegion(r.path, r.start, r.end) for r in regions if r.kind is Kind.KERNEL and r.path != "[vsyscall]"
    ]


def _kernel_of(regions: Sequence[RegionEntry]) -> list[layout.KernelRegion]:
    return [
        layout.KernelRegion(r.path, r.start, r.end)
        for r in regions
        if r.kind == Kind.KERNEL.value and r.path != "[vsyscall]"
    ]


# ---------------------------------------------------------------- before T0


class Skeleton:
    """Everything here is called from one thread, the one that builds the copy. `close` ends what was not taken."""

    def __init__(self, outline: Outline, options: Options, age_ns: int) -> None:
        """`age_ns`: since the outline's clocks were read. Raises what a rebuild raises; nothing is left then."""
        self._outline = outline
        self._options = options
        self._offsets = {name: ns + age_ns for name, ns in spawning.time_offsets(outline.clocks).items()}
        first = max(outline.descriptors, default=spawning.FIRST_HELPER) + _APART
        self._ourselves = first + 1  # the stub's descriptor of this process
        if self._ourselves >= resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
            raise RebuildFailed("its descriptors leave no room for those of its builder")
        self.stub: Stub | None = None
        self._mounts = ourselves = -1
        mapping = layout.Mapping()
        try:
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            ourselves = os.pidfd_open(os.getpid())
            mapping = layout.plan(outline.regions)
            numbers = spawning.helpers((m.fd for m in mapping.mapped if m.fd >= 0), (first, self._ourselves))
            self.stub = spawning.spawn(self._wanted(numbers, ourselves, first), options.pid_namespace)
            self.stub.pin(True)
            lay_out(self.stub, outline.regions, mapping, numbers)
            run(self.stub, [Call(f"close helper {n}", NR["close"], (n,)) for n in numbers.values()])
            self.stub.pin(False)
            self._laid = {m.region.start: (m.region.end, _key(m)) for m in mapping.mapped}
        except BaseException:
            self.close()
            raise
        finally:
            if ourselves >= 0:
                os.close(ourselves)
            mapping.close()

    def _wanted(self, numbers: Mapping[int, int], ourselves: int, uffd_number: int) -> spawning.Wanted:
        outline = self._outline
        places = [Place(number, fd, True) for fd, number in numbers.items()]
        return spawning.Wanted(
            subject=f"copy of {outline.process.comm} ({outline.process.pid})",
            pid=outline.process.pid,
            tids=outline.tids,
            ranges=[(r.start, r.end) for r in outline.regions],
            places=[*places, Place(self._ourselves, ourselves, True)],
            setup=[Call("lead a session of its own", NR["setsid"], ())],  # what our group is sent is not meant for it
            uffd_number=uffd_number,
            lazy=True,
            offsets=self._offsets,
        )

    def close(self) -> None:
        if self._mounts >= 0:
            os.close(self._mounts)
            self._mounts = -1
        if self.stub is not None:
            self.stub.close()
            self.stub = None

    # ------------------------------------------------------------ from T0 on

    def fits(self, manifest: Manifest, options: Options, numbers: Sequence[int], setup: Sequence[Call]) -> bool:
        """Whether it can become this copy. `numbers`: of all descriptors that it is to be given."""
        stub = self.stub
        if stub is None or stub.time_errno or options != self._options or not self._is_as_it_was(stub):
            return False
        scratch = (stub.scratch, stub.scratch + SCRATCH)
        ours = (stub.uffd_number, self._ourselves)
        others = [t.tid for t in manifest.threads[1:]]
        return (
            manifest.process.pid == self._outline.process.pid
            and _kernel_of(manifest.regions) == _kernel_of(self._outline.regions)
            and not any(r.start < scratch[1] and scratch[0] < r.end for r in manifest.regions)
            and max(numbers, default=0) < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            and not set(numbers) & set(ours)
            and (stub.new_namespace or not spawning.taken_ids(others))
            and all(sum(len(a) for a in call.args if isinstance(a, bytes)) <= _DATA_MOST for call in setup)
            and self._reaches(manifest.clocks)
        )

    def _is_as_it_was(self, stub: Stub) -> bool:
        """It lives, nobody has sent it a signal, and nothing was mounted that it does not see."""
        poll = select.poll()
        poll.register(stub.pidfd, select.POLLIN)
        poll.register(self._mounts, select.POLLPRI)
        if poll.poll(0):
            return False
        try:
            status = procfs.read_status(stub.pid)
        except TuimigError:
            return False
        return not any(int(status.get(name, "0"), 16) for name in ("SigPnd", "ShdPnd"))

    def _reaches(self, t0: Clocks) -> bool:
        """Its clocks run on since the outline: never back behind T0."""
        for _ in range(2):
            now = spawning.clocks_with(self._offsets)
            behind = max(t0.monotonic_ns - now["monotonic"], t0.boottime_ns - now["boottime"])
            if behind <= 0:
                return True
            if behind > _BEHIND_NS:
                return False
            time.sleep(behind / 1e9)
        return False

    def missing(self, mapping: layout.Mapping) -> list[layout.Mapped]:
        """Regions that it has not, or not as they are to be."""
        return [m for m in mapping.mapped if self._laid.get(m.region.start) != (m.region.end, _key(m))]

    def complete(
        self,
        mapping: layout.Mapping,
        missing: Sequence[layout.Mapped],
        places: Sequence[Place],
        helpers: Mapping[int, int],
        setup: Sequence[Call],
    ) -> Stub:
        """Give it its descriptors, put its memory right, make the setup calls. It is the caller's from now on."""
        stub = self.stub
        assert stub is not None
        stub.pin(True)
        self._take(stub, places)
        stays = {m.region.start for m in mapping.mapped} - {m.region.start for m in missing}
        calls = [
            Call(f"unmap {start:x}-{end:x}", NR["munmap"], (start, end - start))
            for start, (end, _) in self._laid.items()
            if start not in stays
        ]
        calls += [call for m in missing for call in layout.map_calls(m, helpers.get(m.fd, -1))]
        run(stub, calls)
        for batch in _batches(setup):
            run(stub, batch)
        self.stub = None
        return stub

    def _take(self, stub: Stub, places: Sequence[Place]) -> None:
        """Our descriptors, by their numbers with us. The kernel gives the lowest number that is free."""
        open_now = {stub.uffd_number, self._ourselves}
        calls: list[Call] = []
        expected: dict[int, int] = {}
        low = 0
        for place in sorted(places, key=lambda place: place.number):
            while low in open_now:
                low += 1
            expected[len(calls)] = low
            calls.append(Call(f"place descriptor {place.number}", NR["pidfd_getfd"], (self._ourselves, place.fd, 0)))
            if low != place.number:
                flags = os.O_CLOEXEC if place.cloexec else 0
                calls.append(Call(f"place descriptor {place.number}", NR["dup3"], (low, place.number, flags)))
                calls.append(Call(f"close descriptor {low}", NR["close"], (low,)))
            elif not place.cloexec:
                calls.append(Call(f"place descriptor {place.number}", NR["fcntl"], (low, fcntl.F_SETFD, 0)))
            open_now.add(place.number)
        calls.append(Call("let go of its builder", NR["close"], (self._ourselves,)))
        returned = run(stub, calls)
        if any(returned[index] != low for index, low in expected.items()):
            raise RebuildFailed("its descriptors did not get the numbers that they were to have")


def sketch(outline: Outline, options: Options, age_ns: int = 0) -> Skeleton | None:
    """None where it cannot be made, or would not do: the rebuild at T0 says why, if it meets the same."""
    with contextlib.suppress(TuimigError, OSError):
        made = Skeleton(outline, options, age_ns)
        if made.stub is not None and not made.stub.time_errno:
            return made
        made.close()
    return None


def _batches(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """The action of SIGTRAP is set by a call of its own: a batch takes that signal for its end, and puts it back."""
    batch: list[Call] = []
    for call in calls:
        if call.nr == NR["rt_sigaction"] and call.args[0] == signal.SIGTRAP:
            yield batch
            yield [call]
            batch = []
        else:
            batch.append(call)
    yield batch


def _key(m: layout.Mapped) -> _Key:
    """What makes a mapping what it is, whatever number its file has. What may be done to it goes by the open mode."""
    identity = (0, 0, 0)
    if m.fd >= 0:
        status = os.fstat(m.fd)
        identity = (status.st_dev, status.st_ino, fcntl.fcntl(m.fd, fcntl.F_GETFL) & os.O_ACCMODE)
    return tuple(layout.map_calls(m, 0)), identity
