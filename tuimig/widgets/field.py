"""A line of a form: a label, a widget, and what is wrong with what stands in it."""

from __future__ import annotations

from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Label, Static


class Field(Horizontal):
    """`-hidden` takes it out of the form."""

    DEFAULT_CSS = """
    Field {
        height: auto;
        & > Label { width: 13; padding: 0 1; color: $text-muted; }
        & > Input { width: 1fr; background: $surface; }
        & > Input:focus { background: $panel; }
        & > .wrong {
            width: auto; max-width: 45%; color: $text-error; text-style: bold; display: none; padding-left: 1;
        }
        &.-wrong > .wrong { display: block; }
        &.-hidden { display: none; }
    }
    """

    def __init__(self, label: str, widget: Widget, *, id: str) -> None:
        self._wrong = Static("", classes="wrong", markup=False)
        super().__init__(Label(label), widget, self._wrong, id=id)

    def wrong(self, what: str) -> None:
        self._wrong.update(what)
        self.set_class(bool(what), "-wrong")
