"""Shown while the terminal is smaller than what the screens are designed for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import Static

if TYPE_CHECKING:
    from tuimig.app import Console


class TooSmall(ModalScreen[None]):
    DEFAULT_CSS = """
    TooSmall { align: center middle; background: $background; }
    TooSmall Static { width: auto; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [  # those of the application do not reach through a modal screen
        Binding("q,ctrl+c,ctrl+q", "app.leave", "Quit", show=False, id="small.quit"),
    ]

    def compose(self) -> ComposeResult:
        yield Static(self._words(), markup=False)

    def on_resize(self, event: Resize) -> None:
        self.query_one(Static).update(self._words())

    def _words(self) -> str:
        from tuimig.app import LEAST

        size = cast("Console", self.app).size
        return f"{size.width}x{size.height}: needs {LEAST[0]}x{LEAST[1]}"
