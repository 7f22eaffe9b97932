"""The console in a terminal of our own: a pty, a model of its screen (pyte), and all bytes that came.

Nothing is read but while somebody waits for something, so a terminal that does not drain is one that is not waited on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyte

from .command import argv, environment

ENTER, ESCAPE, RIGHT, DOWN, F5 = "\r", "\x1b", "\x1b[C", "\x1b[B", "\x1b[15~"
LEAVE = b"\x1b[?1049l"  # back to the normal screen
# COLUMNS and LINES: pytest sets them for its workers, and they would be believed.
UNSET = (
    "SSH_CONNECTION",
    "SSH_TTY",
    "NO_COLOR",
    "COLORTERM",
    "TEXTUAL_FPS",
    "TEXTUAL_ANIMATIONS",
    "TUIMIG_DEBUG",
    "COLUMNS",
    "LINES",
)
LIMIT_S = 40.0
# Escape sequences: CSI, OSC and the other string ones, the rest.
SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


class _Screen(pyte.Screen):  # type: ignore[misc]
    """pyte takes private modes of some reports for arguments that it does not know."""

    def report_device_status(self, *args: Any, **kwargs: Any) -> None: ...

    def select_graphic_rendition(self, *attributes: int, **kwargs: Any) -> None:
        if not kwargs.get("private"):
            super().select_graphic_rendition(*attributes)


class Terminal:
    """Runs `tuimig ARGS` in a pty. `home`: its HOME, configuration and state."""

    def __init__(
        self,
        *args: str | int | Path,
        home: Path,
        size: tuple[int, int] = (80, 24),
        env: Mapping[str, str] | None = None,
        temporary: Path | None = None,
        model: bool = True,
    ) -> None:
        """`model` False: bytes are kept and counted, no screen is made of them."""
        self.raw = bytearray()
        self._screen = _Screen(*size)
        self._stream = pyte.ByteStream(self._screen) if model else None
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        own = {k: v for k, v in environment(temporary).items() if k not in UNSET}
        xdg = {"XDG_CONFIG_HOME": str(home / "config"), "XDG_STATE_HOME": str(home / "state")}
        self.process = subprocess.Popen(
            argv(*args),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**own, "HOME": str(home), "TERM": "xterm-256color", "LANG": "C.UTF-8", **xdg, **(env or {})},
        )
        os.close(slave)
        os.set_blocking(self._master, False)

    # ------------------------------------------------------------ what a person does

    def press(self, *keys: str) -> None:
        for key in keys:
            os.write(self._master, key.encode())

    def press_launch(self) -> None:
        """On the launch screen: to the button, and once it has the focus, Enter."""
        before = self.look_of(" Launch ")
        self.press(F5)
        self.until(lambda: self.look_of(" Launch ") != before)
        self.press(ENTER)

    def hang_up(self) -> None:
        """The window is closed."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.hang_up()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ what a person sees

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def look_of(self, word: str) -> tuple[Any, ...]:
        """Colours and style of the last place where a word stands: what tells a focused button from another."""
        for y in reversed(range(self._screen.lines)):
            x = self._screen.display[y].rfind(word)
            if x >= 0:
                return tuple(self._screen.buffer[y][x][1:])
        return ()

    @property
    def printed(self) -> bytes:
        """All that came, without escape sequences."""
        return SEQUENCE.sub(b"", bytes(self.raw))

    def drain(self, timeout_s: float) -> bool:
        """Take what comes within the time; whether anything came."""
        if self._master < 0 or not select.select([self._master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # all have closed their end
            return False
        self.raw += data
        if self._stream is not None:
            self._stream.feed(data)
        return bool(data)

    def until(self, what: str | Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
        """Until this stands on the screen (a regular expression, on one line of words), or is true."""
        limit = time.monotonic() + limit_s
        while True:
            found = re.search(what, self.words) if isinstance(what, str) else what()
            if found:
                return found
            if time.monotonic() > limit:
                raise AssertionError(f"{what} did not come; the screen:\n{self.text}")
            came = self.drain(0.05)
            if not came and isinstance(what, str) and self.process.poll() is not None:
                raise AssertionError(f"it ended with {self.process.returncode}; {self.printed[-1500:]!r}")

    def ended(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code, once it has ended; what it still writes is taken."""
        self.until(lambda: self.process.poll() is not None, limit_s)
        while self.drain(0):
            pass
        return int(self.process.returncode)

    def bytes_during(self, seconds: float) -> int:
        """Bytes that come in that time."""
        before, limit = len(self.raw), time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            self.drain(left)
        return len(self.raw) - before

    @property
    def cooked(self) -> bool:
        """Whether the terminal is as a shell wants it."""
        with contextlib.suppress(termios.error):
            flags = termios.tcgetattr(self._master)[3]
            return bool(flags & termios.ICANON and flags & termios.ECHO)
        return False
