"""The part of the launch form that is about the connection to another place."""

from __future__ import annotations

from typing import Any

from textual.containers import Vertical
from textual.widgets import Input

from tuimig.connecting import COMPRESSIONS, MOST_STREAMS
from tuimig.core import transport
from tuimig.core.errors import UsageError
from tuimig.core.model import Options
from tuimig.core.policy import parse_size
from tuimig.widgets.choice import Choice
from tuimig.widgets.field import Field


class ConnectionFields(Vertical):
    """`kind` is that of the destination, ssh or unix; nothing where there is none."""

    DEFAULT_CSS = """
    ConnectionFields { height: auto; }
    """

    def __init__(self) -> None:
        plain = Options()
        limit = "no limit; or like 50MiB a second, for pages in the background"
        super().__init__(
            Field("Streams", Input(str(plain.streams), compact=True, id="streams"), id="f-streams"),
            Field("Bandwidth", Input("", compact=True, id="bandwidth", placeholder=limit), id="f-bandwidth"),
            Field("Compress", Choice(COMPRESSIONS, id="compress"), id="f-compress"),
            Field("Command", Input(plain.remote_command, compact=True, id="command"), id="f-command"),
        )

    def show(self, kind: str) -> None:
        """Those that have an effect on the way to such a destination."""
        self.display = bool(kind)
        self.query_one("#f-command").set_class(kind != "ssh", "-hidden")

    def _text(self, name: str) -> str:
        return self.query_one(f"#{name}", Input).value.strip()

    def wrong(self, kind: str) -> dict[str, str]:
        """By the field's id."""
        wrong = {}
        streams = self._text("streams")
        if not (streams.isascii() and streams.isdigit() and 1 <= int(streams) <= MOST_STREAMS):
            wrong["f-streams"] = f"1 to {MOST_STREAMS}"
        try:
            parse_size(self._text("bandwidth") or "0")
        except UsageError:
            wrong["f-bandwidth"] = "write it like 50MiB"
        if kind == "ssh":
            try:
                transport.check_command(self._text("command"))
            except UsageError:
                wrong["f-command"] = "not a command"
        return wrong

    def values(self, kind: str) -> dict[str, Any]:
        """As fields of Options."""
        found: dict[str, Any] = {
            "streams": int(self._text("streams")),
            "bandwidth": parse_size(self._text("bandwidth") or "0"),
            "compress": self.query_one("#compress", Choice).value,
        }
        return {**found, "remote_command": self._text("command")} if kind == "ssh" else found
