"""The board: what is read is what was written, whole and in order, however the two sides interleave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuimig.core import board as boards
from tuimig.core.board import RECORDS, STATE_MOST, Board
from tuimig.core.model import RECORD, Fault, FaultKind, decode_faults, encode_fault

# Writes states that are one byte repeated, their length known from the byte, and records numbered from 0, until killed.
WRITER = """
import sys
from tuimig.core.board import Board
from tuimig.core.model import RECORD
board = Board(int(sys.argv[1]))
number, turn = 0, 0
while True:
    turn += 1
    byte = turn % 251
    board.show(bytes([byte]) * (1000 + byte))
    count = 1 + turn % 700
    board.log(b"".join(RECORD.pack(n, n, n % 1000, 1, 0, 1, 1) for n in range(number, number + count)))
    number += count
"""


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create()
    yield made
    made.close()


def record(number: int) -> bytes:
    return encode_fault(Fault(number, 7, number * 4096, 0, FaultKind.WP, 1500, 1))


def numbers(records: bytes) -> list[int]:
    return [fault.time_ns for fault in decode_faults(records)]


def test_a_state_is_returned_once_and_the_latest_one(board: Board) -> None:
    other = Board(os.dup(board.fd))
    try:
        assert board.state() is None
        other.show(b"first")
        other.show(b"second, longer")
        assert board.state() == b"second, longer"
        assert board.state() is None
        other.show(b"x")
        assert board.state() == b"x"
        other.show(b"y" * (STATE_MOST + 1))
        assert board.state() is None
        other.show(b"z" * STATE_MOST)
        assert board.state() == b"z" * STATE_MOST
    finally:
        other.close()


def test_a_state_that_is_being_written_is_not_returned(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is called at each store of the writer."""
    other = Board(os.dup(board.fd))
    put, seen = Board._put, []

    def watched(self: Board, at: int, value: int) -> None:
        put(self, at, value)
        seen.append(board.state())

    other.show(b"old" * 100)
    assert board.state() == b"old" * 100
    monkeypatch.setattr(Board, "_put", watched)
    other.show(b"new" * 50)
    other.close()
    assert seen == [None, None, b"new" * 50]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_records_come_in_order_and_the_missing_ones_are_counted(steps: list[tuple[bool, int]]) -> None:
    """On a ring of 32, so that it wraps and overruns: each record is read once, or counted as missed once."""
    before = boards.RECORDS, boards.SIZE
    boards.RECORDS, boards.SIZE = 32, boards._RING + 32 * RECORD.size
    board = Board.create()
    try:
        written = told = 0
        for write, count in [*steps, (False, 0)]:
            if write:
                board.log(b"".join(record(n) for n in range(written, written + count)))
                written += count
                continue
            batch = board.batch()
            told += batch.missed
            assert numbers(batch.records) == list(range(told, written))
            assert batch.missed == 0 or len(batch.records) // RECORD.size == 24, "as much as is safe to read"
            told = written
    finally:
        board.close()
        boards.RECORDS, boards.SIZE = before


def test_what_was_logged_before_it_was_opened_is_not_read(board: Board) -> None:
    board.log(record(1) * 10)
    late = Board(os.dup(board.fd))
    try:
        assert numbers(late.batch().records) == []
        board.log(record(2))
        assert numbers(late.batch().records) == [2]
    finally:
        late.close()


def test_the_whole_ring_wraps(board: Board) -> None:
    block = b"".join(record(n) for n in range(RECORDS // 2 + 5))
    for _ in range(3):
        board.log(block)
        batch = board.batch()
        assert (batch.records, batch.missed) == (block, 0)
    board.log(block * 2)
    batch = board.batch()
    assert batch.missed == 2 * (RECORDS // 2 + 5) - RECORDS * 3 // 4
    assert numbers(batch.records)[-1] == RECORDS // 2 + 4


def test_records_overwritten_while_they_are_copied_are_missed(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer comes round while the reader copies, also with records that it has not announced yet."""
    other = Board(os.dup(board.fd))
    slots, put = Board._slots, Board._put
    count = RECORDS * 3 // 4
    block = b"".join(record(n) for n in range(2 * count))

    def slow(self: Board, first: int, last: int) -> bytes:
        other.log(block[count * RECORD.size : -RECORD.size * 100])
        with monkeypatch.context() as patch:  # the writer stands still before it tells of the last hundred
            patch.setattr(Board, "_put", lambda self, at, value: put(self, at, value) if at != boards._HEAD else None)
            other.log(block[-RECORD.size * 100 :])
        return slots(self, first, last)

    other.log(block[: count * RECORD.size])
    with monkeypatch.context() as patch:
        patch.setattr(Board, "_slots", slow)
        batch = board.batch()
    other.close()
    missed = 2 * count - RECORDS
    assert batch.missed == missed
    assert numbers(batch.records) == list(range(missed, count))


def test_a_writer_in_another_process_is_never_seen_half_way(board: Board) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(board.fd)], pass_fds=[board.fd])
    try:
        states = told = 0
        while told < 100_000 or states < 20:
            assert writer.poll() is None
            state = board.state()
            if state is not None:
                states += 1
                assert state == bytes([state[0]]) * (1000 + state[0])
            batch = board.batch()
            found = numbers(batch.records)
            first = told + batch.missed
            in_order = found == list(range(first, first + len(found)))
            assert in_order, f"{len(found)} records from {found[:1]}, not from {first}"
            told = first + len(found)
    finally:
        writer.kill()
        writer.wait()
