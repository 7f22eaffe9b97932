"""The lines around a screen's own part: title, message, keys, filter. Each repaints only when its text changes."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input, Label, Static

from tuimig.words import cut

MOST_MESSAGE_LINES = 4


class TitleLine(Widget):
    """Where one is: the screen's title on the left, what runs on the right."""

    DEFAULT_CSS = """
    TitleLine { height: 1; background: $primary-background; color: $text; text-style: bold; }
    """
    title: reactive[str] = reactive("")
    right: reactive[str] = reactive("")

    def render(self) -> RenderResult:
        room = self.size.width
        right = cut(self.right, room // 2)
        left = cut(f" {self.title}", room - len(right) - 2)
        return Text(f"{left.ljust(room - len(right) - 1)}{right} ", no_wrap=True)


class MessageLine(Static):
    """What just happened, or what went wrong and how to mend it. Empty it takes no room."""

    DEFAULT_CSS = """
    MessageLine {
        height: auto; max-height: 4; display: none; padding: 0 1; color: $text;
        &.-shown { display: block; background: $surface; }
        &.-error { display: block; background: $error-muted; color: $text-error; text-style: bold; }
    }
    """

    def __init__(self) -> None:
        super().__init__("", markup=False)
        self.text = ""

    def say(self, text: str, *, error: bool = False) -> None:
        if text == self.text and error == self.has_class("-error"):
            return
        self.text = text
        self.set_class(bool(text) and not error, "-shown")
        self.set_class(bool(text) and error, "-error")
        self.update(Text(text))


class KeyLine(Widget):
    """The keys that matter here, as many as there is room for; `?` has all of them."""

    DEFAULT_CSS = """
    KeyLine {
        height: 1; background: $surface; color: $text-muted;
        & > .keyline--key { color: $text-accent; text-style: bold; }
    }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"keyline--key"}

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self._changed())
        self._text = ""

    def _changed(self) -> None:
        if str(self._line()) != self._text:
            self.refresh()

    def _line(self) -> Text:
        style = self.get_component_rich_style("keyline--key", partial=True)
        line = Text(" ", no_wrap=True)
        seen: set[str] = set()
        pairs = []
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if binding.show and binding.description and binding.action not in seen:
                seen.add(binding.action)
                pairs.append((self.app.get_key_display(binding), binding.description))
        last = [pair for pair in pairs if pair[1] in ("Help", "Quit")]
        rest = [pair for pair in pairs if pair not in last]
        room = self.size.width - 1 - sum(len(key) + len(what) + 3 for key, what in last)
        for key, what in rest:
            room -= len(key) + len(what) + 3
            if room < 0:
                break
            line.append(key, style).append(f" {what}  ")
        for key, what in last:
            line.append(key, style).append(f" {what}  ")
        return line

    def render(self) -> RenderResult:
        line = self._line()
        self._text = str(line)
        return line


class FilterLine(Horizontal):
    """`/`: narrows a table as one types. Enter keeps it, Esc takes it back."""

    DEFAULT_CSS = """
    FilterLine {
        height: 1; display: none; background: $surface;
        &.-shown { display: block; }
        & > Label { width: auto; padding: 0 1; color: $text-accent; text-style: bold; }
        & > Input { width: 1fr; background: $surface; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "clear", "Clear filter", show=False, id="filter.clear"),
    ]

    class Changed(Message):
        """The text is another one."""

        def __init__(self, line: FilterLine, text: str) -> None:
            self.line = line
            self.text = text
            super().__init__()

    class Left(Message):
        """The person is done with it: the table should have the focus again."""

    def __init__(self, hint: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._hint = hint

    def compose(self) -> ComposeResult:
        yield Label("/")
        yield Input(placeholder=self._hint, compact=True, select_on_focus=False)

    @property
    def text(self) -> str:
        return self.query_one(Input).value

    def open(self) -> None:
        self.add_class("-shown")
        self.query_one(Input).focus()

    def set(self, text: str) -> None:
        self.query_one(Input).value = text
        self.set_class(bool(text), "-shown")

    def action_clear(self) -> None:
        self.set("")
        self.post_message(self.Left())

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed(self, event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.set_class(bool(self.text), "-shown")
        self.post_message(self.Left())
