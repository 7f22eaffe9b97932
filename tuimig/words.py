"""Figures and names as a person reads them; shared by the command line's tables and the console. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tuimig.core.model import Precopy, Report, Round

FIRST_ROUNDS: Final = 3  # that are told one by one; of many, these and the last ones
LAST_ROUNDS: Final = 6


def size(count: int | float) -> str:
    """Bytes, three digits: `1.02 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def short_size(count: int | float) -> str:
    """Bytes in at most five columns: `1.02G`."""
    value = float(count)
    for unit in ("B", "K", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}" if unit == "B" or value >= 100 else f"{value:.3g}{unit}"
        value /= 1024
    return f"{value:.3g}T"


def duration(microseconds: int | float) -> str:
    if microseconds < 999.5:
        return f"{microseconds:.0f} us"
    return f"{three(microseconds / 1000)} ms" if microseconds < 999_500 else f"{three(microseconds / 1e6)} s"


def three(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time a person waits: `0.4 s`, `2:07`."""
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60}:{int(value) % 60:02d}"


def age(value: float) -> str:
    """How long ago: `12 s`, `5 min`, `3 h`, `8 days`."""
    for most, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if value < most:
            return f"{value // length:.0f} {unit}"
    return f"{value // 86_400:.0f} days"


def count(value: int) -> str:
    """`12,345`; from a million on three digits: `1.23M`."""
    return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:.3g}M" if value < 1e9 else f"{value / 1e9:.3g}G"


def plural(number: int, noun: str) -> str:
    """`1 region`, `3 regions`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{count(number)} {noun}{ending}"


def safe(text: object) -> str:
    """Text of another process without anything a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def cut(text: str, width: int) -> str:
    """At most `width` characters; what is cut shows by the last one."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def cut_left(text: str, width: int) -> str:
    """The same for paths, whose end tells more."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def rounds(of: Precopy) -> str:
    """How pre-copy went: `2 rounds, ended in the freeze: 3 dirty pages fit the freeze`."""
    if not of.rounds:
        return f"none: {of.why}"
    return f"{plural(len(of.rounds), 'round')}, ended in the {of.ended}: {of.why}"


def each_round(of: Precopy) -> Iterator[tuple[str, str]]:
    """A line a round, by its number; of many the first and the last ones."""
    left_out = len(of.rounds) - FIRST_ROUNDS - LAST_ROUNDS
    for at, one in enumerate(of.rounds):
        if left_out > 1 and at == FIRST_ROUNDS:
            yield "...", f"{count(left_out)} more"
        if left_out <= 1 or not FIRST_ROUNDS <= at < FIRST_ROUNDS + left_out:
            yield f"round {one.number}", _round(one)


def _round(one: Round) -> str:
    """`copied 120 of 150 dirty pages, 12,000 dirtied/s, took 3 ms`."""
    kind = "dirty pages" if one.number else "pages"
    rate = f", {count(round(one.dirty_per_second))} dirtied/s" if one.number else ""
    return (
        f"copied {count(one.copied_pages)} of {count(one.dirty_pages)} {kind}{rate}, took {duration(one.duration_us)}"
    )


def streams(stream_bytes: Sequence[int]) -> str:
    """`2 streams and one for demands`: the first one is never for pages in the background."""
    return f"{plural(max(0, len(stream_bytes) - 1), 'stream')} and one for demands"


def until_running(of: Report) -> str:
    """What the time until the copy runs is called: only a move's source stands still that long."""
    return "downtime" if of.verb == "move" else "runs after"
