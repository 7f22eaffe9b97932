"""What `--redact` hides of a recording: command lines, paths, names, and every sentence that may quote one of them.

Process ids, addresses, sizes and figures stay. The same file has the same number wherever it appears.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tuimig.core.jobs import Failure
from tuimig.core.model import Connection, Decision, Note, Plan, Planned, Region, Report

HIDDEN: Final = "(hidden)"
OF_THE_KERNEL: Final = frozenset({"", "[heap]", "[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"})
OUR_RULES: Final = ("cannot be protected", "key", "default", "eager-below (default)")
AGAIN: Final = "; trying again"  # what a session says before another attempt


class Redactor:
    """Remembers which number it gave to which name."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def name(self, path: str) -> str:
        if path in OF_THE_KERNEL:
            return path
        return f"file {self._numbers.setdefault(path, len(self._numbers) + 1)}"

    def planned(self, event: Planned) -> Planned:
        decisions = tuple(self._decision(decision) for decision in event.plan.decisions)
        return replace(event, command=HIDDEN, plan=Plan(decisions))

    def _decision(self, decision: Decision) -> Decision:
        region = self._region(decision.region)
        if decision.rule in OUR_RULES:
            return replace(decision, region=region)
        return replace(decision, region=region, rule=HIDDEN, why=HIDDEN)  # a rule quotes a pattern or a file's name

    def _region(self, region: Region) -> Region:
        return replace(region, path=self.name(region.path), dev="00:00", inode=0)

    def note(self, note: Note) -> Note:
        _, found, rest = note.text.rpartition(AGAIN)
        return Note(f"{HIDDEN}{AGAIN}{rest}" if found else HIDDEN)

    def connection(self, event: Connection) -> Connection:
        return replace(event, destination=HIDDEN, text="")

    def report(self, report: Report) -> Report:
        return replace(
            report,
            directory=None if report.directory is None else HIDDEN,
            destination=None if report.destination is None else HIDDEN,
            warnings=tuple(HIDDEN for _ in report.warnings),
        )

    def failure(self, failure: Failure) -> Failure:
        return replace(failure, what=HIDDEN, subject=HIDDEN, cure="", obstacles=())
