"""A real Redis under test, and a client small enough to be trusted: it numbers its writes and keeps their times."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .targets import Target, free_port

Word = str | bytes | int


class RedisError(Exception):
    """An error reply."""


class Client:
    """One connection, synchronous; `pipeline` sends many commands before it reads."""

    def __init__(self, port: int, timeout_s: float = 60, host: str = "127.0.0.1") -> None:
        self.sock = socket.create_connection((host, port), timeout=timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def encode(words: Sequence[Word]) -> bytes:
        out = [b"*%d\r\n" % len(words)]
        for word in words:
            text = word if isinstance(word, bytes) else str(word).encode()
            out.append(b"$%d\r\n%s\r\n" % (len(text), text))
        return b"".join(out)

    def reply(self) -> Any:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RedisError(rest.decode())
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        raise ConnectionError(f"not a reply: {line!r}")

    def __call__(self, *words: Word) -> Any:
        self.sock.sendall(self.encode(words))
        return self.reply()

    def pipeline(self, commands: Sequence[Sequence[Word]]) -> list[Any]:
        self.sock.sendall(b"".join(self.encode(words) for words in commands))
        return [self.reply() for _ in commands]

    def info(self, section: str) -> dict[str, str]:
        text = self("INFO", section).decode()
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


class Redis(Target):
    """redis-server in the foreground, nothing saved by itself, its directory `directory`."""

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.directory = directory
        argv = f"redis-server --port {self.port} --bind 127.0.0.1 --appendonly no --enable-debug-command yes".split()
        super().__init__([*argv, "--save", "", "--dir", str(directory), *options], directory=directory, handshake=False)
        connect(self.port, self.process).close()

    def client(self) -> Client:
        return Client(self.port)


def connect(port: int, process: subprocess.Popen[Any] | None = None, timeout_s: float = 60) -> Client:
    """Connect and PING, again and again until it answers; fails when the process has ended."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            client = Client(port)
            client("PING")
            return client
        except (ConnectionError, RedisError):
            if process is not None and process.poll() not in (None, 0):
                raise
            if time.monotonic() > end:
                raise


def populate(port: int, megabytes: float, value_bytes: int = 4000) -> int:
    """Keys `fill:N` with values that do not compress; returns how many."""
    with Client(port) as client:
        return populate_by(client, megabytes, value_bytes)


def populate_by(client: Client, megabytes: float, value_bytes: int = 4000) -> int:
    keys = int(megabytes * 1e6 / value_bytes)
    source = random.Random(7)
    for start in range(0, keys, 500):
        block = source.randbytes(value_bytes)
        commands = [
            ("SET", f"fill:{n}", b"%012d" % n + block[n % 97 : n % 97 + value_bytes - 12])
            for n in range(start, min(start + 500, keys))
        ]
        client.pipeline(commands)
    return keys


def digests(port: int, keys: int) -> list[bytes]:
    """One digest for each `fill:N`, computed by the server."""
    with Client(port) as client:
        return digests_by(client, keys)


def digests_by(client: Client, keys: int) -> list[bytes]:
    out: list[bytes] = []
    for start in range(0, keys, 1000):
        names = [f"fill:{n}" for n in range(start, min(start + 1000, keys))]
        out += client("DEBUG", "DIGEST-VALUE", *names)
    return out


@dataclass(frozen=True)
class Write:
    number: int
    sent_ns: int
    acknowledged_ns: int  # both on CLOCK_MONOTONIC


class Numbered(threading.Thread):
    """Appends 1, 2, 3... to the list `numbered` and waits for each answer; any error is kept."""

    def __init__(self, port: int) -> None:
        super().__init__(name="numbered", daemon=True)
        self.client = Client(port)
        self.writes: list[Write] = []
        self.error: Exception | None = None
        self._stop_it = threading.Event()

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                number = len(self.writes) + 1
                sent = time.monotonic_ns()
                length = self.client("RPUSH", "numbered", number)
                self.writes.append(Write(number, sent, time.monotonic_ns()))
                if length != number:
                    raise RedisError(f"write {number} made the list {length} long")
                time.sleep(0.0002)  # a pace, not a synchronisation
        except (OSError, RedisError) as error:
            self.error = error

    def finish(self) -> list[Write]:
        self._stop_it.set()
        self.join(60)
        self.client.close()
        if self.error is not None:
            raise self.error
        return self.writes


@contextmanager
def load(port: int, clients: int = 20, data_bytes: int = 100) -> Iterator[subprocess.Popen[str]]:
    """redis-benchmark, for as long as the block lasts; it ends by itself, with words, when a request is lost."""
    process = subprocess.Popen(
        f"redis-benchmark -p {port} -t set -c {clients} -r 100000 -d {data_bytes} -n 100000 -l -q".split(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        assert process.poll() is None, f"redis-benchmark ended: {process.communicate()[1]}"
    finally:
        process.terminate()
        _, words = process.communicate()
    assert "rror" not in words, words


@contextmanager
def load_until_it_ends(port: int) -> Iterator[None]:
    """The same against a server that goes away."""
    process = subprocess.Popen(
        f"redis-benchmark -p {port} -t set -c 20 -r 100000 -d 100 -n 100000 -l -q".split(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def listed(port: int) -> list[int]:
    with Client(port) as client:
        return [int(word) for word in client("LRANGE", "numbered", 0, -1)]
