"""When pre-copy ends, and how: the rule over the rounds made so far. Knows nothing of how a round is made.

A round copies what was written since the one before. While that gets less, another round pays. It ends in the *freeze*
where what is dirty then fits the budget and is copied inside it, and in the *window* where it does not get less: then
the regions that are written most are armed at T0 and captured on write, as without pre-copy.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tuimig.core.model import Round
from tuimig.core.state.base import Descriptor

MISSED: Final = "pre-copy"  # where the engine says that too much was written at the end
ROUNDS_MOST: Final = 30  # of auto
SHRINKS: Final = 0.75  # a round that leaves more than this part of what the one before left brings nothing
PATIENCE: Final = 3  # such rounds in a row
EFFORT_MOST: Final = 1.5  # after so much of the largest round was copied again, one such round is enough
FAULT_US: Final = 1.1  # a write fault that the kernel resolves by itself, as its writer sees it
PAUSE_MOST_S: Final = 1.0
PAGE_NS: Final = 1500  # copying a scattered page inside the freeze
DEFAULT_BUDGET_MS: Final = 5.0
CLOSING_S: Final = 0.02  # between the last round and T0
SLACK: Final = 4  # what the freeze may hold at most, in budgets: the estimate is not the truth


@dataclass(frozen=True, slots=True)
class Wish:
    """`--precopy`: a number of rounds, as many as it takes (None), or 0 for none.

    `budget_pages`: what fits the freeze. `missed`: the freeze was tried, and more was written at its beginning.
    """

    rounds: int | None
    budget_pages: int
    missed: bool = False

    @classmethod
    def of(cls, text: str, budget_ms: float | None, *, missed: bool = False) -> Wish:
        rounds = {"auto": None, "off": 0}.get(text, int(text) if text.isdigit() else 0)
        budget = DEFAULT_BUDGET_MS if budget_ms is None else budget_ms
        return cls(rounds, max(64, int(budget * 1e6 / PAGE_NS)), missed)


@dataclass(frozen=True, slots=True)
class Ending:
    """`how`: freeze or window."""

    how: str
    why: str


def pause_s(last: Round, max_slowdown: float) -> float:
    """How long to wait before the pages of the last round are protected again: each costs its writer a fault."""
    if not last.number:
        return 0.0
    wanted = last.dirty_pages * FAULT_US / (max_slowdown / 100)
    return min(PAUSE_MOST_S, max(0.0, wanted - last.since_us) / 1e6)


def directly_written(descriptors: Mapping[int, Descriptor]) -> str:
    """What stands in the way of pre-copy; empty where nothing does.

    Data that a device writes into memory for a read of an O_DIRECT file causes no fault at the time it arrives. In a
    pipe the flag means packets.
    """
    for number, descriptor in descriptors.items():
        if descriptor.flags & os.O_DIRECT and not descriptor.link.startswith("pipe:"):
            return f"descriptor {number} is open with O_DIRECT: what is read by it changes memory without a fault"
    return ""


def expected(rounds: Sequence[Round]) -> int:
    """Pages that will be dirty at T0. The last round may have met a quiet moment, so the one before has a word too."""
    tail = rounds[1:][-2:]
    rate = max((r.dirty_per_second for r in tail), default=0.0)
    return max(int(rate * CLOSING_S), rounds[-1].dirty_pages, *(r.hot_pages for r in tail), 0)


def ending(rounds: Sequence[Round], wish: Wish) -> Ending | None:
    """None: another round."""
    if len(rounds) < 2:  # the first one copies everything and says nothing of what is written
        return None if wish.rounds != 1 or not rounds else _forced(rounds, wish)
    left = expected(rounds)
    if wish.rounds is not None:
        return _forced(rounds, wish) if len(rounds) >= wish.rounds else None
    if wish.missed:
        return Ending("window", "more than fits was written at the end of the attempt before")
    if left <= wish.budget_pages:
        return Ending("freeze", f"{left} dirty pages fit the freeze")
    if len(rounds) > ROUNDS_MOST:
        return Ending("window", f"{left} dirty pages are left after {len(rounds)} rounds")
    again = sum(r.copied_pages for r in rounds[1:])
    patience = 1 if again > EFFORT_MOST * max(r.copied_pages for r in rounds) else PATIENCE
    tail = rounds[1:][-patience - 1 :]
    if len(tail) > patience and all(_left(b) > SHRINKS * _left(a) for a, b in itertools.pairwise(tail)):
        return Ending("window", f"what is dirty no longer shrinks ({left} pages)")
    return None


def _forced(rounds: Sequence[Round], wish: Wish) -> Ending:
    left = expected(rounds)
    fits = len(rounds) > 1 and left <= wish.budget_pages and not wish.missed
    return Ending("freeze" if fits else "window", f"{len(rounds)} rounds were asked for; {left} pages are dirty")


def _left(of: Round) -> int:
    return max(of.dirty_pages, of.hot_pages)
