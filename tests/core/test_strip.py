"""The strip: every address of a region with content belongs to one cell, in address order, nobody is left out."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tuimig.core.model import PAGE, Decision, Kind, Region, Treatment
from tuimig.core.strip import CELLS, layout, used

TREATMENTS = list(Treatment)


@st.composite
def decisions(draw: st.DrawFn) -> list[Decision]:
    address, made = PAGE, []
    for gap, pages, share, swap, treatment in draw(
        st.lists(
            st.tuples(
                st.integers(0, 3),
                st.integers(1, 1 << 22),
                st.floats(0, 1),
                st.integers(0, 9),
                st.sampled_from(TREATMENTS),
            ),
            max_size=60,
        )
    ):
        start = address + gap * PAGE
        address = start + pages * PAGE
        held = int(pages * share) * PAGE
        region = Region(start, address, "rw-p", 0, "00:00", 0, "", Kind.ANON, rss=held, swap=swap * PAGE)
        made.append(Decision(region, treatment, "", ""))
    return made


@given(decisions(), st.sampled_from([1, 7, 80, CELLS]))
def test_layout(given_decisions: list[Decision], cells: int) -> None:
    spans = layout(given_decisions, cells)
    shown = [d for d in given_decisions if d.treatment is not Treatment.NONE]
    assert [span.cell for span in spans] == sorted(span.cell for span in spans)
    assert all(0 <= span.cell < cells for span in spans)
    assert set(range(used(spans))) == {span.cell for span in spans}, "no cell is skipped"
    for decision in shown:
        mine = [s for s in spans if given_decisions[s.region] is decision]
        assert mine, "a region without a cell"
        assert mine[0].start == decision.region.start
        assert mine[-1].end == decision.region.end
        assert all(a.end == b.start for a, b in pairwise(mine))
        assert all(s.start < s.end and s.start % PAGE == 0 for s in mine)
    assert len({s.region for s in spans}) == len(shown)


def test_many_regions_share_cells_and_nothing_has_none() -> None:
    many = [
        Decision(
            Region(n * PAGE, (n + 1) * PAGE, "rw-p", 0, "00:00", 0, "", Kind.ANON, rss=PAGE), Treatment.EAGER, "", ""
        )
        for n in range(10_000)
    ]
    spans = layout(many)
    assert (len(spans), used(spans)) == (10_000, CELLS)
    assert layout([]) == ()
    assert used(()) == 0


def test_content_decides_the_width_but_hides_nobody() -> None:
    def decision(start: int, size: int) -> Decision:
        region = Region(start, start + size, "rw-p", 0, "00:00", 0, "", Kind.ANON, rss=size)
        return Decision(region, Treatment.PROTECTED, "", "")

    small, large = decision(0, 16 * PAGE), decision(1 << 40, 4 << 30)
    spans = layout([small, large])
    assert used(spans) == CELLS
    widths = [sum(1 for s in spans if s.region == index) for index in (0, 1)]
    assert 1 <= widths[0] <= 16
    assert widths[1] > widths[0]
