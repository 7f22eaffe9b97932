"""The end by force: a console whose terminal takes nothing any more cannot leave by itself."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import threading
from typing import Any, Final

PATIENCE_S: Final = 3.0


class Force:
    """Remembers the terminal as it was. `leave_soon` gives the orderly end some seconds, then ends the process."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        with contextlib.suppress(termios.error, ValueError, OSError):  # no terminal: nothing to restore
            self._before = termios.tcgetattr(sys.__stdin__.fileno()) if sys.__stdin__ else None

    def leave_soon(self, number: int) -> None:
        timer = threading.Timer(PATIENCE_S, self._end, (128 + number,))
        timer.daemon = True
        timer.start()

    def _end(self, code: int) -> None:
        if self._before is not None and sys.__stdin__ is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(sys.__stdin__.fileno(), termios.TCSANOW, self._before)
        os._exit(code)
