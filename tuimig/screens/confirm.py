"""A question before what cannot be undone. The focus is on the answer that changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Static


class Confirm(ModalScreen[str]):
    """`answers` are (word, label); the first is the harmless one, and Esc gives it."""

    DEFAULT_CSS = """
    Confirm {
        align: center middle; background: $background 60%;
        & > Vertical {
            width: 64; max-width: 90%; height: auto; background: $surface; border: round $warning; padding: 1 2;
        }
        & Static { height: auto; margin-bottom: 1; }
        & Horizontal { height: auto; align-horizontal: right; }
        & Button { margin-left: 2; min-width: 8; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "answer_none", "No", show=False, id="confirm.no"),
        Binding("left,h", "app.focus_previous", "Previous", show=False, id="confirm.previous"),
        Binding("right,l", "app.focus_next", "Next", show=False, id="confirm.next"),
    ]

    def __init__(self, question: str, answers: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._question = question
        self._answers = tuple(answers)

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(Text(self._question))
            with Horizontal():
                for index, (word, label) in enumerate(self._answers):
                    yield Button(label, id=word, compact=True, variant="default" if index == 0 else "warning")

    def on_mount(self) -> None:
        self.query_one(f"#{self._answers[0][0]}", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.dismiss(event.button.id)

    def action_answer_none(self) -> None:
        self.dismiss(self._answers[0][0])


class Ask(ModalScreen[str | None]):
    """A line of text, for a file's name; None: Esc."""

    DEFAULT_CSS = """
    Ask {
        align: center middle; background: $background 60%;
        & > Vertical {
            width: 64; max-width: 90%; height: auto; background: $surface; border: round $primary; padding: 1 2;
        }
        & Static { height: auto; margin-bottom: 1; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "No", show=False, id="ask.no")]

    def __init__(self, question: str, value: str) -> None:
        super().__init__()
        self._question = question
        self._value = value

    def compose(self) -> ComposeResult:
        from textual.widgets import Input

        with Vertical():
            yield Static(Text(self._question))
            yield Input(self._value, compact=True, select_on_focus=False)

    def on_input_submitted(self, event: object) -> None:
        from textual.widgets import Input

        self.dismiss(os.path.expanduser(self.query_one(Input).value.strip()) or None)

    def action_leave(self) -> None:
        self.dismiss(None)
