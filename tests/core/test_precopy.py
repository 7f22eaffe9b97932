"""When pre-copy ends, and how: the rule alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tuimig.core.model import Round
from tuimig.core.precopy import PAGE_NS, Ending, Wish, directly_written, ending, expected, pause_s
from tuimig.core.state.base import Descriptor

AUTO = Wish.of("auto", None)
BUDGET = AUTO.budget_pages


def rounds(*dirty: int, hot: int = 0, since_us: int = 1_000_000) -> list[Round]:
    """The first is the one that copies everything."""
    return [Round(n, pages, pages, hot if n else 0, 0, since_us if n else 0, 100, 10) for n, pages in enumerate(dirty)]


def ends(made: list[Round], wish: Wish) -> Iterator[Ending | None]:
    return (ending(made[:n], wish) for n in range(len(made) + 1))


def test_an_idle_process_ends_in_the_freeze_after_two_rounds() -> None:
    *before, last = ends(rounds(50_000, 0), AUTO)
    assert before == [None, None]
    assert last is not None
    assert last.how == "freeze"


def test_the_first_round_never_ends_it_although_it_finds_nothing() -> None:
    assert ending(rounds(0), AUTO) is None


def test_as_long_as_it_shrinks_it_goes_on() -> None:
    *before, last = ends(rounds(10**6, 400_000, 160_000, 60_000, 20_000, BUDGET // 2, since_us=10_000_000), AUTO)
    assert before == [None] * 6
    assert last is not None
    assert last.how == "freeze"


def test_what_does_not_shrink_ends_in_the_window() -> None:
    *before, last = ends(rounds(10**5, 30_000, 29_000, 30_000, 31_000), AUTO)
    assert not any(before)
    assert last is not None
    assert (last.how, "no longer shrinks" in last.why) == ("window", True)


def test_who_writes_everything_is_not_copied_again_and_again() -> None:
    *before, last = ends(rounds(10**5, 95_000, 90_000), AUTO)
    assert not any(before)
    assert last is not None
    assert (last.how, "no longer shrinks" in last.why) == ("window", True)
    assert ending(rounds(10**5, 95_000, 70_000), AUTO) is None, "it shrinks"
    assert ending(rounds(20_000, 16_000, 13_000), AUTO) is None
    assert ending(rounds(10_000, 30_000, 29_000), AUTO) is not None
    assert ending(rounds(10_000, 30_000), AUTO) is None, "what is new was not copied before"


def test_hot_pages_count_as_dirty_although_a_round_left_them_out() -> None:
    assert ending(rounds(10**5, 10, hot=BUDGET + 1), AUTO) is None
    assert expected(rounds(10**5, 10, hot=77)) == 77


def test_a_quiet_moment_does_not_deceive() -> None:
    """50,000 pages in 50 ms before it: in the time to T0 more than fits is written."""
    made = rounds(10**5, 50_000, 0, since_us=50_000)
    assert ending(made, AUTO) is None


def test_a_missed_freeze_is_not_tried_again() -> None:
    end = ending(rounds(10**5, 0), Wish.of("auto", None, missed=True))
    assert end is not None
    assert end.how == "window"


@pytest.mark.parametrize(("dirty", "how"), [((100, 5), "freeze"), ((10**5, 10**5), "window")])
def test_a_number_of_rounds_is_kept_to(dirty: tuple[int, ...], how: str) -> None:
    wish = Wish.of("3", None)
    made = rounds(*dirty, dirty[-1])
    assert not any(list(ends(made, wish))[:-1])
    end = ending(made, wish)
    assert end is not None
    assert end.how == how


def test_one_round_says_nothing_of_what_is_written() -> None:
    end = ending(rounds(500), Wish.of("1", None))
    assert end is not None
    assert end.how == "window"


def test_the_budget_is_in_pages() -> None:
    assert Wish.of("auto", 10.0).budget_pages == int(10e6 / PAGE_NS)
    assert Wish.of("off", None).rounds == 0


def test_a_writer_is_given_time() -> None:
    """Each page costs a fault of about a microsecond: 100,000 in half a second are a fifth of it."""
    busy = Round(1, 100_000, 100_000, 0, 0, 500_000, 1000, 10)
    assert pause_s(busy, 100.0) == 0.0
    assert 0.4 < pause_s(busy, 12.0) < 0.5
    assert pause_s(Round(0, 10**6, 10**6, 0, 0, 0, 10**6, 10), 1.0) == 0.0


def test_direct_input_is_seen_and_packets_are_not_taken_for_it() -> None:
    direct = f"flags:\t0{os.O_DIRECT:o}\n"
    assert "descriptor 7" in directly_written({7: Descriptor(7, "/data", direct, 7)})
    assert directly_written({7: Descriptor(7, "pipe:[1]", direct, 7), 8: Descriptor(8, "/x", "flags:\t02\n", 8)}) == ""
