"""`--step` on a terminal: before each phase it is explained what has happened and what comes, until Enter is pressed.

The source runs on meanwhile: the session asks only where it is not held.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import sys
import termios
import textwrap
from dataclasses import replace
from typing import Final

from tuimig.core.errors import UsageError
from tuimig.core.model import (
    Connection,
    Detail,
    Event,
    Faults,
    Frozen,
    Handover,
    Note,
    Phase,
    Planned,
    Progress,
    Round,
)
from tuimig.explain import Situation, explain, text

WIDTH: Final = 96


class Narrator:
    """A listener that knows at any time what could be explained."""

    def __init__(self) -> None:
        self.now = Situation("look")

    def see(self, event: Event) -> None:
        match event:
            case Planned():
                about = {"verb": event.verb, "pid": event.pid, "command": event.command, "plan": event.plan}
                self.now = replace(self.now, **about)  # type: ignore[arg-type]
            case Phase(name=name):
                again = name == "attach" and self.now.frozen is not None
                frozen = None if again else self.now.frozen
                self.now = replace(self.now, phase=name, frozen=frozen, attempts=self.now.attempts + again)
            case Round():
                self.now = replace(self.now, round=event)
            case Frozen():
                self.now = replace(self.now, frozen=event)
            case Connection():
                self.now = replace(self.now, connection=event)
            case Handover():
                self.now = replace(self.now, handover=event)
            case Progress(side="destination"):
                self.now = replace(self.now, remote=event)
            case Progress():
                self.now = replace(self.now, progress=event)
            case Detail():
                self.now = replace(self.now, details={**(self.now.details or {}), event.side: event})
            case Faults() if len(event):
                self._fault(event)

    def _fault(self, event: Faults) -> None:
        last = event.faults[-1]
        inside = (d.region for d in self.now.plan.decisions if d.region.start <= last.address < d.region.end)
        region = next(inside, None)
        self.now = replace(self.now, last_fault=last, region_of_fault=region.name if region else "")


class Steps:
    """The gate of a session on a terminal."""

    def __init__(self, found: argparse.Namespace) -> None:
        if not sys.stdin.isatty():
            raise UsageError("--step needs a terminal to press Enter on", cure="Leave it out")
        if found.json or found.events == "-":
            raise UsageError("--step talks to a person", cure="Leave out --json and --events -")
        self._narrator = Narrator()
        self._left, self._leave = os.pipe2(os.O_CLOEXEC)

    def see(self, event: Event) -> None:
        self._narrator.see(event)
        if isinstance(event, Note):
            print(f"\n{event.text}", file=sys.stderr)

    def leave(self) -> None:
        """Do not wait any more. Safe in a signal handler."""
        os.write(self._leave, b"x")

    def wait(self, phase: str) -> None:
        now = replace(self._narrator.now, waiting_for=phase)
        shown = text(explain(now))
        width = min(WIDTH, shutil.get_terminal_size().columns - 1)
        paragraphs = (textwrap.wrap(part, width, break_on_hyphens=False) for part in shown.splitlines())
        lines = [line for paragraph in paragraphs for line in paragraph]
        print("\n" + "\n".join(lines), file=sys.stderr)
        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was pressed before was meant for something else
        print(f"[Enter: {phase}] ", end="", file=sys.stderr, flush=True)
        ready, _, _ = select.select([sys.stdin, self._left], [], [])
        if sys.stdin in ready:
            sys.stdin.readline()
