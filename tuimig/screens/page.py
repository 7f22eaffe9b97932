"""What every screen of the console has: title, message, keys, a way back, answers from threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget

from tuimig.core.errors import EngineError, TuimigError, Unsupported
from tuimig.widgets.lines import KeyLine, MessageLine, TitleLine
from tuimig.words import safe


@dataclass(frozen=True, slots=True)
class Target:
    """The process that the person has chosen: `ticks` is its start time, which pins it."""

    pid: int
    ticks: int
    command: str

    @property
    def name(self) -> str:
        return self.command.split(" ", 1)[0].rsplit("/", 1)[-1] or f"process {self.pid}"


if TYPE_CHECKING:
    from tuimig.app import Console

NOT_A_FILTER: Final = "not a regular expression"
log = logging.getLogger("tuimig.console")
Result = TypeVar("Result")


class Answer(Message):
    """What a thread found out, brought back to the screen that asked."""

    def __init__(self, deliver: Callable[[], None]) -> None:
        self.deliver = deliver
        super().__init__()


class Page(Screen[None]):
    """A screen. `heading` is its title; `about` is what one sees here, a few lines for the help."""

    heading: ClassVar[str] = ""
    about: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back", show=False, id="page.back"),
    ]

    def body(self) -> Iterable[Widget]:
        """The screen's own part."""
        return ()

    def compose(self) -> ComposeResult:
        yield TitleLine()
        yield from self.body()
        yield MessageLine()
        yield KeyLine()

    def __init__(self) -> None:
        super().__init__()
        self._said = ("", False)  # before there was a line to say it on

    def on_mount(self) -> None:
        self.retitle()
        self._say(*self._said)

    def process(self) -> Target | None:
        """The process that this screen is about."""
        return getattr(self, "target", None)

    @property
    def console_app(self) -> Console:
        return cast("Console", self.app)

    def title_text(self) -> str:
        return self.heading

    def retitle(self) -> None:
        for line in self.query(TitleLine):  # none before it is mounted and after it is left
            line.title = f"tuimig  {self.title_text()}"
            line.right = self.console_app.title_right()

    def on_screen_resume(self) -> None:
        self.retitle()

    def say(self, text: str) -> None:
        self._say(text, False)

    def complain(self, error: TuimigError) -> None:
        """The sentence with its cure."""
        text = str(error)
        if isinstance(error, Unsupported):
            text += "".join(f"\n- {obstacle}" for obstacle in error.obstacles[:3])
        self._say(text, True)

    def _say(self, text: str, error: bool) -> None:
        text = "\n".join(safe(line) for line in text.split("\n"))  # it may name what other processes have made
        self._said = (text, error)
        for line in self.query(MessageLine):
            line.say(text, error=error)

    def wrong_filter(self, text: str) -> None:
        """What is wrong with a filter, until it is right; other messages stay."""
        if text or self._said[0].startswith(NOT_A_FILTER):
            self.say(text)

    def ask(
        self,
        work: Callable[[], Result],
        then: Callable[[Result], None],
        failed: Callable[[TuimigError], None] | None = None,
    ) -> None:
        """Do `work` on a thread; `then` gets what it returns, here; `failed` (or the message line) what it raises."""

        def run() -> None:
            try:
                found = work()
            except Exception as error:
                trouble = error if isinstance(error, TuimigError) else internal(error)
                self._bring(lambda: (failed or self.complain)(trouble))
            else:
                self._bring(lambda: then(found))

        self.console_app.background(run)

    def _bring(self, deliver: Callable[[], None]) -> None:
        if self.console_app.threads:
            self.post_message(Answer(deliver))
        else:
            deliver()

    def on_answer(self, message: Answer) -> None:
        if self.is_attached:
            message.deliver()

    def action_back(self) -> None:
        """Esc. The first screen stays."""
        if len(self.app.screen_stack) > 2:
            self.dismiss()


def internal(error: Exception) -> TuimigError:
    """A mistake of ours, or of a library: the log has it whole."""
    log.error("internal error", exc_info=error)
    return EngineError(f"internal error: {type(error).__name__}: {error}", cure="The log has more")


def describe(page: Any) -> str:
    """The help text of a screen, as one paragraph."""
    return " ".join(str(getattr(page, "about", "")).split())
