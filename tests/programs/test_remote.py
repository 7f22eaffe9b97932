"""A loaded Redis goes elsewhere: over a unix socket, and over real ssh between two network namespaces. Exact, or not at
all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import network, redis
from harness.command import tuimig
from harness.destinations import Listening
from harness.pictures import undisturbed
from harness.targets import Target, ask, free_port

MEGABYTES = 300
CLONE = 0x40000000


@pytest.fixture
def listening(place: Path, quiet: Path) -> Iterator[Listening]:
    made = Listening(place, quiet)
    yield made
    made.close()
    assert made.sessions() == [], "a session left files behind"


@pytest.fixture
def server(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[redis.Redis]:
    need("redis-server", "redis-benchmark", root=True)
    running = redis.Redis(place / "redis")
    yield running
    running.stop()


@pytest.fixture
def hosts(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[network.Network]:
    need("ip", "ssh", "sshd", root=True)
    made = network.Network(place)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--guard", "on", "--precopy", "off"), ("--compress", "lz4", "--streams", "3")]
)
def test_clone_over_a_unix_socket(
    server: redis.Redis, listening: Listening, quiet: Path, copies: Any, options: tuple[str, ...]
) -> None:
    keys = redis.populate(server.port, MEGABYTES)
    before = redis.digests(server.port, keys)
    port = free_port()
    numbered = redis.Numbered(server.port)
    with redis.load(server.port):
        numbered.start()
        while len(numbered.writes) < 20 and numbered.error is None:
            pass
        first = len(numbered.writes)
        mapping = ("--map-port", f"{server.port}:{port}", "--tcp", "close")
        report = tuimig("clone", server.pid, listening.text, *mapping, *options, env=listening.env).report
        last = len(numbered.writes) + 1
        copies.add(report)
        undisturbed(server.pid)
    writes = numbered.finish()
    numbers = redis.listed(port)
    assert numbers == list(range(1, len(numbers) + 1))
    assert first <= len(numbers) <= last
    assert redis.digests(port, keys) == before
    assert redis.digests(server.port, keys) == before
    assert redis.listed(server.port) == [w.number for w in writes]
    assert report["destination"] == listening.text
    assert report["skeleton"] == ("off" not in options), "its memory is laid out while pages come"
    assert len(report["stream_bytes"]) == (4 if "3" in options else 2)
    assert report["bytes_sent"] > MEGABYTES * 1_000_000 or "lz4" in options


@pytest.mark.slow
def test_move_over_a_unix_socket(server: redis.Redis, listening: Listening, copies: Any) -> None:
    keys = redis.populate(server.port, MEGABYTES)
    before = redis.digests(server.port, keys)
    port = free_port()
    with redis.load_until_it_ends(server.port):
        mapping = ("--map-port", f"{server.port}:{port}", "--tcp", "close")
        report = tuimig("move", server.pid, listening.text, *mapping, env=listening.env).report
    copies.add(report)
    assert report["skeleton"]
    assert server.process.wait(10) == -9
    assert redis.digests(port, keys) == before
    with redis.Client(port) as client:
        assert client("SET", "only", "here") == "OK"


LOCKS = """
import fcntl, mmap, sys, time
big = bytearray(b"x" * (8 << 20))
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 4096)
fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("options", [(), ("--precopy", "off")], ids=["precopy", "all after T0"])
def test_a_lock_on_a_file_that_is_mapped(
    listening: Listening, place: Path, copies: Any, options: tuple[str, ...]
) -> None:
    """Whoever closes one descriptor of a file loses its record locks; the build closes those that it mapped with."""
    path = place / "locked"
    path.write_bytes(bytes(8192))
    command = [sys.executable, "-c", LOCKS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        assert source.stdout.readline() == b"ready\n"
        report = tuimig(
            "clone", source.pid, listening.text, "--stdio", "null", "--yes", *options, env=listening.env
        ).report
        copies.add(report)
        source.kill()
    fds = Path(f"/proc/{report['new_pid']}/fd")
    number = next(fd.name for fd in fds.iterdir() if os.readlink(fd) == str(path))
    assert "POSIX" in Path(f"/proc/{report['new_pid']}/fdinfo/{number}").read_text()


@pytest.mark.slow
def test_all_pages_before_it_runs(
    targets: Callable[..., Target], listening: Listening, place: Path, copies: Any
) -> None:
    """--full: each page comes once, by itself; nothing is asked for that is on its way."""
    target = targets("ballast", "--mb", 64)
    for number in range(8):
        control = place / f"copy{number}"
        mapping = ("--map-path", f"{target.control}={control}", "--full")
        report = tuimig("clone", target.pid, listening.text, *mapping, env=listening.env).report
        copies.add(report)
        assert ask(control, "check")["problems"] == 0
        assert report["bytes_sent"] < 1.1 * report["bytes"] + (1 << 20)
        copies.end()


@pytest.mark.slow
def test_a_limit_does_not_hold_up_what_is_waited_for(
    targets: Callable[..., Target], listening: Listening, place: Path, copies: Any
) -> None:
    """--bandwidth is for the background: the eager pages of a move, whose source stands still, are none."""
    target = targets("ballast", "--mb", 2)
    mapping = (
        "--map-path",
        f"{target.control}={place}/copy",
        "--precopy",
        "off",
        "--bandwidth",
        "256KiB",
        "--eager-below",
        "64MiB",
    )
    report = tuimig("move", target.pid, listening.text, *mapping, env=listening.env).report
    copies.add(report)
    assert report["eager_bytes"] > 256 << 10
    assert report["downtime_us"] < 2_000_000, "it waited for its turn"
    assert not report["warnings"], "it has its files for itself"


@contextlib.contextmanager
def far_redis(hosts: network.Network, place: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """In the near namespace, on an address that can move along."""
    network.run("ip", "-n", hosts.near, "addr", "add", f"{network.SHARED}/24", "dev", hosts.device)
    directory = place / "redis"
    directory.mkdir()
    port = 6379
    argv = f"redis-server --port {port} --bind {network.SHARED} --protected-mode no --appendonly no".split()
    argv += ["--enable-debug-command", "yes", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(
        hosts.within(hosts.near, *argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def within(name: str, work: Callable[[], Any]) -> Any:
    """`work` in a network namespace, in a thread of its own."""
    out: list[Any] = []

    def body() -> None:
        with network.inside(name):
            try:
                out.append(work())
            except BaseException as error:
                out.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(out[0], BaseException):
        raise out[0]
    return out[0]


def connect(name: str, port: int, timeout_s: float = 60) -> redis.Client:
    """A client in that namespace; it may be used from anywhere."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            client: redis.Client = within(name, lambda: redis.Client(port, host=network.SHARED))
            client("PING")
            return client
        except (OSError, redis.RedisError):
            if time.monotonic() > end:
                raise


def filled(client: redis.Client, megabytes: int) -> int:
    return redis.populate_by(client, megabytes)


def address_moves(hosts: network.Network) -> None:
    network.run("ip", "-n", hosts.near, "addr", "del", f"{network.SHARED}/24", "dev", hosts.device)
    network.run("ip", "-n", hosts.far, "addr", "add", f"{network.SHARED}/24", "dev", hosts.device)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["clone", "move"])
def test_over_ssh_between_two_namespaces(
    hosts: network.Network, place: Path, quiet: Path, copies: Any, verb: str
) -> None:
    # there the address is not up yet: the copy binds it all the same
    for name in (hosts.near, hosts.far):
        network.run(*hosts.within(name, "sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1"))
    with far_redis(hosts, place) as (process, port):
        with connect(hosts.near, port) as client:
            keys = redis.populate_by(client, MEGABYTES)
            before = redis.digests_by(client, keys)
            client("SET", "counter", 41)
        done = tuimig(
            verb,
            process.pid,
            hosts.destination,
            "--tcp",
            "close",
            "--remote-command",
            hosts.remote_command,
            before=hosts.within(hosts.near),
            env=hosts.environment(quiet),
        )
        copies.add(done.report)
        if verb == "move":
            assert process.wait(10) == -9
        else:
            with connect(hosts.near, port) as client:
                assert redis.digests_by(client, keys) == before
                assert client("INCR", "counter") == 42
        address_moves(hosts)
        with connect(hosts.far, port) as client:
            assert redis.digests_by(client, keys) == before
            assert client("INCR", "counter") == 42
    assert list(hosts.runtime.iterdir()) == []


@pytest.mark.slow
def test_over_ssh_where_there_is_no_tuimig(hosts: network.Network, place: Path, quiet: Path) -> None:
    near: dict[str, Any] = {"before": hosts.within(hosts.near), "env": hosts.environment(quiet)}
    null = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "60"], stdin=null, stdout=null, stderr=null) as sleeper:
        try:
            words = ("clone", sleeper.pid, hosts.destination, "--remote-command", "/nowhere/tuimig")
            done = tuimig(*words, expect=1, **near)
            assert "no connection could be made: " in done.stderr
            assert "say where it is: --remote-command" in done.stderr
            done = tuimig("clone", sleeper.pid, "ssh://127.0.0.1:1", expect=1, **near)
            assert "Connection refused. Start sshd there" in done.stderr
        finally:
            sleeper.kill()


def test_all_that_stands_in_the_way_is_said_at_once(
    server: redis.Redis, listening: Listening, quiet: Path, place: Path
) -> None:
    """The port is in use there: said before the freeze, with exit code 5, and the source was not touched."""
    done = tuimig("clone", server.pid, listening.text, expect=5, env=listening.env)
    names = {obstacle["name"] for obstacle in done.report["obstacles"]}
    assert names == {"port"}
    assert "--map-port" in done.stderr
    with server.client() as client:
        assert client("PING") == "PONG"


def test_nobody_receives_there(server: redis.Redis, quiet: Path, place: Path) -> None:
    done = tuimig("move", server.pid, f"unix:{place}/nobody", expect=1, temporary=quiet)
    assert "tuimig receive --listen" in done.stderr
    with server.client() as client:
        assert client("PING") == "PONG"


def test_what_is_no_tuimig_is_recognised(server: redis.Redis, quiet: Path, place: Path) -> None:
    """A login script that prints, or another program behind the socket."""
    path = place / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"Welcome to this host!\n" * 3)
                connection.recv(1)

        thread = threading.Thread(target=talk)
        thread.start()
        done = tuimig("clone", server.pid, f"unix:{path}", expect=1, temporary=quiet)
        thread.join()
    assert "does not speak tuimig's protocol" in done.stderr
