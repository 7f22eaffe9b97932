"""Recordings: what is kept, how much of it, what is hidden; and that no file does more than make us complain."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from harness import recordings
from harness.recordings import HEAP, SECRET, Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from tuimig.core.errors import CaptureLost, TuimigError, UsageError
from tuimig.core.model import RECORD, Connection, Detail, Fault, FaultKind, Faults, Note, Phase, Planned, Progress
from tuimig.core.player import Player
from tuimig.core.record import (
    CHUNK,
    FAULTS_A_SECOND,
    LENGTH,
    MAGIC,
    MOST_BYTES,
    PICTURES_A_SECOND,
    FileSink,
    LeftOut,
    Outcome,
    Record,
    Recorder,
)
from tuimig.core.recording import Collector, Recording, RecordingDamaged, load, parse
from tuimig.core.summary import summarize
from tuimig.page import page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recordings.write(tmp_path_factory.mktemp("rec") / "clone.rec").read_bytes()


def test_all_comes_back_in_order(tmp_path: Path) -> None:
    recording = load(recordings.write(tmp_path / "a.rec"))
    told = [timed.record for timed in recording.records]
    assert told[:-1] == list(recordings.events(Clock()))
    assert recording.report == recordings.report()
    assert recording.complete
    assert not recording.cut
    assert not recording.header.redacted
    times = [timed.time_us for timed in recording.records]
    assert times == sorted(times)
    assert recording.duration_us == times[-1] == 1000 + 2 * 41_000 + 3000 + 8000 + 1000 + 5000


def test_the_file_is_private(tmp_path: Path) -> None:
    assert recordings.write(tmp_path / "a.rec").stat().st_mode & 0o777 == 0o600


def test_what_failed_is_recorded(tmp_path: Path) -> None:
    with FileSink(tmp_path / "a.rec") as sink:
        Recorder(sink, clock=Clock()).error(
            CaptureLost("a page was lost", subject="process 1", errno=14, syscall="read")
        )
    recording = load(tmp_path / "a.rec")
    assert recording.complete
    assert recording.report is None
    assert recording.failure is not None
    assert (recording.failure.kind, recording.failure.what) == ("CaptureLost", "a page was lost")


# ---------------------------------------------------------------- how much is kept


def collected(clock: Clock) -> tuple[Recorder, Collector]:
    sink = Collector()
    return Recorder(sink, clock=clock), sink


def kinds(sink: Collector, kind: type[Record]) -> list[Record]:
    return [timed.record for timed in sink.recording().records if isinstance(timed.record, kind)]


def test_above_the_rate_faults_are_sampled_and_counted() -> None:
    clock = Clock()
    recorder, sink = collected(clock)
    came = 0
    for _ in range(40):  # two seconds, ten times the rate
        now = clock.after(50)
        batch = Faults.of(recordings.fault(now, n) for n in range(FAULTS_A_SECOND // 2))
        came += len(batch)
        recorder(batch)
    kept = sum(len(batch) for batch in kinds(sink, Faults))  # type: ignore[arg-type]
    left_out = sum(record.faults for record in kinds(sink, LeftOut))  # type: ignore[union-attr]
    assert kept + left_out == came
    assert FAULTS_A_SECOND * 2 <= kept <= FAULTS_A_SECOND * 3 + 40
    one = [fault.address for fault in kinds(sink, Faults)[-1].faults]  # type: ignore[union-attr]
    assert one[0] == HEAP
    assert one[-1] > HEAP + 4096 * FAULTS_A_SECOND // 4  # spread over the batch, not its beginning


def test_below_the_rate_nothing_is_left_out() -> None:
    clock = Clock()
    recorder, sink = collected(clock)
    for _ in range(100):
        recorder(Faults.of(recordings.fault(clock.after(10), n) for n in range(FAULTS_A_SECOND // 100)))
    assert kinds(sink, LeftOut) == []
    assert sum(len(batch) for batch in kinds(sink, Faults)) == FAULTS_A_SECOND // 100 * 100  # type: ignore[arg-type]


def test_counters_are_thinned_but_the_last_of_a_phase_is_there() -> None:
    clock = Clock()
    recorder, sink = collected(clock)
    for done in range(1000):
        clock.after(1)
        recorder(Progress("capture", 1000, done + 1))
    recorder(Phase("commit", clock.after(1)))
    kept = kinds(sink, Progress)
    assert len(kept) <= 2 * PICTURES_A_SECOND + 1
    assert kept[-1] == Progress("capture", 1000, 1000)


def test_a_large_file_keeps_phases_and_the_report() -> None:
    clock = Clock()
    recorder, sink = collected(clock)
    recorder._bytes = MOST_BYTES + 1
    clock.after(1000)
    recorder(Faults.of([recordings.fault(clock.now, 1)]))
    recorder(Detail("copy"))
    recorder(Progress("capture", 10, 5))
    recorder(Phase("commit", clock.now))
    recorder.report(recordings.report())
    assert [type(timed.record) for timed in sink.recording().records] == [LeftOut, Progress, Phase, Outcome]


def test_a_full_disk_does_not_stop_the_migration() -> None:
    with FileSink(Path("/dev/full")) as sink:
        recorder = Recorder(sink, clock=Clock())
        recorder(Phase("look", 1))
    assert sink.broken == "/dev/full: No space left on device"


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write a recording there"):
        FileSink(tmp_path / "missing" / "a.rec")


# ---------------------------------------------------------------- what is hidden


def test_redacted_recordings_hold_no_names(tmp_path: Path) -> None:
    path = recordings.write(tmp_path / "a.rec", redact=True)
    assert SECRET.encode() in recordings.text_of(recordings.write(tmp_path / "b.rec"))
    assert SECRET.encode() not in recordings.text_of(path)
    recording = load(path)
    assert recording.header.redacted
    told = [timed.record for timed in recording.records]
    assert Note("(hidden); trying again, under system call stops") in told
    [planned] = [record for record in told if isinstance(record, Planned)]
    assert [d.region.path for d in planned.plan.decisions] == ["[heap]", "file 1", "[stack]"]
    assert [d.rule for d in planned.plan.decisions] == ["default", "(hidden)", "eager-below (default)"]
    assert SECRET not in page(summarize(recording), recording.header)


def test_the_other_host_is_hidden_too() -> None:
    sink = Collector()
    recorder = Recorder(sink, redact=True, clock=Clock())
    recorder(Connection("lost", f"ssh://{SECRET}", 2.0, f"{SECRET} does not answer"))
    recorder.report(replace(recordings.report(), destination=f"ssh://{SECRET}"))
    told = [timed.record for timed in sink.recording().records]
    assert told[0] == Connection("lost", "(hidden)", 2.0)
    assert SECRET not in str(told)


# ---------------------------------------------------------------- damage


def test_a_foreign_file(tmp_path: Path) -> None:
    foreign = tmp_path / "a.rec"
    for data in (b"", b"x", b"\x7fELF" + bytes(100), MAGIC):
        foreign.write_bytes(data)
        with pytest.raises(UsageError, match="not a recording of tuimig"):
            load(foreign)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "b.rec")
    with pytest.raises(RecordingDamaged, match=r"format '2', and this tuimig reads format 1"):
        parse(MAGIC + b"2\n", "later")


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 28))
    with pytest.raises(RecordingDamaged, match="longer than a chunk"):
        parse(MAGIC + b"1\n" + CHUNK.pack(len(bomb), zlib.crc32(bomb)) + bomb, "bomb")
    with pytest.raises(RecordingDamaged, match="a chunk of 4294967295 bytes"):
        parse(MAGIC + b"1\n" + CHUNK.pack(0xFFFFFFFF, 0) + b"x", "long")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_crash_leaves_what_was_written(whole: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(len(MAGIC) + 2, len(whole) - 1))
    try:
        recording = parse(whole[:length], "cut")
    except RecordingDamaged as error:
        assert "has no header" in str(error)  # noqa: PT017
        return
    complete = parse(whole, "whole")
    assert recording.records == complete.records[: len(recording.records)]
    assert not recording.complete
    summary = summarize(recording)
    assert summary.report.warnings[0].startswith("it has no end")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_a_shorter_recording(whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole) * 8 - 1))
    flipped = bytearray(whole)
    flipped[at // 8] ^= 1 << at % 8
    try:
        recording = parse(bytes(flipped), "flipped")
    except TuimigError:
        return
    assert recording.cut
    complete = parse(whole, "whole")
    assert recording.records == complete.records[: len(recording.records)]


def chunked(records: list[bytes]) -> bytes:
    deflated = zlib.compress(b"".join(LENGTH.pack(len(record)) + record for record in records))
    return MAGIC + b"1\n" + CHUNK.pack(len(deflated), zlib.crc32(deflated)) + deflated


def raw(data: bytes) -> list[bytes]:
    """The records of a recording, undecoded."""
    found, at = [], len(MAGIC) + 2
    while at < len(data):
        length, _ = CHUNK.unpack_from(data, at)
        chunk = zlib.decompress(data[at + CHUNK.size : at + CHUNK.size + length])
        at += CHUNK.size + length
        inside = 0
        while inside < len(chunk):
            (size,) = LENGTH.unpack_from(chunk, inside)
            found.append(chunk[inside + LENGTH.size : inside + LENGTH.size + size])
            inside += LENGTH.size + size
    return found


def use(recording: Recording) -> None:
    """All that is ever done with one."""
    player = Player(recording, clock=Clock())
    for _ in range(5):
        player.step_phase()
        player.poll()
    player.jump(player.duration_us)
    player.poll()
    summary = summarize(recording)
    page(summary, recording.header)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_records_that_were_made_up(whole: bytes, data: st.DataObject) -> None:
    """The checksums are right and the content is not: somebody means it."""
    records = raw(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(records) - 1))
        record = bytearray(records[index])
        at = data.draw(st.integers(0, len(record) - 1))
        record[at] = data.draw(st.integers(0, 255))
        records[index] = bytes(record)
    try:
        recording = parse(chunked(records), "made up")
    except TuimigError:
        return
    use(recording)


def test_each_record_is_checked(whole: bytes) -> None:
    records = raw(whole)
    for changed, words in (
        ([records[1]], "the header is not where it belongs"),
        ([records[0], records[0]], "the header is not where it belongs"),
        ([records[0], records[9], records[1]], "time runs backwards"),
        ([records[0], records[-1], records[-1]], "records after the end"),
        ([records[0], b"\x93\x00\xa1x\x00"], "no such record"),
        ([records[0], b"\x00"], "makes no sense"),
        ([b""], "longer than its chunk"),
    ):
        with pytest.raises(RecordingDamaged, match=words):
            parse(chunked(changed), "changed")
    whole_fault = RECORD.pack(1, 2, 3, 4, 5, 6, 7)
    assert len(whole_fault) == RECORD.size
    for records_of, words in ((whole_fault, "a fault of no kind"), (whole_fault[1:], "half a fault")):
        sink = Collector()
        Recorder(sink, clock=Clock())(Faults(whole_fault))
        from tuimig.core.record import encode

        with pytest.raises(RecordingDamaged, match=words):
            parse(chunked([records[0], encode(0, Faults(records_of))[LENGTH.size :]]), "faults")


# ---------------------------------------------------------------- what it comes to


def test_the_summary(whole: bytes) -> None:
    summary = summarize(parse(whole, "whole"))
    assert summary.report == recordings.report()
    assert [span.name for span in summary.phases] == [
        "look",
        *["attach", "freeze", "capture"] * 2,
        "restore",
        "fill",
    ]
    assert summary.phases[0].begin_us == 0
    assert [span.duration_us for span in summary.phases][:4] == [5000, 2000, 4000, 35_000]
    assert summary.histograms["source"].count == 30
    assert summary.histograms["copy"].count == 3
    assert summary.recorded_faults == 63
    assert summary.region_faults == {0: 63}
    assert sum(summary.heat.counts[FaultKind.WP].values()) == 60
    assert sum(summary.heat.counts[FaultKind.MISSING].values()) == 3
    assert len(summary.notes) == 1


def test_the_totals_of_half_a_recording(tmp_path: Path) -> None:
    summary = summarize(load(recordings.write(tmp_path / "a.rec", end=False)))
    report = summary.report
    assert not summary.complete
    assert (report.verb, report.pid, report.frozen_us, report.wp_faults, report.demand_faults) == (
        "clone",
        4711,
        3100,
        30,
        3,
    )
    assert report.warnings == ("it has no end: what is here stops in the phase fill",)


def test_faults_outside_of_the_plan_are_counted_only(whole: bytes) -> None:
    clock = Clock()
    recorder, sink = collected(clock)
    recorder(Phase("look", clock.now))
    recorder(Planned("clone", 1, "x", recordings.plan()))
    recorder(Faults.of([Fault(clock.now, 1, HEAP - 4096, -1, FaultKind.WP, 1, 1)]))
    summary = summarize(sink.recording())
    assert summary.recorded_faults == 1
    assert summary.region_faults == {}
