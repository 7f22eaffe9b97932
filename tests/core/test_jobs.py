"""Messages between a console and a session process: each comes back as it went; anything else is refused."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuimig.core import jobs
from tuimig.core.errors import DestinationRefused, Obstacle, TargetGone, TuimigError, Unsupported
from tuimig.core.jobs import (
    FRAME_MOST,
    LENGTH,
    Background,
    Cancel,
    Done,
    Failure,
    Frames,
    Go,
    Heat,
    Job,
    Kept,
    Reconnect,
    State,
    Waiting,
    decode,
    encode,
    error_of,
    failure_of,
    frame,
)
from tuimig.core.model import (
    Connection,
    Decision,
    Detail,
    FaultTimes,
    Frozen,
    Handover,
    Histogram,
    Kind,
    Note,
    Options,
    Phase,
    Plan,
    Planned,
    PortMap,
    Progress,
    Region,
    Report,
    Round,
    Treatment,
)
from tuimig.core.policy import Policy, Rule

HEAP = Region(0x1000, 0x9000, "rw-p", 0, "00:00", 0, "[heap]", Kind.HEAP, rss=4096, flags=frozenset({"rd", "wr"}))
MESSAGES = [
    Job(
        "clone",
        4711,
        "local",
        Policy(1 << 20, (Rule("heap", Treatment.EAGER, "--eager heap"),)).with_keys([HEAP], Treatment.PROTECTED),
        Options(map_ports=(PortMap(6379, 16379),), map_paths=(("/a", "/b"),), freeze_budget_ms=2.5, started=99),
    ),
    Job("heat", 1, seconds=2.0),
    Cancel(),
    Go(),
    Reconnect(),
    Waiting("freeze"),
    Kept(),
    Connection("lost", "ssh://tern", 3.0, "reset"),
    Handover("frozen", "building"),
    Background("/var/tmp/report.json"),
    Phase("capture", 12345678901234),
    Note("trying again"),
    Planned("clone", 4711, "redis-server", Plan((Decision(HEAP, Treatment.EAGER, "default", "it is small"),))),
    Round(1, 2, 3, 4, 5, 6, 7, 8),
    Frozen(2700, {"eager": 900, "arm": 100}),
    Heat(2.0, {0x7FFFD0000000: 17}),
    Failure("TargetGone", "it ended", "process 1", "ptrace", 3, "Start it", (Obstacle("a", "b", "c", "d", True),)),
    Done(Report("clone", 1, 2, 3, 4, 5, {"arm": 1}, fault_us=FaultTimes(1.5, 2.5, 3.5), warnings=("slow",))),
    State(Progress("fill", 9, 8, 7), {"copy": Detail("copy", Histogram((0, 4, 2), 77), ((1, 2, 3),), (4096,), (1,))}),
]


def test_each_kind_is_among_the_samples() -> None:
    assert {type(message) for message in MESSAGES} == set(jobs.TYPES.values())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: object) -> None:
    assert decode(encode(message)) == message


@given(st.lists(st.integers(1, 400), max_size=80))
def test_frames_come_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"".join(frame(message) for message in MESSAGES)
    frames, found, at = Frames(), [], 0
    for cut in [*cuts, len(stream)]:
        found += frames.feed(stream[at : at + cut])
        at += cut
    assert found == MESSAGES


def framed(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


@pytest.mark.parametrize(
    "stream",
    [
        LENGTH.pack(FRAME_MOST + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        framed(b""),
        framed(b"\xc1"),
        framed(msgspec.msgpack.encode(["Elsewhere", {}])),
        framed(msgspec.msgpack.encode(["Report", {}])),
        framed(msgspec.msgpack.encode(["Job", {}])),
        framed(msgspec.msgpack.encode(["Job", {"verb": 7}])),
        framed(msgspec.msgpack.encode(["Phase", {"name": "look", "time_ns": "soon"}])),
        framed(msgspec.msgpack.encode({"name": "Cancel"})),
        framed(encode(Cancel()) + b"\x00"),
        framed(encode(Note("a sentence"))[:-1]),
    ],
)
def test_what_is_not_ours_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError):
        Frames().feed(stream)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert type(decode(data)) in jobs.TYPES.values()


@pytest.mark.parametrize(
    "error",
    [
        TargetGone("it ended", subject="process 7", syscall="ptrace", errno=3, cure="Start it again"),
        Unsupported("it holds state", [Obstacle("io_uring", "descriptor 3", "no", "do")], subject="process 7"),
        DestinationRefused("cannot take it", [Obstacle("memory", "here", "too little", "free some")]),
        TuimigError("plain"),
    ],
)
def test_errors_arrive_as_they_were(error: TuimigError) -> None:
    made = error_of(decode(encode(failure_of(error))))
    assert (type(made), str(made), made.exit_code) == (type(error), str(error), error.exit_code)
    if isinstance(error, Unsupported):
        assert isinstance(made, Unsupported)
        assert made.obstacles == error.obstacles


def test_an_error_of_a_kind_that_is_not_ours_is_an_error_all_the_same() -> None:
    for kind in ("Nonsense", "Obstacle", "os", "Sequence"):
        made = error_of(Failure(kind, "it went wrong", "process 1", "", 0, ""))
        assert isinstance(made, TuimigError), kind
        assert str(made) == "process 1: it went wrong"
