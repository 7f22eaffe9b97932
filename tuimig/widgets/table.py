"""A table of any length that sends to the terminal only what changed: lines, or cells of a line.

Rows are asked for when they are drawn, so ten thousand cost what the visible ones do. The cursor sticks to a row's key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Blur, Click, Focus, Resize
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tuimig.words import cut, cut_left


@dataclass(frozen=True, slots=True)
class Column:
    """`width` 0: takes what the others leave. `least`: shown only where the table has that many columns."""

    title: str
    width: int = 0
    right: bool = False
    least: int = 0
    left_cut: bool = False  # a path: its end tells more


@dataclass(frozen=True, slots=True)
class Cell:
    """`kind`: a component class without its `table--`: good, warn, bad, dim, mark, or plain."""

    text: str
    kind: str = "plain"


Row = Sequence[Cell | str]
JUMP = 8  # columns; to move the terminal's cursor and set a colour costs more than these
KINDS = ("plain", "good", "warn", "bad", "dim", "mark")


def fit(text: str, column: Column) -> str:
    """The text in exactly the column's width."""
    short = cut_left(text, column.width) if column.left_cut else cut(text, column.width)
    if not short.isascii():  # wide characters take two columns
        short = set_cell_size(short, min(column.width, cell_len(short)))
    spaces = " " * (column.width - (len(short) if short.isascii() else cell_len(short)))
    return spaces + short if column.right else short + spaces


class Table(ScrollView, can_focus=True):
    """`show` gives it keys and a function for the cells of row number i."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--header", "table--cursor", *(f"table--{kind}" for kind in KINDS)}
    DEFAULT_CSS = """
    Table {
        background: $background; color: $foreground; scrollbar-size: 1 1; overflow-x: hidden; overflow-y: auto;
        scrollbar-gutter: stable;
        & > .table--header { text-style: bold; color: $text-muted; background: $surface; }
        & > .table--cursor { background: $panel; text-style: bold; }
        &:focus > .table--cursor { background: $primary; color: $text; text-style: bold; }
        & > .table--good { color: $text-success; }
        & > .table--warn { color: $text-warning; }
        & > .table--bad { color: $text-error; }
        & > .table--dim { color: $text-muted; }
        & > .table--mark { color: $text-accent; text-style: bold; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="table.up"),
        Binding("down,j", "move(1)", "Down", show=False, id="table.down"),
        Binding("pageup,ctrl+b", "page(-1)", "Page up", show=False, id="table.page-up"),
        Binding("pagedown,ctrl+f", "page(1)", "Page down", show=False, id="table.page-down"),
        Binding("home,g", "edge(-1)", "First", show=False, id="table.first"),
        Binding("end,G", "edge(1)", "Last", show=False, id="table.last"),
        Binding("enter", "choose", "Choose", show=False, id="table.choose"),
    ]

    class Moved(Message):
        """The cursor is on another row."""

        def __init__(self, table: Table, key: Hashable) -> None:
            self.table = table
            self.key = key
            super().__init__()

        @property
        def control(self) -> Table:
            return self.table

    class Chosen(Moved):
        """Enter, or a click on the cursor."""

    def __init__(self, columns: Sequence[Column], *, empty: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = tuple(columns)
        self.empty = empty  # a sentence where there is no row
        self.cursor = 0
        self._moved = False  # by the person
        self._keys: Sequence[Hashable] = ()
        self._cells: Callable[[int], Row] = lambda index: ()
        self._drawn: dict[int, tuple[Row, int, int]] = {}  # line -> what stands there, its row, the scroll
        self._styles_of: dict[str, Style] = {}

    # ------------------------------------------------------------ what it shows

    def show(self, keys: Sequence[Hashable], cells: Callable[[int], Row], *, sticky: bool = True) -> None:
        """New content. The cursor stays on its key (unless `sticky` is false and nobody has moved it), else on its
        place; only what differs is drawn again."""
        before = self.key
        self._keys, self._cells = keys, cells
        if (
            (sticky or self._moved)
            and before is not None
            and not (self.cursor < len(keys) and keys[self.cursor] == before)
        ):
            try:
                self.cursor = keys.index(before)
            except ValueError:
                self.cursor = max(0, min(self.cursor, len(keys) - 1))
        self._make_room()
        self._keep_in_view()
        self._redraw_changes()
        if self.key != before:
            self.post_message(self.Moved(self, self.key))

    @property
    def key(self) -> Any:
        """Of the row under the cursor; None where there is none."""
        return self._keys[self.cursor] if self.cursor < len(self._keys) else None

    @property
    def keys(self) -> Sequence[Hashable]:
        return self._keys

    def go_to(self, key: Hashable) -> bool:
        """Whether there is such a row."""
        try:
            self._move_to(self._keys.index(key))
        except ValueError:
            return False
        return True

    @property
    def lines(self) -> int:
        """Rows that fit."""
        return max(0, self.size.height - 1)

    @property
    def top(self) -> int:
        return int(self.scroll_offset.y)

    # ------------------------------------------------------------ keys

    def action_move(self, by: int) -> None:
        self._move_to(self.cursor + by)

    def action_page(self, by: int) -> None:
        self._move_to(self.cursor + by * max(1, self.lines - 1))

    def action_edge(self, side: int) -> None:
        self._move_to(0 if side < 0 else len(self._keys) - 1)

    def action_choose(self) -> None:
        if self._keys:
            self.post_message(self.Chosen(self, self.key))

    def on_click(self, event: Click) -> None:
        row = event.y - 1 + self.top
        if event.y < 1 or row >= len(self._keys):
            return
        if row == self.cursor and event.chain > 1:
            self.action_choose()
        self._move_to(row)

    def _move_to(self, row: int) -> None:
        row = max(0, min(row, len(self._keys) - 1))
        if row == self.cursor or not self._keys:
            return
        self._moved = True
        before, self.cursor = self.cursor, row
        self._refresh_row(before)
        self._refresh_row(row)
        self._keep_in_view()
        self.post_message(self.Moved(self, self.key))

    def _make_room(self) -> None:
        """Scroll over all rows. Without a new layout, which would send the whole screen again."""
        size = Size(self.scrollable_content_region.width, len(self._keys) + 1)
        if size != self.virtual_size:
            self.set_reactive(Table.virtual_size, size)
            self._scroll_update(size)

    def _keep_in_view(self) -> None:
        if not self.lines:
            return
        if self.cursor < self.top:
            self.scroll_to(y=self.cursor, animate=False, immediate=True, force=True)
        elif self.cursor >= self.top + self.lines:
            self.scroll_to(y=self.cursor - self.lines + 1, animate=False, immediate=True, force=True)

    # ------------------------------------------------------------ drawing

    def _on_resize(self, event: Resize) -> None:
        self._make_room()
        self._drawn.clear()
        self._keep_in_view()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._styles_of.clear()
        self._drawn.clear()

    def _on_focus(self, event: Focus) -> None:
        self._styles_of.clear()
        self._refresh_row(self.cursor)

    def _on_blur(self, event: Blur) -> None:
        self._styles_of.clear()
        self._refresh_row(self.cursor)

    def _refresh_row(self, row: int) -> None:
        line = row - self.top + 1
        if 1 <= line < self.size.height:
            self.refresh(Region(0, line, self.scrollable_content_region.width, 1))

    def _redraw_changes(self) -> None:
        """Refresh the cells that differ from what stands on the screen."""
        top = self.top
        for line in range(1, self.size.height):
            row = top + line - 1
            now: Row = self._cells(row) if row < len(self._keys) else ()
            was = self._drawn.get(line)
            if was is None:  # not known what stands there
                self.refresh(Region(0, line, self.scrollable_content_region.width, 1))
                continue
            cells, drawn_row, drawn_top = was
            if drawn_top != top or len(cells) != len(now) or (drawn_row == self.cursor) != (row == self.cursor):
                self.refresh(Region(0, line, self.scrollable_content_region.width, 1))
                continue
            for start, end in self._changed(self._shown(cells), self._shown(now)):
                self.refresh(Region(start, line, end - start, 1))

    def _changed(self, before: Row, now: Row) -> list[tuple[int, int]]:
        """Columns of the terminal, from and to, in which a row differs; what is near is sent in one piece."""
        found: list[tuple[int, int]] = []
        at = 0
        for column, old, new in zip(self._visible(), before, now, strict=False):
            if old != new:
                start = found.pop()[0] if found and at - found[-1][1] <= JUMP else at
                found.append((start, at + column.width))
            at += column.width + 1
        return found

    def _visible(self) -> list[Column]:
        """The columns that there is room for, with their widths."""
        width = self.scrollable_content_region.width
        shown = [column for column in self.columns if width >= column.least]
        fixed = sum(column.width for column in shown) + len(shown) - 1
        flexible = sum(1 for column in shown if not column.width)
        spare = max(4 * flexible, width - fixed)
        made = []
        for column in shown:
            given = column.width or max(4, spare // flexible)
            made.append(Column(column.title, given, column.right, 0, column.left_cut))
        return made

    def _shown(self, cells: Row) -> list[Cell | str]:
        width = self.scrollable_content_region.width
        return [cell for column, cell in zip(self.columns, cells, strict=False) if width >= column.least]

    def _style(self, kind: str) -> Style:
        if kind not in self._styles_of:
            self._styles_of[kind] = self.get_component_rich_style(f"table--{kind}")
        return self._styles_of[kind]

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        if y == 0:
            titles: Row = [column.title for column in self.columns]
            return self._line(titles, self._style("header"), width)
        row = self.top + y - 1
        if row >= len(self._keys):
            self._drawn[y] = ((), row, self.top)
            text = self.empty if y == 2 and not self._keys else ""
            style = self._style("dim") if text else self.rich_style
            return Strip([Segment(cut(f" {text}", width).ljust(width), style)], width)
        cells = self._cells(row)
        self._drawn[y] = (cells, row, self.top)
        return self._line(cells, self._style("cursor") if row == self.cursor else None, width)

    def _line(self, cells: Row, over: Style | None, width: int) -> Strip:
        base = self.rich_style if over is None else over
        segments: list[Segment] = []
        used = 0
        for column, cell in zip(self._visible(), self._shown(cells), strict=False):
            text, kind = (cell, "plain") if isinstance(cell, str) else (cell.text, cell.kind)
            short = fit(text, column)
            style = base if kind == "plain" else self._style(kind) if over is None else base
            if segments:
                segments.append(Segment(" ", base))
                used += 1
            segments.append(Segment(short, style))
            used += column.width
        segments.append(Segment(" " * max(0, width - used), base))
        return Strip(segments).simplify().adjust_cell_length(width, base)
