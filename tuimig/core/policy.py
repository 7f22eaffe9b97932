"""Which region is copied while the process is stopped (eager) and which is write-protected and captured afterwards.

Order, the first that speaks decides: what cannot be protected; a person's keys; rules by address range (options, then
the file's); rules by name (options, then the file's); the size threshold; protected.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tuimig.core.errors import UsageError
from tuimig.core.model import Decision, Kind, Plan, Region, Treatment

DEFAULT_EAGER_BELOW: Final = 1 << 20
CLASSES: Final = {"heap": Kind.HEAP, "stack": Kind.STACK, "anon": Kind.ANON}
TREATMENTS: Final = {"eager": Treatment.EAGER, "protected": Treatment.PROTECTED}
UNITS: Final = {"": 0, "B": 0, "K": 10, "KIB": 10, "M": 20, "MIB": 20, "G": 30, "GIB": 30, "T": 40, "TIB": 40}
OWN_USERFAULTFD: Final = frozenset({"um", "uw", "ui"})

_RANGE = re.compile(r"(?:0x)?([0-9a-fA-F]+)-(?:0x)?([0-9a-fA-F]+)\Z")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)\Z")


def parse_size(text: str) -> int:
    """Bytes of `4096`, `64K`, `1MiB`, `1.5G`; units are powers of 1024."""
    match = _SIZE.match(text.strip())
    if not match or match[2].upper() not in UNITS:
        raise UsageError(f"not a size: {text!r}", cure="Write it like 4096, 64K, 1MiB or 2G")
    scaled = float(match[1]) * (1 << UNITS[match[2].upper()])
    return int(match[1]) << UNITS[match[2].upper()] if match[1].isdigit() else int(scaled)


def format_size(size: int) -> str:
    """The shortest exact form that parse_size reads: `1MiB`, `4097`."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


@dataclass(frozen=True, slots=True)
class Rule:
    """`match`: address range in hex (`7f00-7fff`: every region it overlaps), `heap`, `stack`, `anon`, or a path glob.

    `source` is what `maps` names: `--eager heap`, `policy.toml:7`.
    """

    match: str
    treatment: Treatment
    source: str

    def __post_init__(self) -> None:
        if not self.match:
            raise UsageError("a rule matches nothing", subject=self.source, cure="Give a range, a name or a path glob")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise UsageError(f"an empty address range: {self.match}", subject=self.source)

    @property
    def range(self) -> tuple[int, int] | None:
        found = _RANGE.match(self.match)
        return (int(found[1], 16), int(found[2], 16)) if found else None

    def speaks_of(self, region: Region) -> bool:
        if self.range is not None:
            return self.range[0] < region.end and region.start < self.range[1]
        if self.match in CLASSES:
            return region.kind is CLASSES[self.match]
        return fnmatch.fnmatchcase(region.path, self.match)


@dataclass(frozen=True, slots=True)
class NativePolicy:
    """The part that the engine applies by itself, to regions that appear between the look and the freeze.

    Order: `ranges` (start, end, treatment; ascending, not overlapping), then the class's treatment (None: no rule),
    then `eager_below` bytes.
    """

    eager_below: int
    ranges: tuple[tuple[int, int, Treatment], ...]
    heap: Treatment | None
    stack: Treatment | None
    anon: Treatment | None


@dataclass(frozen=True, slots=True)
class Policy:
    """`keys` are a person's choices for exact regions; `rules` are in the order options, file."""

    eager_below: int = DEFAULT_EAGER_BELOW
    rules: tuple[Rule, ...] = ()
    keys: tuple[tuple[int, int, Treatment], ...] = ()
    below_source: str = "default"

    def with_key(self, region: Region, treatment: Treatment | None) -> Policy:
        """The policy after a person's choice for one region; None takes the choice back."""
        return self.with_keys((region,), treatment)

    def with_keys(self, regions: Iterable[Region], treatment: Treatment | None) -> Policy:
        """The same for several at once."""
        places = dict.fromkeys((region.start, region.end) for region in regions)
        kept = tuple(key for key in self.keys if key[:2] not in places)
        added = () if treatment is None else tuple((start, end, treatment) for start, end in places)
        return replace(self, keys=(*kept, *added))

    def decide(self, region: Region) -> Decision:
        return self._decide(region, self._chosen())

    def _chosen(self) -> dict[tuple[int, int], Treatment]:
        return {(start, end): treatment for start, end, treatment in self.keys}

    def _decide(self, region: Region, chosen: Mapping[tuple[int, int], Treatment]) -> Decision:
        fixed = _fixed(region)
        if fixed is not None:
            return Decision(region, fixed[0], "cannot be protected", fixed[1])
        own = chosen.get((region.start, region.end))
        if own is not None:
            return Decision(region, own, "key", "chosen for this region")
        rule = self._rule(region)
        if rule is not None:
            return Decision(region, rule.treatment, rule.source, f"matches {rule.match}")
        if region.size < self.eager_below:
            why = f"smaller than {format_size(self.eager_below)}"
            return Decision(region, Treatment.EAGER, f"eager-below ({self.below_source})", why)
        return Decision(region, Treatment.PROTECTED, "default", "private memory, captured while the process runs")

    def _rule(self, region: Region) -> Rule | None:
        speaking = [rule for rule in self.rules if rule.speaks_of(region)]
        by_range = [rule for rule in speaking if rule.range is not None]
        return next(iter(by_range or speaking), None)

    def plan(self, regions: Iterable[Region]) -> Plan:
        chosen = self._chosen()
        return Plan(tuple(self._decide(region, chosen) for region in regions))

    def for_engine(self) -> NativePolicy:
        ranges: list[tuple[int, int, Treatment]] = []
        for start, end, treatment in self.keys:
            ranges += _outside(start, end, treatment, ranges)
        for rule in self.rules:
            if rule.range is not None:
                ranges += _outside(*rule.range, rule.treatment, ranges)
        by_class = {name: next((rule.treatment for rule in self.rules if rule.match == name), None) for name in CLASSES}
        ordered = tuple(sorted(ranges, key=lambda piece: piece[0]))
        return NativePolicy(self.eager_below, ordered, by_class["heap"], by_class["stack"], by_class["anon"])


def _outside(
    start: int, end: int, treatment: Treatment, taken: Sequence[tuple[int, int, Treatment]]
) -> list[tuple[int, int, Treatment]]:
    """The pieces of a range that no earlier range has taken."""
    pieces = []
    for low, high, _ in sorted(taken, key=lambda piece: piece[0]):
        if high <= start or end <= low:
            continue
        if start < low:
            pieces.append((start, low, treatment))
        start = high
    if start < end:
        pieces.append((start, end, treatment))
    return pieces


def _fixed(region: Region) -> tuple[Treatment, str] | None:
    """The treatment of what userfaultfd cannot protect exactly, and why; None where there is a choice."""
    kind, flags = region.kind, region.flags
    if kind is Kind.KERNEL:
        return Treatment.NONE, "the kernel provides it"
    if kind is Kind.DEVICE:
        return Treatment.NONE, "cannot be migrated: see `tuimig check`"
    if kind is Kind.SHARED_FILE:
        return Treatment.NONE, "shared mapping: the file itself holds the content"
    if kind is Kind.SHARED_ANON:
        return Treatment.EAGER, "shared memory changes without a fault"
    if kind in (Kind.FILE, Kind.DELETED):
        return Treatment.EAGER, "private mapping of a file: userfaultfd does not register it"
    if flags & OWN_USERFAULTFD:
        return Treatment.EAGER, "the process has a userfaultfd of its own on it"
    if "mg" in flags:
        return Treatment.EAGER, "mergeable: KSM drops the protection"
    if "dp" in flags:
        return Treatment.EAGER, "droppable: the kernel may discard its pages without an event"
    return None


# ---------------------------------------------------------------- files


def load(path: Path) -> Policy:
    """Reads a policy file. A bad one is a UsageError that names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the policy file: {error.strerror}", subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the policy file is not text: {error.reason}", subject=str(path)) from error
    return parse(text, path.name)


def parse(text: str, name: str) -> Policy:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not a TOML file: {error}", subject=name) from error
    _strict(document, {"eager_below": (str, int), "rule": (list,)}, text, name, None)
    below = document.get("eager_below", DEFAULT_EAGER_BELOW)
    try:
        size = parse_size(str(below))
    except UsageError as error:
        raise UsageError(error.what, subject=f"{name}:{_line(text, 'eager_below', None)}", cure=error.cure) from error
    rules: list[Rule] = []
    for index, table in enumerate(document.get("rule", [])):
        at = f"{name}:{_line(text, None, index)}"
        if not isinstance(table, dict):
            raise UsageError("a rule is a table", subject=at, cure="Write [[rule]], then match and treatment")
        _strict(table, {"match": (str,), "treatment": (str,)}, text, name, index)
        if "match" not in table or "treatment" not in table:
            raise UsageError("a rule needs both match and treatment", subject=at)
        if table["treatment"] not in TREATMENTS:
            at = f"{name}:{_line(text, 'treatment', index)}"
            raise UsageError(f"no such treatment: {table['treatment']!r}", subject=at, cure="Use eager or protected")
        rules.append(Rule(table["match"], TREATMENTS[table["treatment"]], at))
    return Policy(size, tuple(rules), below_source=name if "eager_below" in document else "default")


def _strict(
    table: Mapping[str, object], known: Mapping[str, tuple[type, ...]], text: str, name: str, rule: int | None
) -> None:
    for key, value in table.items():
        at = f"{name}:{_line(text, key, rule)}"
        if key not in known:
            raise UsageError(f"unknown key {key!r}", subject=at, cure=f"Known here: {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UsageError(f"{key} has the wrong type: {value!r}", subject=at)


def _line(text: str, key: str | None, rule: int | None) -> int:
    """The line of a key at the top (rule None) or in the n-th [[rule]]; of its heading where key is None.

    tomllib does not keep positions, so they are looked up. Rules written as an inline array answer with the line of
    `rule =`.
    """
    seen = -1
    best = 1
    pattern = re.compile(rf"""\s*(?:["']?{re.escape(key)}["']?)\s*[.=]""") if key else None
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[", line):
            heading = re.match(r"\s*\[+\s*([^\]\s]+)", line)
            seen += bool(re.match(r"\s*\[\[\s*rule\s*\]\]", line))
            if rule is not None and seen == rule and best == 1:
                best = number
            if rule is None and key and heading and heading[1] == key:
                return number
        elif pattern and pattern.match(line) and seen == (-1 if rule is None else rule):
            return number
        elif rule is not None and re.match(r"\s*rule\s*=", line):
            best = number
    return best


def dump(policy: Policy) -> str:
    """A policy file with the same threshold and rules; a person's keys become rules by range."""
    lines = [f'eager_below = "{format_size(policy.eager_below)}"']
    rules: Sequence[tuple[str, Treatment]] = [
        *((f"{start:x}-{end:x}", treatment) for start, end, treatment in policy.keys),
        *((rule.match, rule.treatment) for rule in policy.rules),
    ]
    for match, treatment in rules:
        lines += ["", "[[rule]]", f"match = {_quote(match)}", f'treatment = "{treatment.value}"']
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
