"""The policy: which rule decides, how files are read and written, what the engine is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuimig.core import policy
from tuimig.core.errors import UsageError
from tuimig.core.model import Kind, Region, Treatment
from tuimig.core.policy import Policy, Rule

MIB = 1 << 20
EAGER, PROTECTED, NONE = Treatment.EAGER, Treatment.PROTECTED, Treatment.NONE


def region(
    kind: Kind = Kind.ANON, size: int = 4 * MIB, start: int = 0x7F0000000000, path: str = "", flags: str = ""
) -> Region:
    perms = "rw-s" if kind in (Kind.SHARED_ANON, Kind.SHARED_FILE) else "rw-p"
    return Region(start, start + size, perms, 0, "00:00", 0, path, kind, flags=frozenset(flags.split()))


@pytest.mark.parametrize(
    ("kind", "flags", "treatment"),
    [
        (Kind.KERNEL, "", NONE),
        (Kind.DEVICE, "", NONE),
        (Kind.SHARED_FILE, "", NONE),
        (Kind.SHARED_ANON, "", EAGER),
        (Kind.FILE, "", EAGER),
        (Kind.DELETED, "", EAGER),
        (Kind.ANON, "rd wr mg", EAGER),
        (Kind.ANON, "um", EAGER),
        (Kind.ANON, "dp", EAGER),
    ],
)
def test_what_cannot_be_protected_is_not_whatever_anybody_says(kind: Kind, flags: str, treatment: Treatment) -> None:
    target = region(kind, flags=flags)
    everything = Policy(0, (Rule("0-ffffffffffffffff", PROTECTED, "--protect"),)).with_key(target, PROTECTED)
    decision = everything.decide(target)
    assert (decision.treatment, decision.rule) == (treatment, "cannot be protected")
    assert decision.why


def test_order_of_the_rules() -> None:
    heap = region(Kind.HEAP, path="[heap]")
    file_rules = policy.parse('[[rule]]\nmatch = "heap"\ntreatment = "protected"\n', "p.toml").rules
    assert Policy(8 * MIB).decide(heap).rule == "eager-below (default)"
    assert Policy().decide(heap) == policy.Decision(heap, PROTECTED, "default", Policy().decide(heap).why)
    assert Policy(8 * MIB, file_rules).decide(heap).rule == "p.toml:1"
    both = Policy(8 * MIB, (Rule("heap", EAGER, "--eager heap"), *file_rules))
    assert (both.decide(heap).treatment, both.decide(heap).rule) == (EAGER, "--eager heap")
    ranged = Policy(8 * MIB, (*both.rules, Rule(f"{heap.start:x}-{heap.end:x}", PROTECTED, "--protect range")))
    assert ranged.decide(heap).rule == "--protect range"
    keyed = ranged.with_key(heap, EAGER)
    assert (keyed.decide(heap).treatment, keyed.decide(heap).rule) == (EAGER, "key")
    assert keyed.with_key(heap, None).decide(heap).rule == "--protect range"


def test_a_size_at_the_threshold_is_protected() -> None:
    assert Policy(MIB).decide(region(size=MIB - 4096)).treatment is EAGER
    assert Policy(MIB).decide(region(size=MIB)).treatment is PROTECTED


def test_names_and_globs() -> None:
    named = region(path="[anon:jit code]")
    assert Policy(0, (Rule("[[]anon:jit*", EAGER, "x"),)).decide(named).rule == "x"
    assert Policy(0, (Rule("*jit*", EAGER, "x"),)).decide(named).rule == "x"
    assert Policy(0, (Rule("stack", EAGER, "x"),)).decide(named).rule == "default"
    assert Policy(0, (Rule("anon", EAGER, "x"),)).decide(named).rule == "x"


def test_a_range_speaks_of_every_region_it_overlaps() -> None:
    target = region(start=0x10000, size=0x10000)
    for text, hit in (("0-10000", False), ("0-10001", True), ("1ffff-30000", True), ("20000-30000", False)):
        decided = Policy(0, (Rule(text, EAGER, "r"),)).decide(target)
        assert (decided.rule == "r") is hit, text
    assert Rule("0x10000-0x20000", EAGER, "r").range == (0x10000, 0x20000)


@pytest.mark.parametrize("text", ["20000-10000", "5-5", ""])
def test_a_rule_that_can_match_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Rule(text, EAGER, "r")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("64KiB", 65536),
        ("1MiB", MIB),
        ("1.5M", 3 * MIB // 2),
        ("2G", 2 << 30),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert policy.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1Q", "1 MB of it", "0x10", "1e3"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        policy.parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_sizes_round_trip(size: int) -> None:
    assert policy.parse_size(policy.format_size(size)) == size


rules = st.builds(
    Rule,
    st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: policy._RANGE.match(text) is None),
    st.sampled_from([EAGER, PROTECTED]),
    st.just("r"),
)


@given(st.integers(min_value=0, max_value=1 << 40), st.lists(rules, max_size=6))
def test_files_round_trip(below: int, made: list[Rule]) -> None:
    original = Policy(below, tuple(made))
    again = policy.parse(policy.dump(original), "p.toml")
    assert again.eager_below == below
    assert [(r.match, r.treatment) for r in again.rules] == [(r.match, r.treatment) for r in made]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("eager_blow = 4096\n", "p.toml:1: unknown key 'eager_blow'"),
        ("\n\neager_below = true\n", "p.toml:3: eager_below has the wrong type"),
        ('eager_below = "a lot"\n', "p.toml:1: not a size"),
        ('[[rule]]\nmatch = "heap"\n', "p.toml:1: a rule needs both"),
        ('[[rule]]\nmatch="a"\ntreatment="eager"\n\n[[rule]]\nmatch="b"\ntreatment="keep"\n', "p.toml:7: no such"),
        ('[[rule]]\nmatch="a"\ntreatment="eager"\n[[rule]]\nmatch=1\ntreatment="eager"\n', "p.toml:5: match has"),
        ('[[rule]]\nmatch="a"\ntreatment="eager"\ncolour="red"\n', "p.toml:4: unknown key 'colour'"),
        ("[other]\nx = 1\n", "p.toml:1: unknown key 'other'"),
        ('eager_below = "1M"\n[[rule\n', "line 2"),
        ('[[rule]]\nmatch=""\ntreatment="eager"\n', "p.toml:1: a rule matches nothing"),
    ],
)
def test_a_bad_file_names_the_line(text: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy.parse(text, "p.toml")
    assert where in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        policy.load(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match=r"cannot read the policy file: Is a directory"):
        policy.load(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not text"):
        policy.load(tmp_path / "bad.toml")


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.sampled_from([EAGER, PROTECTED])), max_size=8)


@given(ranges)
def test_the_engine_gets_ranges_that_say_the_same(pieces: list[tuple[int, int, Treatment]]) -> None:
    """Ascending, without overlap, and at every address the first rule's word."""
    made = Policy(0, tuple(Rule(f"{start:x}-{start + size:x}", t, "r") for start, size, t in pieces))
    native = made.for_engine()
    assert all(a[1] <= b[0] for a, b in zip(native.ranges, native.ranges[1:], strict=False))
    for address in range(60):
        first = next((t for start, size, t in pieces if start <= address < start + size), None)
        found = next((t for start, end, t in native.ranges if start <= address < end), None)
        assert found is first


def test_the_engine_gets_the_first_rule_of_each_class() -> None:
    made = Policy(5, (Rule("heap", EAGER, "a"), Rule("heap", PROTECTED, "b"), Rule("anon", PROTECTED, "c")))
    native = made.for_engine()
    assert (native.eager_below, native.heap, native.stack, native.anon) == (5, EAGER, None, PROTECTED)


def test_a_plan_counts_bytes() -> None:
    plan = Policy(MIB).plan([region(size=4096), region(size=2 * MIB), region(Kind.KERNEL, 8192)])
    assert [plan.bytes(t) for t in (EAGER, PROTECTED, NONE)] == [4096, 2 * MIB, 8192]
