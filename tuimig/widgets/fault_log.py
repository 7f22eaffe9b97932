"""The fault table: the newest records at the bottom, paused, scrolled and filtered; decoded only as far as it shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from tuimig.core.model import Fault, FaultKind
from tuimig.run import FaultLog
from tuimig.widgets.table import Cell, Column, Row, Table
from tuimig.words import safe

SCROLLED = 5000  # records one can scroll through
LOOKED_AT = 20_000  # records that a filter looks at, at most, at once: a twentieth of a second
KIND_NAMES = {FaultKind.WP: "write", FaultKind.MISSING: "demand"}


class FaultTable(Table):
    """`update` draws the log's end while it follows, and stands still while it is paused or scrolled back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "follow", "Follow", show=False, id="faults.follow"),
    ]

    class Standing(Message):
        """Whether it follows has changed."""

    def __init__(self, *, id: str | None = None) -> None:
        columns = [
            Column("TIME", 9, right=True),
            Column("THREAD", 7, right=True),
            Column("NAME", 15, least=78),
            Column("ADDRESS", 12, right=True),
            Column("KIND", 6),
            Column("us", 7, right=True),
            Column("PAGES", 5, right=True),
            Column("REGION", left_cut=True),
        ]
        super().__init__(columns, empty="no fault yet", id=id)
        self.follows = True
        self.paused = False
        self.names: Mapping[int, str] = {}
        self.region_name: Callable[[Fault], str] = lambda _: ""
        self.wanted: Callable[[Fault], bool] | None = None
        self.since_ns = 0
        self._faults: list[Fault] = []
        self._seen = -1  # records that were looked at; -1: look anew
        self._until = 0  # while paused: records up to this one
        self._matching: deque[Fault] = deque(maxlen=SCROLLED)

    def update_from(self, log: FaultLog) -> None:
        """Only records that have come since are looked at, unless the filter has changed."""
        if self._seen == log.total or not self.follows or (self.paused and self._seen >= 0):
            return
        upto = self._until if self.paused else log.total
        if self.wanted is None:
            self._faults = log.last(max(1, self.lines), leave=log.total - upto)
        else:
            fresh = min(upto - self._seen if self._seen >= 0 else LOOKED_AT, LOOKED_AT)
            if self._seen < 0:
                self._matching.clear()
            self._matching.extend(log.last(fresh, leave=log.total - upto, wanted=self.wanted, most=fresh))
            self._faults = list(self._matching)[-max(1, self.lines) :]
        self._seen = upto
        self.cursor = max(0, len(self._faults) - 1)
        self._show_faults()

    def on_resize(self) -> None:
        """Another number of records fits."""
        self._seen = -1

    def pause(self, log: FaultLog, paused: bool) -> None:
        self.paused = paused
        self._until = log.total

    def stand(self, log: FaultLog) -> None:
        """Stop following, with as much of the past as one may want to scroll through."""
        upto = self._until if self.paused else log.total
        self.follows = False
        if self.wanted is None:
            self._faults = log.last(SCROLLED, leave=log.total - upto)
        else:
            self._faults = list(self._matching)
        self.cursor = max(0, len(self._faults) - 2)
        self._show_faults()
        self.post_message(self.Standing())

    def again(self, log: FaultLog) -> None:
        """The filter has changed: look again, also where it stands still."""
        self._seen = -1
        if not self.follows:
            self.follows = True
            self.update_from(log)
            self.follows = False

    def action_follow(self) -> None:
        self.follows = True
        self._seen = -1
        self.post_message(self.Standing())

    def _show_faults(self) -> None:
        faults = self._faults
        self.show(range(len(faults)), lambda index: self._row(faults[index]))

    def _row(self, fault: Fault) -> Row:
        slow = fault.latency_ns > 1_000_000
        return (
            f"{max(0, fault.time_ns - self.since_ns) / 1e9:.4f}",
            str(fault.tid),
            safe(self.names.get(fault.tid, "")),
            f"{fault.address:x}",
            Cell(KIND_NAMES[fault.kind], "warn" if fault.kind is FaultKind.WP else "mark"),
            Cell(f"{fault.latency_ns / 1000:.1f}", "bad" if slow else "plain"),
            str(fault.pages),
            safe(self.region_name(fault)),
        )

    @property
    def moved_away(self) -> bool:
        """The person has left the newest record."""
        return self.cursor < len(self._faults) - 1

    @property
    def current(self) -> Any:
        return self._faults[self.cursor] if self.cursor < len(self._faults) else None
