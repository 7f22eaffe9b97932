"""A receiver against a source that breaks the protocol: it ends with a clear error, builds nothing, leaves nothing."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core.test_wire import MESSAGES, NEEDS
from harness.command import argv, environment

from tuimig.core import wire

OPEN = wire.Open("ef" * 32, "control", True, 0, "1.0")


class Receiving:
    """`tuimig receive --stdio` with our hands on its connection."""

    def __init__(self, place: Path, temporary: Path) -> None:
        self.runtime = place / "run"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.sock, theirs = socket.socketpair()
        env = {**environment(temporary), "XDG_RUNTIME_DIR": str(self.runtime)}
        self.process = subprocess.Popen(
            argv("receive", "--stdio"), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env, text=True
        )
        theirs.close()

    def say(self, *data: bytes) -> None:
        for piece in data:
            try:
                self.sock.sendall(piece)
            except BrokenPipeError:
                return

    def end(self) -> tuple[int, str]:
        self.sock.shutdown(socket.SHUT_WR)
        _, words = self.process.communicate(timeout=60)
        self.sock.close()
        assert list(self.runtime.iterdir()) == []
        return self.process.returncode, words


@pytest.fixture
def receiving(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[Callable[[], Receiving]]:
    need(root=True)
    made: list[Receiving] = []

    def make() -> Receiving:
        made.append(Receiving(place, quiet))
        return made[-1]

    yield make
    for receiver in made:
        receiver.process.kill()
        receiver.process.wait()


NO_WAIT = wire.Settings("clone", [], [], "auto", "close", "null", False, True, "kill", 0.0)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([b"\0" * 64], "does not speak"),
        ([wire.frame(wire.Go(1))], "began with another message"),
        ([wire.frame(OPEN), b"garbage that is no frame"], "does not speak"),
        ([wire.frame(OPEN), wire.frame(wire.Running(1, 2, 3, 4, 5, []))], "where it must not"),
        ([wire.frame(OPEN), wire.frame(wire.Image(1, b"{}", b"", b"", True))], "where it must not"),
        (
            [
                wire.frame(OPEN),
                wire.frame(wire.Hello(NEEDS, NO_WAIT)),
                wire.frame(wire.Image(1, b"{}", b"", b"", True)),
            ],
            "malformed",
        ),
        (
            [wire.frame(OPEN), wire.frame(wire.Hello(NEEDS, NO_WAIT)), wire.frame(wire.Hello(NEEDS, NO_WAIT))],
            "where it must not",
        ),
    ],
)
def test_what_breaks_the_protocol_ends_it(
    receiving: Callable[[], Receiving], messages: list[bytes], words: str
) -> None:
    receiver = receiving()
    receiver.say(*messages)
    code, said = receiver.end()
    assert code == 1
    assert words in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_mutated_conversations(receiving: Callable[[], Receiving]) -> None:
    """Whole conversations with bytes changed: never a crash, never a process or a file left."""
    chance = random.Random(11)
    conversation = [wire.frame(OPEN), wire.frame(wire.Hello(NEEDS, NO_WAIT))]
    for _ in range(6):
        data = bytearray(b"".join([*conversation, *(wire.frame(m) for m in chance.sample(MESSAGES, 4))]))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        receiver = receiving()
        receiver.say(bytes(data))
        code, said = receiver.end()
        assert code in (1, 2, 3), said
        assert "Traceback" not in said
        assert "internal error" not in said
