"""Help: what one sees on the screen beneath, and its keys as its bindings say them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tuimig.screens.page import describe

if TYPE_CHECKING:
    from textual.screen import Screen


class Help(ModalScreen[None]):
    """Made from the active bindings, so it cannot be out of date."""

    DEFAULT_CSS = """
    Help {
        align: center middle; background: $background 60%;
        & > VerticalScroll { width: 76; max-width: 96%; height: auto; max-height: 96%; background: $surface;
            border: round $primary; padding: 0 2; }
        & Static { height: auto; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,f1,q", "leave", "Close", show=False, id="help.close"),
        Binding("down,j", "scroll(1)", "Down", show=False, id="help.down"),
        Binding("up,k", "scroll(-1)", "Up", show=False, id="help.up"),
    ]

    def __init__(self, of: Screen[object]) -> None:
        super().__init__()
        self._of = of
        self._keys = keys_of(of)

    def compose(self) -> ComposeResult:
        text = Text(describe(self._of) + "\n\n")
        width = max((len(keys) for keys, _ in self._keys), default=0)
        for keys, what in self._keys:
            text.append(f"{keys.rjust(width)}", "bold").append(f"  {what}\n")
        with VerticalScroll():
            yield Static(text)

    def action_leave(self) -> None:
        self.dismiss(None)

    def action_scroll(self, by: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


def keys_of(screen: Screen[object]) -> list[tuple[str, str]]:
    """(keys, what they do), each action once, the screen's own before the table's and the console's."""
    found: dict[str, tuple[list[str], str, int]] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.description or binding.id is None:  # Textual's own; ours all have ids
            continue
        rank = 0 if active.node is screen else 2 if active.node is screen.app else 1
        keys, _, _ = found.setdefault(f"{active.node!r}{binding.action}", ([], binding.description, rank))
        display = screen.app.get_key_display(replace(binding, key_display=None))
        if display not in keys:
            keys.append(display)
    ordered = sorted(found.values(), key=lambda entry: entry[2])
    return [(" ".join(keys), what) for keys, what, _ in ordered]
