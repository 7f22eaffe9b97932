"""Compact form fields: a choice shown whole on one line, and a switch. Arrows and Space change them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget


class Choice(Widget, can_focus=True):
    """One of several words. `(*)` marks the chosen one, so that it shows without colour."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choice--chosen"}
    DEFAULT_CSS = """
    Choice {
        height: 1; width: 1fr;
        &:focus { background: $panel; text-style: bold; }
        & > .choice--chosen { color: $text-accent; text-style: bold; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "step(-1)", "Previous", show=False, id="choice.previous"),
        Binding("right,l,space", "step(1)", "Next", show=False, id="choice.next"),
    ]
    chosen: reactive[int] = reactive(0)

    class Changed(Message):
        def __init__(self, choice: Choice) -> None:
            self.choice = choice
            super().__init__()

        @property
        def control(self) -> Choice:
            return self.choice

    def __init__(self, words: Sequence[str], chosen: int = 0, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.words = tuple(words)
        self.set_reactive(Choice.chosen, chosen)

    @property
    def value(self) -> str:
        return self.words[self.chosen]

    @value.setter
    def value(self, word: str) -> None:
        self.chosen = self.words.index(word)

    def watch_chosen(self) -> None:
        self.post_message(self.Changed(self))

    def action_step(self, by: int) -> None:
        self.chosen = (self.chosen + by) % len(self.words)

    def on_click(self, event: Click) -> None:
        self.clicked(event.x)

    def clicked(self, x: int) -> None:
        at = 0
        for index, word in enumerate(self.words):
            at += len(word) + 6
            if x < at:
                self.chosen = index
                return

    def render(self) -> RenderResult:
        line = Text(no_wrap=True)
        style = self.get_component_rich_style("choice--chosen", partial=True)
        for index, word in enumerate(self.words):
            if index == self.chosen:
                line.append(f"(*) {word}  ", style)
            else:
                line.append(f"( ) {word}  ")
        return line


class Switch(Choice):
    """Yes or no."""

    label: reactive[str] = reactive("")

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "step(1)", "Change", show=False, id="choice.toggle"),
    ]

    def __init__(self, label: str, on: bool = False, *, id: str | None = None) -> None:
        super().__init__(("no", "yes"), int(on), id=id)
        self.set_reactive(Switch.label, label)

    @property
    def on(self) -> bool:
        return bool(self.chosen)

    def clicked(self, x: int) -> None:
        self.action_step(1)

    def render(self) -> RenderResult:
        mark = "[x]" if self.on else "[ ]"
        style = self.get_component_rich_style("choice--chosen", partial=True) if self.on else ""
        return Text.assemble((mark, style), f" {self.label}", no_wrap=True)
