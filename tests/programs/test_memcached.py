"""memcached with data and a connected client: worker threads with an event loop each, a slab allocator."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.command import tuimig
from harness.pictures import undisturbed
from harness.targets import Target, free_port

ITEMS = 20000


class Client:
    """The text protocol, one connection."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.sock.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def set_many(self, first: int, last: int) -> None:
        self.sock.sendall(
            b"".join(b"set key:%d 0 0 %d\r\n%s\r\n" % (n, len(value(n)), value(n)) for n in range(first, last))
        )
        for _ in range(first, last):
            assert self.file.readline() == b"STORED\r\n"

    def get(self, n: int) -> bytes | None:
        self.sock.sendall(b"get key:%d\r\n" % n)
        head = self.file.readline()
        if head == b"END\r\n":
            return None
        assert head.startswith(b"VALUE"), head
        data = self.file.read(int(head.split()[3]) + 2)[:-2]
        assert self.file.readline() == b"END\r\n"
        return data


def value(n: int) -> bytes:
    return (b"%d-" % n) * (10 + n % 200)


def connect(port: int, target: Target) -> Client:
    end = time.monotonic() + 30
    while True:
        try:
            return Client(port)
        except ConnectionError:
            if not target.alive or time.monotonic() > end:
                raise


@pytest.fixture
def server(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[tuple[Target, int]]:
    need("memcached")
    port = free_port()
    argv = f"memcached -u nobody -p {port} -U 0 -l 127.0.0.1 -t 4 -m 128".split()
    target = Target(argv, directory=place, handshake=False)
    connect(port, target).close()
    yield target, port
    target.stop()


def test_restored_beside_its_source(server: tuple[Target, int], place: Path, quiet: Path, copies: Any) -> None:
    target, port = server
    client = connect(port, target)
    client.set_many(0, ITEMS)
    tuimig("snapshot", target.pid, place / "snap", "--tcp", "close", "--verify", temporary=quiet)
    undisturbed(target.pid)
    assert client.get(7) == value(7)  # the source's client is still connected
    client.set_many(ITEMS, ITEMS + 10)
    other = free_port()
    report = tuimig("restore", place / "snap", "--map-port", f"{port}:{other}", temporary=quiet).report
    copies.add(report)
    copy = connect(other, target)
    assert [n for n in range(ITEMS) if copy.get(n) != value(n)] == []
    assert copy.get(ITEMS + 1) is None  # set after T0
    copy.set_many(ITEMS, ITEMS + 5000)
    assert copy.get(ITEMS + 4999) == value(ITEMS + 4999)
    assert client.get(ITEMS + 4999) is None
    more = [connect(other, target) for _ in range(8)]  # every worker thread of the copy serves
    assert [one.get(11) for one in more] == [value(11)] * 8
    for one in (client, copy, *more):
        one.close()
