"""`/proc/PID/task/TID/status` of every thread at T0: the one file that several kinds of state read.

It is read inside the freeze for the threads that were there when the target was looked at. A thread that came later is
read after the thaw; one that is gone by then has what all others have, or the attempt fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from tuimig.core.errors import EngineError, FreezeFailed
from tuimig.core.state.base import Frozen, Look, Probe, ProbeKind

Value = TypeVar("Value")


def probes(look: Look) -> list[Probe]:
    """One a thread. Only `credentials` asks them; the others read the same answers."""
    return [Probe(_key(tid), ProbeKind.FILE, path=_path(look.pid, tid)) for tid in look.tids]


def parse(data: bytes) -> dict[str, str]:
    """The file's fields by name."""
    pairs = (line.partition(":") for line in data.decode("utf-8", "surrogateescape").splitlines())
    return {name: value.strip() for name, _, value in pairs}


def now(look: Look, tid: int) -> dict[str, str] | None:
    """As it is at this moment; None where the thread is gone."""
    try:
        with open(_path(look.pid, tid), "rb") as file:
            return parse(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None


def of_leader(frozen: Frozen) -> dict[str, str]:
    """The process's own status at T0."""
    answer = frozen.calls[_key(frozen.look.pid)]
    if answer.ret <= 0:
        raise EngineError("its status could not be read", subject=f"process {frozen.look.pid}", errno=-answer.ret)
    return parse(answer.data)


def each(frozen: Frozen, what: str, read: Callable[[dict[str, str]], Value]) -> dict[int, Value]:
    """`read` of every thread's status at T0, by host thread id. `what` names it in the error."""
    known: dict[int, Value] = {}
    missing = []
    for tid in frozen.tids:
        answer = frozen.calls.get(_key(tid))
        fields = parse(answer.data) if answer and answer.ret > 0 else now(frozen.look, tid)
        if fields is None:
            missing.append(tid)
        else:
            known[tid] = read(fields)
    if missing and not _all_equal(known.values()):
        raise FreezeFailed(
            f"thread {missing[0]} came just before the freeze and ended after it, and the others differ in {what}",
            subject=f"process {frozen.look.pid}",
            cure="Try again",
        )
    return known | {tid: next(iter(known.values())) for tid in missing}


def _all_equal(values: Iterable[object]) -> bool:
    items = list(values)
    return bool(items) and all(item == items[0] for item in items)


def _key(tid: int) -> str:
    return f"credentials.status.{tid}"


def _path(pid: int, tid: int) -> str:
    return f"/proc/{pid}/task/{tid}/status"
