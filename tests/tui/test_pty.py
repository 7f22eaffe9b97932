"""The real console in a real terminal: what a person does by keys, and what happens when the terminal goes away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import redis
from harness.command import argv, environment
from harness.destinations import Listening
from harness.pictures import undisturbed
from harness.targets import Target, end
from harness.terminal import DOWN, ENTER, ESCAPE, LEAVE, RIGHT, Terminal

MANY = 10**12
LONG_MB = 1500  # a capture of so much lasts about a second

Start = Callable[..., Terminal]


@pytest.fixture
def terminal(place: Path, quiet: Path) -> Iterator[Start]:
    started: list[Terminal] = []

    def start(*args: str | int | Path, **more: Any) -> Terminal:
        started.append(Terminal(*args, home=place, temporary=quiet, **more))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def server(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[redis.Redis]:
    need("redis-server", root=True)
    made = redis.Redis(place / "redis")
    yield made
    made.stop()


@pytest.fixture
def busy(targets: Callable[..., Target], need: Callable[..., None]) -> Target:
    """Much memory that is written to all the time."""
    need(root=True)
    target = targets("ballast", "--mb", LONG_MB)
    target.ask(f"begin {MANY}")
    return target


def sound(target: Target) -> None:
    before = target.ask("end")["writes"]
    assert target.ask("hammer 1000")["writes"] == before + 1000
    assert target.ask("check")["problems"] == 0
    undisturbed(target.pid)


def eager_below(shown: Terminal) -> str:
    return str(shown.until(r"eager below (\S+( [KMG]iB)?)")[1])


def narrow(shown: Terminal, text: str) -> None:
    shown.press("/")
    shown.until("/ [a-z, ]+; regex|/ text, regex")
    shown.press(text)
    shown.until("/ " + re.escape(text))


def answer(shown: Terminal, label: str, key: str, then: str = "") -> None:
    """Moves to a button, and once it has the focus presses `then`."""
    before = shown.look_of(label)
    shown.press(key)
    shown.until(lambda: shown.look_of(label) != before)
    shown.press(then)


def test_a_whole_migration_by_keys(terminal: Start, server: redis.Redis) -> None:
    keys = redis.populate(server.port, 30)
    before = redis.digests(server.port, keys)
    shown = terminal()
    # pick it
    shown.until("redis-server")
    narrow(shown, f"redis-server.*:{server.port}")
    shown.until(r"1 process of \d+")
    shown.press(ENTER)
    shown.until(rf"{server.pid} \S+ \S .* yes redis-server")
    shown.press(ENTER)
    shown.until(rf"regions {server.pid} redis-server \d+ regions")
    # the threshold, and one region
    first = eager_below(shown)
    shown.press("]")
    shown.until(lambda: eager_below(shown) != first)
    narrow(shown, "protected default")
    shown.press(ENTER)
    shown.until(r"L Launch")  # the table has the keys again
    start = str(shown.until(r"W protect\w* .* ([0-9a-f]{8,12})-[0-9a-f]{8,12} ")[1])
    eager = int(shown.until(r"E [\d.]+ \S+ in (\d+)")[1])
    shown.press("e")
    shown.until(rf"E [\d.]+ \S+ in {eager + 1}\b")
    shown.press(ESCAPE)
    shown.until(lambda: not re.search("/ protected", shown.words))
    narrow(shown, start)
    shown.press(ENTER)
    shown.until(r"L Launch")
    shown.until(rf"{start} .* E eager .* eager: .*\(rule: key\)")
    # launch
    shown.press("L")
    new = int(shown.until(rf"{server.port}:(\d+) ")[1])
    shown.until(f"stops for about .* A copy of it will run on this host, listening on {new} for {server.port}")
    shown.press_launch()
    shown.until(rf"summary clone of {server.pid}")
    copy = int(shown.until(r"the copy process (\d+)")[1])
    shown.until(rf"its ports {new} for {server.port}")
    # it is the same
    assert redis.digests(new, keys) == before
    with redis.connect(server.port) as source, redis.connect(new) as copied:
        source("SET", "who", "source")
        copied("SET", "who", "copy")
        assert (source("GET", "who"), copied("GET", "who")) == (b"source", b"copy")
    # end it
    shown.press("k")
    shown.until("End the copy, process")
    answer(shown, "End the copy ", RIGHT, ENTER)
    shown.until(f"process {copy}, has been ended; process {server.pid} runs on")
    shown.until(lambda: not psutil.pid_exists(copy))
    assert redis.digests(server.port, keys) == before
    undisturbed(server.pid)
    shown.press("q")
    assert shown.ended() == 0
    assert LEAVE in shown.raw
    assert shown.cooked


def test_a_move_by_keys(terminal: Start, server: redis.Redis, place: Path, quiet: Path, copies: Any) -> None:
    keys = redis.populate(server.port, 30)
    before = redis.digests(server.port, keys)
    listening = Listening(place, quiet)
    try:
        shown = terminal("--pid", server.pid)
        shown.until(rf"regions {server.pid} redis-server \d+ regions")
        shown.press("L")
        shown.until(rf"{server.port}:\d+ ")
        shown.press(RIGHT, RIGHT, RIGHT)
        shown.until(r"\(\*\) move to .* ssh://host or unix:/path")
        new = redis.free_port()
        shown.press(DOWN, listening.text, DOWN, f"{server.port}:{new}")
        shown.until(f"stops, goes on at {listening.text}, and is ended here")
        shown.press_launch()
        shown.until(f"Move process {server.pid} .* It stops now")
        answer(shown, "Move it", RIGHT, ENTER)
        shown.until(rf"summary move of {server.pid}", 60)
        copy = int(shown.until(rf"the copy process (\d+) at {listening.text}")[1])
        shown.until(rf"the source process {server.pid} has ended")
        assert "End the copy" not in shown.words
        copies.add({"new_pid": copy, "init_pid": psutil.Process(copy).ppid()})
        assert redis.digests(new, keys) == before
        assert not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE
        shown.press("q")
        assert shown.ended() == 0
    finally:
        listening.close()


def running(terminal: Start, target: Target, place: Path) -> tuple[Terminal, psutil.Process]:
    """A snapshot is being made of the target into `snap`; the console, and its session process."""
    shown = terminal("--pid", target.pid)
    shown.until(rf"regions {target.pid} ballast\S* \d+ regions")
    shown.press("L")
    shown.until("stops for about")
    shown.press(RIGHT)
    name = str(shown.until(r"Directory (\S+)")[1])
    shown.press(DOWN, *["\x7f"] * len(name))
    shown.until("a directory is needed")
    shown.press(f"{place}/snap")
    shown.until(f"go to {place}/snap")
    shown.press(DOWN, DOWN, RIGHT)  # no pre-copy, so that the capture is long
    shown.until(r"Pre-copy \( \) auto \(\*\) off")
    shown.press_launch()
    shown.until("▶capture")
    workers = psutil.Process(shown.process.pid).children()
    assert len(workers) == 1, workers
    return shown, workers[0]


@pytest.mark.parametrize("way", ["hangup", "term"])
def test_the_terminal_goes_away(terminal: Start, busy: Target, place: Path, way: str) -> None:
    shown, worker = running(terminal, busy, place)
    if way == "hangup":
        shown.hang_up()
        assert shown.process.wait(20) == 128 + signal.SIGHUP
    else:
        shown.process.send_signal(signal.SIGTERM)
        assert shown.ended(20) == 128 + signal.SIGTERM
        assert LEAVE in shown.raw
        assert shown.cooked
    psutil.wait_procs([worker], 30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE  # nobody has reaped it yet
    assert not (place / "snap").exists()
    sound(busy)


def test_a_terminal_that_nobody_reads_holds_up_nothing(terminal: Start, busy: Target, place: Path) -> None:
    shown, worker = running(terminal, busy, place)
    limit = time.monotonic() + 60
    while not (place / "snap" / "manifest.json").exists():
        assert time.monotonic() < limit
        assert worker.is_running()
        time.sleep(0.01)  # between two looks at a file
    shown.until(rf"summary snapshot of {busy.pid}")
    sound(busy)


def test_the_end_by_force_gives_the_terminal_back(terminal: Start) -> None:
    """The terminal takes nothing any more, so that the orderly end does not come through."""
    shown = terminal(size=(200, 50))
    shown.until(r"processes \d+ processes")
    for key in ("?", ESCAPE) * 20:
        shown.press(key)
        time.sleep(0.05)  # each makes some KB, more than a pty holds
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(20) == 128 + signal.SIGTERM
    assert LEAVE not in shown.raw
    assert shown.cooked


def test_in_the_background(terminal: Start, busy: Target, place: Path) -> None:
    shown, worker = running(terminal, busy, place)
    shown.press("q")
    shown.until("Quit, let it finish")
    answer(shown, "Cancel it and quit", RIGHT)
    answer(shown, "Quit, let it finish", RIGHT, ENTER)
    assert shown.ended(20) == 0
    report = re.search(rb"goes on. Its report:\s+(\S+)", shown.printed)
    assert report is not None, shown.printed[-400:]
    psutil.wait_procs([worker], 30)
    assert Path(report[1].decode()).is_file()
    assert (place / "snap" / "manifest.json").is_file()
    sound(busy)


def test_a_small_terminal(terminal: Start) -> None:
    shown = terminal(size=(60, 20))
    shown.until("60x20: needs 80x24")
    assert shown.words == "60x20: needs 80x24"
    shown.press("q")
    assert shown.ended() == 0


def test_read_only(terminal: Start, targets: Callable[..., Target]) -> None:
    target = targets("ballast", "--mb", 1)
    shown = terminal("--read-only", "--pid", target.pid)
    shown.until(rf"regions {target.pid} .* read-only")
    shown.press("L")
    shown.until("Read-only: nothing is launched")
    shown.press("h")
    shown.until("Read-only: measuring heat attaches")
    assert psutil.Process(shown.process.pid).children() == []
    shown.press("q")
    assert shown.ended() == 0


def test_ascii(terminal: Start, targets: Callable[..., Target]) -> None:
    target = targets("ballast", "--mb", 1)
    shown = terminal("--ascii", "--pid", target.pid)
    shown.until(rf"regions {target.pid}")
    shown.press("L")
    shown.until("stops for about")
    shown.press(ESCAPE)
    shown.until(rf"regions {target.pid}")
    shown.press("?")
    shown.until("Lower threshold")
    shown.press(ESCAPE)
    shown.until("eager below")
    shown.press("q")
    assert shown.ended() == 0
    assert shown.printed.isascii(), set(shown.printed.decode()) - set(map(chr, range(128)))


def colours(raw: bytes) -> set[int]:
    """Parameters of all SGR sequences that set a colour."""
    found: set[int] = set()
    for parameters in re.findall(rb"\x1b\[([0-9;:]*)m", raw):
        numbers = [int(n or 0) for n in re.split(rb"[;:]", parameters)]
        found |= {n for n in numbers[:1] + numbers[1:] if 30 <= n <= 38 or 40 <= n <= 48 or 90 <= n <= 107}
    return found


def test_no_colour(terminal: Start) -> None:
    shown = terminal(env={"NO_COLOR": "1"})
    shown.until(r"processes \d+ processes .* PID")
    shown.press("?")
    shown.until("Sort left")
    shown.press(ESCAPE)
    shown.until("USER S CPU%")
    shown.press("q")
    assert shown.ended() == 0
    rgb = re.findall(rb"[34]8;2;(\d+);(\d+);(\d+)", bytes(shown.raw))
    assert all(r == g == b for r, g, b in rgb), "only shades of grey"
    assert colours(bytes(shown.raw)) <= {38, 48}


def test_a_bad_configuration(terminal: Start, place: Path) -> None:
    (place / "config" / "tuimig").mkdir(parents=True)
    file = place / "config" / "tuimig" / "config.toml"
    file.write_text('theme = "disco"\n')
    shown = terminal()
    assert shown.ended() == 2
    said = shown.raw.decode()
    assert said.startswith(f"tuimig: {file}: no such theme: 'disco'.")
    assert said.count("\n") == 1


def test_no_terminal(place: Path) -> None:
    done = subprocess.run(
        argv(), stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**environment(), "HOME": str(place)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tuimig: no verb given, and no terminal for the console. See tuimig --help\n"


def test_idle_nothing_is_sent(terminal: Start, place: Path) -> None:
    """Between two refreshes of the list not one byte."""
    shown = terminal("--refresh", "60")
    shown.until(r"processes \d+ processes")
    narrow(shown, f"^{os.getpid()} ")  # only what is shown is judged
    shown.press(ENTER)
    shown.until(rf"{os.getpid()} .* (yes|no|asks) .* I Invert")
    while shown.drain(1.0):
        pass
    assert shown.bytes_during(4.0) == 0
    os.kill(shown.process.pid, signal.SIGTERM)
    assert shown.ended() == 128 + signal.SIGTERM
    end(shown.process.pid)


def test_keys_in_a_burst_are_taken_in_order(terminal: Start, targets: Callable[..., Target]) -> None:
    """As they come over a slow line: each finds the focus where the key before it has left it."""
    target = targets("ballast", "--mb", 8)
    shown = terminal()
    shown.until(r"processes \d+ processes")
    shown.press(f"/{target.pid} {ENTER}" + "?")
    shown.until("Esc|Help")
    shown.press("q")
    shown.until(rf"{target.pid} root S .* yes")
    shown.press(f"{ENTER}L")
    shown.until("stops for about")
    directory = str(target.pid) + ".made-in-a-burst"
    shown.press(RIGHT + DOWN + "\x05" + "\x15" + f"/tmp/{directory}")  # to the end, cut all, another one
    shown.until(rf"go to /tmp/{directory}")


def test_a_demo_opens_the_console_on_its_workload(terminal: Start, need: Callable[..., None]) -> None:
    """The choice of treatments first; what it has started ends with it, copies too."""
    need(root=True)
    shown = terminal("demo", "counter", "--memory", "64M")
    pid = int(shown.until(r"regions (\d+) \S+ \d+ regions")[1])
    shown.until("eager below")
    shown.press("L")
    shown.until("stops for about")
    shown.press_launch()
    shown.until(rf"summary clone of {pid}")
    copy = int(shown.until(r"the copy process (\d+)")[1])
    assert psutil.pid_exists(pid)
    shown.press("q")
    assert shown.ended() == 0
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(copy)
    assert LEAVE in shown.raw
    assert shown.cooked
