"""Connections that are lost, and sides that are killed, in every phase of a clone and a move: it goes on and is exact,
or ends as docs/moving.md says; never two running copies, never zeros for data, nothing left behind.

The line is a proxy between the source and a listening destination: it can stall, be cut, and refuse.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.command import start, tuimig
from harness.destinations import Listening
from harness.pictures import undisturbed
from harness.progress import sound
from harness.targets import Target, ask

PAGES = 6000
PATIENCE_S = 60.0


class Line:
    """A unix socket that passes bytes on to another one. `cut` ends every connection; while `closed`, none is made."""

    def __init__(self, path: Path, to: Path) -> None:
        self.path, self._to = path, to
        self.closed = False
        self.bytes = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._quit = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.closed:
                near.close()
                continue
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._to))
            except OSError:
                near.close()
                far.close()
                continue
            with self._lock:
                self._pairs.append((near, far))
            threading.Thread(target=self._pass, args=(near, far), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 18):
                sink.sendall(data)
                self.bytes += len(data)
        except OSError:
            pass
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._quit = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


@pytest.fixture
def listening(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[Listening]:
    need(root=True)
    made = Listening(place, quiet)
    yield made
    made.close()


@pytest.fixture
def line(place: Path, listening: Listening) -> Iterator[Line]:
    made = Line(place / "line", listening.path)
    yield made
    made.close()


class Transfer:
    """A running clone or move of a churn target, and its events as they come."""

    def __init__(self, verb: str, target: Target, to: str, place: Path, env: dict[str, str], *options: str) -> None:
        self.verb, self.target = verb, target
        self.control = place / f"copy{os.urandom(2).hex()}.control"
        self.events_path = place / "events"
        self.events_path.unlink(missing_ok=True)
        os.mkfifo(self.events_path)
        self._events = os.open(self.events_path, os.O_RDWR | os.O_CLOEXEC)
        mapping = ("--map-path", f"{target.control}={self.control}", "--yes", "--events", str(self.events_path))
        self.process = start(verb, target.pid, to, *mapping, *options, env=env)
        self.events: list[dict[str, Any]] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._end, daemon=True).start()

    def _read(self) -> None:
        with os.fdopen(self._events) as lines:
            for text in lines:
                with self._came:
                    try:
                        self.events.append(json.loads(text))
                    except ValueError:
                        continue  # killed in the middle of a line
                    self._came.notify_all()
                    if self.events[-1]["event"] == "over":
                        return

    def _end(self) -> None:
        """The pipe has two ends here: it is over when the process is, not when nobody writes."""
        self.process.wait()
        os.write(self._events, b'\n{"event": "over"}\n')

    def until(self, moment: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether such an event came before the end."""
        seen = 0
        with self._came:
            while True:
                while seen < len(self.events):
                    if moment(self.events[seen]):
                        return True
                    if self.events[seen]["event"] == "over":
                        return False
                    seen += 1
                assert self._came.wait(120), "nothing happens"

    def outcome(self) -> tuple[int, dict[str, Any], str]:
        out, err = self.process.communicate(timeout=120)
        self._reader.join(10)
        return self.process.returncode, json.loads(out) if out.strip() else {}, err


def is_phase(name: str, side: str = "source") -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["event"] == "phase" and (e["name"], e["side"]) == (name, side)


def is_handover(there: str) -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["event"] == "handover" and e["destination"] == there


PHASES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "frozen": lambda e: e["event"] == "frozen",
    "building": is_phase("restore", "destination"),
    "filling": is_phase("fill", "destination"),
}
MOVE_PHASES = {**PHASES, "built": is_handover("built"), "told": is_handover("told"), "running": is_handover("running")}


FEW = {"clone": ("building", "filling"), "move": ("built", "running")}
FEW_EARLY = {"clone": ("first round", "freeze"), "move": ("later round",)}
HOW_MANY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["few", "every"])


def chosen(verb: str, every: bool) -> dict[str, Callable[[dict[str, Any]], bool]]:
    phases = MOVE_PHASES if verb == "move" else PHASES
    return phases if every else {name: phases[name] for name in FEW[verb]}


def chosen_early(verb: str, every: bool) -> dict[str, Callable[[dict[str, Any]], bool]]:
    return EARLY_PHASES if every else {name: EARLY_PHASES[name] for name in FEW_EARLY[verb]}


def churn(targets: Callable[..., Target]) -> Target:
    return targets("churn", "--pages", PAGES, "--writers", 2, "--churn", "map,thread", "--pace", 500)


# slow enough that every phase lasts
SLOW = ("--bandwidth", "12MiB", "--precopy", "off")
# all but a few pages go before T0; in rounds of a stated number, as a busy machine may leave little for a second one
EARLY = ("--bandwidth", "40MiB", "--precopy", "4")
EARLY_PHASES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "first round": lambda e: e["event"] == "progress" and e.get("sent_pages", 0) > 1000,
    "later round": lambda e: e["event"] == "round" and e["number"] >= 1,
    "freeze": is_phase("freeze"),
}


def went_well(transfer: Transfer, name: str, copies: Any) -> dict[str, Any]:
    code, report, words = transfer.outcome()
    assert code == 0, f"{name}: {words}"
    copies.add(report)
    return report


def is_exact(transfer: Transfer, copies: Any) -> None:
    """The copy is sound, and its source runs on as before, or has ended; both are let go of."""
    target = transfer.target
    sound(ask(transfer.control, "check"))
    if transfer.verb == "clone":
        sound(target.ask("check"))
        undisturbed(target.pid)
    else:
        assert target.process.wait(10) == -9
    target.stop()
    copies.end()


@pytest.mark.slow
@HOW_MANY
@pytest.mark.parametrize("verb", ["clone", "move"])
def test_a_cut_line_is_made_again(
    targets: Callable[..., Target],
    line: Line,
    listening: Listening,
    place: Path,
    quiet: Path,
    copies: Any,
    verb: str,
    every: bool,
) -> None:
    """Cut in each phase, refused for a while, mended: it goes on by itself and the copy is exact."""
    for number, (name, moment) in enumerate(chosen(verb, every).items()):
        target = churn(targets)
        options = ("--guard", "on") if number % 2 else ()
        transfer = Transfer(verb, target, f"unix:{line.path}", place, listening.env, *SLOW, *options)
        assert transfer.until(moment), f"{name}: {transfer.outcome()}"
        line.closed = True
        line.cut()
        assert transfer.until(lambda e: e["event"] == "connection" and e["state"] == "lost") or transfer.verb
        line.closed = False
        went_well(transfer, name, copies)
        is_exact(transfer, copies)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what: Callable[[], bool], why: str, timeout_s: float = PATIENCE_S) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until, why
        select.select([], [], [], 0.01)


def copy_of(target: Target) -> list[psutil.Process]:
    """Processes with the target's command line besides itself."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        same = process.pid != target.pid and process.info["cmdline"] == target.process.args
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def left_in_doubt(pid: int, journal: Path, env: dict[str, str]) -> None:
    """What the command says of a source that a move has left stopped."""
    rows = {row["path"]: row for row in tuimig("journals", env=env).report}
    row = rows[str(journal)]
    assert (row["state"], row["pid"], row["process"], row["moving"]) == ("doubt", pid, "stopped", False)
    assert f"kill -CONT {pid}" in row["todo"]
    found = {one["name"]: one for one in tuimig("check", pid, env=env, expect=None).report["obstacles"]}
    assert str(journal) in found["move-in-doubt"]["where"]
    assert "--yes" in tuimig("journals", "--clear", row["session"], env=env, expect=2).stderr
    assert journal.exists()


@pytest.mark.slow
@HOW_MANY
@pytest.mark.parametrize("verb", ["clone", "move"])
def test_a_line_that_is_gone_for_good(
    targets: Callable[..., Target], line: Line, listening: Listening, place: Path, quiet: Path, verb: str, every: bool
) -> None:
    """The documented outcome on both sides, and nothing left."""
    for name, moment in chosen(verb, every).items():
        target = churn(targets)
        transfer = Transfer(verb, target, f"unix:{line.path}", place, listening.env, *SLOW, "--reconnect", "1")
        assert transfer.until(moment), f"{name}: {transfer.outcome()}"
        line.closed = True
        line.cut()
        code, _, words = transfer.outcome()
        after = verb == "move" and name in ("told", "running", "filling")
        if verb == "move" and name == "built" and code == 6:
            after = True  # the hand-over went out before the line was cut
        assert code == (6 if after else 1), f"{name}: {code} {words}"
        wait_for(lambda: not listening.receivers(), f"{name}: a receiver is left")
        wait_for(lambda target=target: not copy_of(target), f"{name}: a copy is left")
        if after:
            assert psutil.Process(target.pid).status() == psutil.STATUS_STOPPED, name
            assert "kill -CONT" in words
            journals = list(listening.runtime.glob("tuimig/*source.json"))
            assert journals, name
            assert str(journals[0]) in words
            left_in_doubt(target.pid, journals[0], listening.env)
            target.signal(signal.SIGCONT)
        else:
            undisturbed(target.pid)
        sound(target.ask("check"))
        target.stop()
        for path in listening.runtime.glob("tuimig/*"):
            assert after, f"{name}: {path} is left"
            path.unlink()
        line.closed = False


@pytest.mark.slow
@HOW_MANY
@pytest.mark.parametrize("verb", ["clone", "move"])
@pytest.mark.parametrize("who", ["source", "receiver"])
def test_kills(
    targets: Callable[..., Target], listening: Listening, place: Path, quiet: Path, verb: str, who: str, every: bool
) -> None:
    """SIGKILL to one side in each phase."""
    chance = random.Random(3)
    for name, moment in chosen(verb, every).items():
        target = churn(targets)
        transfer = Transfer(verb, target, listening.text, place, listening.env, *SLOW, "--reconnect", "1")
        assert transfer.until(moment), f"{name}: {transfer.outcome()}"
        select.select([], [], [], chance.random() * 0.05)  # not a synchronisation: a random moment
        if who == "source":
            transfer.process.kill()
        else:
            for process in listening.receivers():
                process.kill()
        code, _, words = transfer.outcome()
        never_two_running(target, listening, verb, f"{name}: {code} {words}")
        target.signal(signal.SIGCONT)
        if target.process.poll() is None:
            sound(target.ask("check"))
            undisturbed(target.pid)
        target.stop()
        for path in listening.runtime.glob("tuimig/*"):
            path.unlink()


def never_two_running(target: Target, listening: Listening, verb: str, why: str) -> None:
    """Looked at until the receivers are gone; a clone's source runs all the time."""

    def over() -> bool:
        copies = [c for c in copy_of(target) if c.is_running()]
        with contextlib.suppress(psutil.NoSuchProcess):
            status = psutil.Process(target.pid).status()
            running = status not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_TRACING_STOP)
            if verb == "clone":
                assert running, why
            elif running:
                # a copy that is being built is stopped by its builder
                assert not [c for c in copies if c.status() not in (psutil.STATUS_TRACING_STOP,)] or still_building(
                    copies
                ), why
        return not listening.receivers() and not copies

    wait_for(over, f"{why}: something is left", 40)


def still_building(copies: list[psutil.Process]) -> bool:
    """A tracer holds it: it has not run an instruction of its own."""
    for copy in copies:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            text = Path(f"/proc/{copy.pid}/status").read_text()
            if "TracerPid:\t0\n" in text:
                return False
    return True


@pytest.mark.slow
@HOW_MANY
@pytest.mark.parametrize("verb", ["clone", "move"])
def test_a_line_that_is_cut_before_t0(
    targets: Callable[..., Target],
    line: Line,
    listening: Listening,
    place: Path,
    quiet: Path,
    copies: Any,
    verb: str,
    every: bool,
) -> None:
    """While pages go over that may still change: what was on its way goes again, and the copy is exact."""
    for name, moment in chosen_early(verb, every).items():
        target = churn(targets)
        transfer = Transfer(verb, target, f"unix:{line.path}", place, listening.env, *EARLY, "--streams", "2")
        assert transfer.until(moment), f"{name}: {transfer.outcome()}"
        line.closed = True
        line.cut()
        transfer.until(lambda e: e["event"] == "connection" and e["state"] == "lost")
        line.closed = False
        report = went_well(transfer, name, copies)
        assert report["reconnects"] >= 1, name
        assert report["precopy_sent"] > PAGES * 4096 // 2, name
        told = [e for e in transfer.events if e["event"] == "progress" and e["side"] == "destination"]
        early = [(e["pages_done"], e["pages_total"]) for e in told if e["phase"] == "precopy"]
        assert early, name
        assert all(done <= total >= PAGES for done, total in early), name
        is_exact(transfer, copies)


@pytest.mark.slow
@HOW_MANY
@pytest.mark.parametrize("verb", ["clone", "move"])
@pytest.mark.parametrize("what", ["line", "source", "receiver"])
def test_an_end_before_t0(
    targets: Callable[..., Target],
    line: Line,
    listening: Listening,
    place: Path,
    quiet: Path,
    verb: str,
    what: str,
    every: bool,
) -> None:
    """The line is gone for good, or one side is killed: the source runs on, and nothing is left there."""
    for name, moment in chosen_early(verb, every).items():
        target = churn(targets)
        transfer = Transfer(verb, target, f"unix:{line.path}", place, listening.env, *EARLY, "--reconnect", "1")
        assert transfer.until(moment), f"{name}: {transfer.outcome()}"
        if what == "source":
            transfer.process.kill()
        elif what == "receiver":
            for process in listening.receivers():
                process.kill()
        line.closed = True
        line.cut()
        code, _, words = transfer.outcome()
        if what == "source" or name != "freeze":  # the freeze may be over by now: then the journal says what is
            assert code == (-9 if what == "source" else 1), f"{name}: {code} {words}"
        never_two_running(target, listening, verb, f"{name}: {code} {words}")
        target.signal(signal.SIGCONT)
        if target.process.poll() is None:
            sound(target.ask("check"))
            undisturbed(target.pid)
        target.stop()
        for path in listening.runtime.glob("tuimig/*"):
            path.unlink()
        line.closed = False


@pytest.mark.slow
def test_a_cancel_before_t0(targets: Callable[..., Target], listening: Listening, place: Path) -> None:
    """While pages go over streams: these end before what they read."""
    target = churn(targets)
    for number in range(5):
        options = ("--precopy", "1000", "--streams", "4", "--bandwidth", f"{60 + 20 * number}MiB")
        transfer = Transfer("clone", target, listening.text, place, listening.env, *options)
        assert transfer.until(lambda e, number=number: e["event"] == "round" and e["number"] == number % 3)
        transfer.process.send_signal(signal.SIGINT)
        code, _, words = transfer.outcome()
        assert code == 130, f"{number}: {code} {words}"
        wait_for(lambda: not listening.receivers(), "a receiver is left", 10)
    undisturbed(target.pid)
    sound(target.ask("check"))


@pytest.mark.slow
def test_a_cancelled_clone_is_let_go_of_there(
    targets: Callable[..., Target], listening: Listening, place: Path
) -> None:
    """At once, not when a lost source would be given up."""
    target = targets("ballast", "--mb", 64)
    mapping = (
        "--map-path",
        f"{target.control}={place}/copy",
        "--bandwidth",
        "1MiB",
        "--guard",
        "on",
        "--precopy",
        "off",
    )
    running = start("clone", target.pid, listening.text, *mapping, env=listening.env)
    wait_for((place / "copy").exists, "it does not run there")
    running.send_signal(signal.SIGINT)
    _, words = running.communicate(timeout=30)
    assert running.returncode == 130, words
    wait_for(lambda: not listening.receivers(), "the destination waits for a source that has given up", 30)
    assert not copy_of(target)


@pytest.mark.slow
def test_poison_keeps_what_needs_no_missing_page(
    targets: Callable[..., Target], line: Line, listening: Listening, place: Path, quiet: Path
) -> None:
    """--on-loss poison: the copy goes on; who touches a page that never came gets SIGBUS, never zeros."""
    target = churn(targets)
    options = ("--reconnect", "1", "--on-loss", "poison", "--guard", "on")
    transfer = Transfer("clone", target, f"unix:{line.path}", place, listening.env, *SLOW, *options)
    assert transfer.until(is_phase("fill", "destination"))
    line.closed = True
    line.cut()
    code, _, words = transfer.outcome()
    assert code == 1, words
    wait_for(lambda: not listening.receivers(), "a receiver is left")
    # its writers go over all pages: it meets a missing one soon, and dies of it
    wait_for(lambda: not copy_of(target), "the copy reads what it cannot have")
    assert "poisoned" in listening.words.read_text()
    undisturbed(target.pid)
    sound(target.ask("check"))
