"""Clones and moves over a unix socket and over ssh between two network namespaces: how soon the copy runs, whether that
grows with size, how quick demands are and how fast pages come, against what the same kind of connection carries raw.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Figures, arguments, ballast, directory, ended, warm
from harness import network
from harness.command import start, tuimig
from harness.destinations import Listening
from harness.targets import Target, ask

PAGE = 4096
TRIPS = 5000
WRITES = 20_000
CHUNK = 64 * PAGE  # bytes of a frame of the background
FELT_S = 3.0
AFTER = ("--precopy", "off")  # all pages go after T0


def ping_pong() -> float:
    """One 4 KiB page for 32 bytes over a unix socket between two processes: p50 of the round trip, microseconds."""
    near, far = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        near.close()
        page = bytes(PAGE)
        while far.recv(32):
            far.sendall(page)
        os._exit(0)
    far.close()
    took, into = [], bytearray(PAGE)
    for _ in range(TRIPS):
        begin = time.perf_counter_ns()
        near.sendall(bytes(32))
        left = memoryview(into)
        while left:
            left = left[near.recv_into(left) :]
        took.append(time.perf_counter_ns() - begin)
    near.close()
    os.waitpid(pid, 0)
    return statistics.median(took) / 1000


def raw_unix(megabytes: int, *, placed: bool = False) -> float:
    """GB/s from a file in memory through a unix socket into memory of another process, always the same.

    `placed`: from there into a file in memory that is new, as whatever keeps what comes must do it.
    """
    near, far = socket.socketpair()
    for sock in (near, far):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    size = megabytes << 20
    pid = os.fork()
    if pid == 0:
        near.close()
        into, kept, end = memoryview(bytearray(1 << 20)), os.memfd_create("placed"), 0
        while got := far.recv_into(into):
            if placed:
                end += os.pwrite(kept, into[:got], end)
        os._exit(0)
    far.close()
    file = os.memfd_create("raw")
    os.pwrite(file, os.urandom(1 << 20) * megabytes, 0)
    begin, at = time.perf_counter(), 0
    while at < size:
        at += os.sendfile(near.fileno(), file, at, size - at)
    near.close()
    os.waitpid(pid, 0)
    os.close(file)
    return size / 1e9 / (time.perf_counter() - begin)


def raw_ssh(hosts: network.Network, place: Path, megabytes: int) -> float:
    """GB/s of `ssh cat`."""
    env = hosts.environment(place)
    command = ["ssh", "-p", network.PORT, f"root@{network.FAR}", "cat > /dev/null"]
    begin = time.perf_counter()
    process = subprocess.Popen(hosts.within(hosts.near, *command), stdin=subprocess.PIPE, env=env)
    assert process.stdin
    block = os.urandom(1 << 20)
    for _ in range(megabytes):
        process.stdin.write(block)
    process.stdin.close()
    process.wait()
    return megabytes * (1 << 20) / 1e9 / (time.perf_counter() - begin)


class Way:
    """One kind of connection: how a verb is run over it."""

    def __init__(self, name: str, to: str, env: dict[str, str], before: Sequence[str], options: Sequence[str]) -> None:
        self.name, self._to, self._env, self.before, self._options = name, to, env, before, options

    def _arguments(self, target: Target, control: Path, verb: str, *options: str) -> list[str | int | Path]:
        return [verb, target.pid, self._to, "--map-path", f"{target.control}={control}", *self._options, *options]

    def start(self, target: Target, control: Path, verb: str, *options: str) -> subprocess.Popen[str]:
        arguments = self._arguments(target, control, verb, *options)
        return start(*arguments, env=self._env, before=self.before)

    def run(self, place: Path, verb: str, megabytes: int, *options: str) -> dict[str, Any]:
        with ballast(place, megabytes, before=self.before) as target:
            control = place / f"copy{os.urandom(2).hex()}"
            report = tuimig(*self._arguments(target, control, verb, *options), env=self._env, before=self.before).report
            try:
                answer = ask(control, "check")
                if answer["problems"]:
                    raise SystemExit(f"the copy's content is wrong: {answer['first']}")
            finally:
                ended(report)
            return report


# How pages go: before T0 for the most part, or all after it.
RUNS = (
    ("clone", "", ()),
    ("move", "", ()),
    ("clone", " without pre-copy", ("--guard", "on", "--precopy", "off")),
    ("move", " without pre-copy", ("--precopy", "off")),
)


def pages_per_second(report: dict[str, Any]) -> float:
    """GB/s: of what went before T0, until the first round had gone; else of all, until it was filled."""
    if report["precopy"]:
        return float(report["precopy_sent"]) / report["precopy"]["rounds"][1]["since_us"] / 1000
    return float(report["bytes_sent"]) / (report["downtime_us"] + report["fill_us"]) / 1000


def measure(
    figures: Figures, place: Path, way: Way, sizes: Sequence[int], rounds: int, raw: float, placed: float = 0
) -> None:
    for verb, how, options in RUNS:
        by_size = []
        for size in sizes:
            reports = [way.run(place, verb, size, *options) for _ in range(rounds)]
            arming = statistics.median(r["frozen"].get("arm", 0) for r in reports) / 1000
            soon = statistics.median(r["downtime_us"] for r in reports) / 1000
            by_size.append(soon - arming)
            name = f"{way.name}, {verb} of {size} MB{how}: T0 to the first instruction there"
            if verb == "move" and way.name == "unix" and size == 1024:
                figures.at_most(name, soon, 120, "ms")
            else:
                figures.context(name, soon, "ms")
            if verb == "move" and size == sizes[-1]:
                whole = statistics.median(map(pages_per_second, reports))
                figures.at_least(f"{way.name}, {verb}{how}: pages, of the raw connection", whole / raw, 0.6, "x")
                if placed:
                    figures.context(f"{way.name}, {verb}{how}: of it into new memory", whole / placed, "x")
        slope = (by_size[-1] - by_size[0]) / ((sizes[-1] - sizes[0]) / 1024)
        figures.at_most(f"{way.name}, {verb}{how}: growth with size beyond arming", slope, 10, "ms/GB")


def touched_while_it_comes(place: Path, way: Way, megabytes: int) -> dict[str, Any]:
    """A clone that writes to random pages of its memory while the background brings little."""
    with ballast(place, megabytes) as target:
        control = place / "touched"
        running = way.start(target, control, "clone", "--bandwidth", "16MiB", "--guard", "on", *AFTER)
        while not control.exists():
            time.sleep(0.005)
        ask(control, f"begin {WRITES}")
        words, errors = running.communicate(timeout=300)
        ask(control, "end")
        answer = ask(control, "check")
        if running.returncode or answer["problems"]:
            raise SystemExit(f"{answer}\n{errors}")
        report: dict[str, Any] = json.loads(words)
        ended(report)
        return report


def demands(figures: Figures, place: Path, way: Way) -> None:
    trip = statistics.median(ping_pong() for _ in range(5))
    report = touched_while_it_comes(place, way, 256)
    figures.context("demand faults", report["demand_faults"], "")
    figures.context("raw round trip of a page, p50", trip, "us")
    figures.at_most("demand's round trip, p50, of the raw one", report["round_trip_us"]["p50"] / trip, 2.5, "x")


def felt_p99_ms(place: Path, way: Way, megabytes: int, *options: str) -> float:
    """p99 of what a write to a page that has not come costs the copy; the transfer is then cancelled."""
    with ballast(place, megabytes, before=way.before) as target:
        control = place / f"felt{os.urandom(2).hex()}"
        running = way.start(target, control, "clone", "--guard", "on", *AFTER, *options)
        while not control.exists() and running.poll() is None:
            time.sleep(0.005)
        if running.poll() is not None:
            raise SystemExit(running.communicate()[1])
        ask(control, "begin 1000000000")
        time.sleep(FELT_S)
        answer = ask(control, "end")
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
        return float(answer["p99_us"]) / 1000


def narrow(figures: Figures, place: Path, way: Way, hosts: network.Network) -> None:
    """The background fills the line; a demand may wait for one chunk of it."""
    for rate, bits in (("1gbit", 1e9), ("100mbit", 1e8)):
        hosts.limit(rate)
        idle = felt_p99_ms(place, way, 1024, "--bandwidth", "64KiB")
        busy = felt_p99_ms(place, way, 1024)
        chunk = CHUNK * 8 / bits * 1000
        figures.context(f"{rate}: p99 of a demand, idle line", idle, "ms")
        figures.at_most(f"{rate}: p99 of a demand, line full", busy, 3 * idle + chunk, "ms")


def main() -> int:
    options = arguments(__doc__ or "", sizes="256,1024,4096")
    sizes = [int(text) for text in options.sizes.split(",")]
    figures = Figures("to another host")
    with directory() as place:
        listening = Listening(place, place)
        hosts = network.Network(place)
        try:
            unix = Way("unix", listening.text, listening.env, (), ())
            ssh = Way(
                "ssh",
                hosts.destination,
                hosts.environment(place),
                hosts.within(hosts.near),
                ("--remote-command", hosts.remote_command),
            )
            warm(2048)
            raw = statistics.median(raw_unix(1024) for _ in range(options.rounds))
            placed = statistics.median(raw_unix(1024, placed=True) for _ in range(options.rounds))
            raw_by_ssh = statistics.median(raw_ssh(hosts, place, 512) for _ in range(options.rounds))
            figures.context("unix, raw", raw, "GB/s")
            figures.context("unix, raw, into new memory", placed, "GB/s")
            figures.context("ssh cat", raw_by_ssh, "GB/s")
            measure(figures, place, unix, sizes, options.rounds, raw, placed)
            measure(figures, place, ssh, sizes, options.rounds, raw_by_ssh)
            demands(figures, place, unix)
            narrow(figures, place, ssh, hosts)
        finally:
            hosts.close()
            listening.close()
    return figures.show(options.json)


if __name__ == "__main__":
    sys.exit(main())
