"""A `tuimig receive --listen` beside a test: the destination of clones and moves over a unix socket."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil

from harness.command import argv, environment
from harness.living import living


class Listening:
    """`text` is what the source is given as its destination."""

    def __init__(self, place: Path, temporary: Path, name: str = "listen") -> None:
        self.path = place / name
        self.runtime = place / "run"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.env = {**environment(temporary), "XDG_RUNTIME_DIR": str(self.runtime)}
        self.words = place / f"{name}.words"
        with self.words.open("wb") as words:
            self.process = subprocess.Popen(
                argv("receive", "--listen", f"unix:{self.path}"),
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env=self.env,
                start_new_session=True,
            )
        while not self.path.exists():
            assert self.process.poll() is None, self.words.read_text()

    @property
    def text(self) -> str:
        return f"unix:{self.path}"

    def receivers(self) -> list[psutil.Process]:
        """The processes of its connections, oldest first."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(living(children), key=lambda child: child.pid)

    def sessions(self) -> list[Path]:
        return sorted(self.runtime.glob("tuimig/*"))

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait(30)
