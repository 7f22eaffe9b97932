"""Clients of the two servers that the demo runs, kv and Redis: they write numbers and read them back.

OSError where the server does not acknowledge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from tuimig.demos.driving import connect

BATCH: Final = 500  # commands sent before the first answer is read
VALUE_BYTES: Final = 4000


class Client(Protocol):
    def write(self, number: int) -> None:
        """Writes `number` and waits for the acknowledgement."""

    def written(self) -> Sequence[int]:
        """The numbers that the server holds, in the order in which they were written."""

    def wrong(self) -> int:
        """How many of the values that the server was filled with are not what they were."""

    def close(self) -> None: ...


class KvClient:
    def __init__(self, port: int) -> None:
        self._socket = connect(port)
        self._answers = self._socket.makefile("r", encoding="utf-8")

    def ask(self, *lines: str) -> list[str]:
        self._socket.sendall("".join(f"{line}\n" for line in lines).encode())
        return [self._answer() for _ in lines]

    def _answer(self) -> str:
        line = self._answers.readline()
        if not line.endswith("\n"):
            raise ConnectionResetError("the server closed the connection")
        return line[:-1]

    def write(self, number: int) -> None:
        if self.ask(f"set write:{number} {number}") != ["ok"]:
            raise ConnectionAbortedError(f"write {number} was not acknowledged")

    def written(self) -> list[int]:
        filled = json.loads(self.ask("state")[0])["pages"]
        many = int(self.ask("size")[0]) - filled
        found: list[int] = []
        for numbers in batches(1, many + 1):
            found += [int(answer or 0) for answer in self.ask(*(f"get write:{n}" for n in numbers))]
        return found

    def wrong(self) -> int:
        wrong: int = json.loads(self.ask("state")[0])["wrong"]
        return wrong

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class RedisClient:
    """As much of the protocol as the demo needs: numbers, strings and lists."""

    def __init__(self, port: int, keys: int = 0) -> None:
        """`keys`: with how many values the server is filled."""
        self._keys = keys
        self._socket = connect(port)
        self._answers = self._socket.makefile("rb")

    def ask(self, *commands: tuple[str | int, ...]) -> list[Any]:
        self._socket.sendall(b"".join(_request(words) for words in commands))
        return [self._answer() for _ in commands]

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        kind, value = line[:1], line[1:-2].decode()
        match kind:
            case b"+":
                return value
            case b":":
                return int(value)
            case b"$":
                return None if value == "-1" else self._answers.read(int(value) + 2)[:-2].decode()
            case b"*":
                return [self._answer() for _ in range(int(value))]
            case _:
                raise ConnectionAbortedError(f"the server answers {value}")

    def write(self, number: int) -> None:
        [length] = self.ask(("RPUSH", "ledger", number))
        if length != number:
            raise ConnectionAbortedError(f"write {number} made the list {length} long")

    def written(self) -> list[int]:
        return [int(word) for word in self.ask(("LRANGE", "ledger", 0, -1))[0]]

    def fill(self) -> None:
        for numbers in batches(0, self._keys):
            self.ask(*(("SET", f"fill:{n}", _value(n)) for n in numbers))

    def wrong(self) -> int:
        found = 0
        for numbers in batches(0, self._keys):
            answers = self.ask(*(("GET", f"fill:{n}") for n in numbers))
            found += sum(answer != _value(n) for n, answer in zip(numbers, answers, strict=True))
        return found

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


def batches(first: int, end: int) -> Iterator[range]:
    for start in range(first, end, BATCH):
        yield range(start, min(start + BATCH, end))


def _value(number: int) -> str:
    return f"{number:012d}".ljust(VALUE_BYTES, "abcdefghijklmnopqrstuvwxyz"[number % 26])


def _request(words: tuple[str | int, ...]) -> bytes:
    texts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(text), text) for text in texts)
