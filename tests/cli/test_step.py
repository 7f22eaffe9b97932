"""Step mode by keys in a pty: it stops before each phase, the source runs meanwhile, a signal ends it at once."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.command import argv, environment

from tuimig import demo

MARK = b"[Enter: "


class Stepped:
    """The command on a terminal of its own."""

    def __init__(self, *words: str | Path) -> None:
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            argv(*words), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True
        )
        os.close(theirs)
        self.out = b""
        self._asked = 0

    def question(self) -> str:
        """The phase that waits for a key; nothing once the command has ended."""
        while True:
            at = self.out.find(MARK, self._asked)
            if at >= 0 and b"] " in self.out[at:]:
                self._asked = at + len(MARK)
                return self.out[self._asked :].split(b"]")[0].decode()
            if not select.select([self.fd], [], [], 60)[0]:
                pytest.fail(f"nothing more is said: {self.out.decode()}")
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # it has closed its side
                return ""
            self.out += data

    def enter(self) -> None:
        os.write(self.fd, b"\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def source(need: Callable[..., None]) -> Iterator[tuple[int, int]]:
    need(root=True)
    with demo.workload(8 << 20) as (pid, port):
        yield pid, port


def runs(port: int) -> bool:
    before = demo.ask(port)
    after = demo.moved_on(port, before)
    return after.wrong == 0 and all(new > old for old, new in zip(before.counts, after.counts, strict=True))


def test_it_stops_before_each_phase_and_the_source_runs(source: tuple[int, int], place: Path) -> None:
    pid, port = source
    stepped = Stepped("snapshot", str(pid), place / "snap", "--tcp", "close", "--precopy", "off", "--step")
    try:
        asked = []
        while phase := stepped.question():
            assert runs(port)
            asked.append(phase)
            stepped.enter()
        assert stepped.process.wait(60) == 0, stepped.out.decode()
        assert asked[:2] == ["attach", "freeze"]  # a busy machine may need another attempt, which is stepped as well
        assert asked[-2:] == ["capture", "commit"]
        words = " ".join(stepped.out.decode().split())
        assert "Nothing is stopped yet." in words
        assert f"Process {pid} has" in words
        assert "stood still for" in words
        assert "snapshot: done" in words
    finally:
        stepped.close()
    assert runs(port)


def test_a_signal_at_a_stop_ends_it(source: tuple[int, int], place: Path) -> None:
    pid, port = source
    stepped = Stepped("snapshot", str(pid), place / "snap", "--tcp", "close", "--precopy", "off", "--step")
    try:
        assert stepped.question() == "attach"
        stepped.enter()
        assert stepped.question() == "freeze"
        stepped.process.send_signal(signal.SIGTERM)
        assert stepped.question() == ""
        assert stepped.process.wait(60) == 143
        assert b"cancelled; the source runs on as before" in stepped.out
    finally:
        stepped.close()
    assert runs(port)
    assert not (place / "snap").exists()


def test_it_needs_a_terminal_and_a_person(place: Path) -> None:
    done = subprocess.run(
        argv("snapshot", "1", place / "x", "--step"), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--step needs a terminal" in done.stderr
