"""`--ascii`: everything that reaches the terminal is ASCII, by one filter over all lines."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from tuimig.widgets.region_map import BARS

REPLACED = {
    **dict(zip(BARS, " .:-=+*%#", strict=True)),
    **dict(zip("│┃┆┊▏▎▍▌▋▊▉▕▐", "|||||||||||||", strict=True)),
    **dict.fromkeys("─━┄┈▔", "-"),
    **dict.fromkeys("┌┐└┘╭╮╰╯├┤┬┴┼╔╗╚╝╴╶╸╺", "+"),
    "…": "~",
    "·": ".",
    "›": ">",
    "‹": "<",
    "▼": "v",
    "▲": "^",
    "▶": ">",
    "◀": "<",
    "●": "o",
    "○": ".",
    "•": "*",
    "✓": "x",
    "→": ">",
    "←": "<",
    "↑": "^",
    "↓": "v",
    "µ": "u",
    "⏎": "e",
    "╱": "/",
    "░": ":",
    "▒": "%",
    "▓": "#",
}


class Ascii(LineFilter):
    """One column stays one column; what has no likeness becomes `?`, wide characters two of them."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            segment if segment.text.isascii() or segment.control else Segment(plain(segment), segment.style)
            for segment in segments
        ]


def plain(segment: Segment) -> str:
    text = "".join(REPLACED.get(c, c if c.isascii() else "?") for c in segment.text)
    return text + "?" * (segment.cell_length - len(text))
