"""The command as a process: exit codes, stdout and stderr, signals, what a hostile name can do to the screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuimig import cli
from tuimig.core import errors, model, session
from tuimig.core.model import Fault, FaultKind, Faults, Note, Options, Phase, Progress, Report

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuimig.cli", *words], capture_output=True, text=True, cwd=ROOT, timeout=60, **kwargs
    )


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    yield process.pid
    process.kill()
    process.wait()


def test_usage_is_2_and_words_go_to_stderr() -> None:
    done = run("frobnicate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_is_not_there_is_4() -> None:
    for words in (["maps", "4194304"], ["check", "4194304"], ["clone", "4194304"], ["snapshot", "4194304", "/tmp/no"]):
        done = run(*words)
        assert done.returncode == 4, (words, done.stderr)
        assert "4194304" in done.stderr
    assert not Path("/tmp/no").exists()


def test_a_process_id_beyond_all() -> None:
    done = run("snapshot", str(10**20), "/tmp/no")
    assert done.returncode == 4
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("words", [["ps"], ["ps", "--json"], ["check"]])
def test_an_output_that_takes_nothing(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tuimig", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
    assert done.returncode == 1
    assert "cannot write to the standard output: No space left" in done.stderr


@pytest.mark.parametrize("words", ["ps", "ps --json", "check", "replay examples/hog.rec"])
def test_a_reader_that_has_gone(words: str) -> None:
    command = f"{sys.executable} -m tuimig {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 141
    assert done.stderr == ""


def test_an_interrupt_at_any_moment_of_the_start() -> None:
    for delay in range(8, 30, 2):  # Python itself starts within the first 80 ms
        process = subprocess.Popen(
            [sys.executable, "-m", "tuimig", "check"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        time.sleep(delay / 100)  # not a synchronisation: some moment
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
        ours = [line for line in words.splitlines() if "/tuimig/" in line and "__main__" not in line]
        assert not ours, words


def test_errors_as_json() -> None:
    done = run("maps", "4194304", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"] == "TargetGone"
    assert json.loads(done.stdout)["exit_code"] == 4


def test_maps_names_a_rule_for_every_region(sleeper: int) -> None:
    done = run("maps", str(sleeper), "--json", "--eager", "stack")
    decisions = json.loads(done.stdout)["decisions"]
    assert done.returncode == 0
    assert all(decision["rule"] and decision["why"] for decision in decisions)
    stack = next(d for d in decisions if d["region"]["kind"] == "stack")
    assert (stack["treatment"], stack["rule"]) == ("eager", "--eager stack")
    assert "[stack]" in run("maps", str(sleeper)).stdout


def test_a_bad_policy_file_is_2_with_its_line(sleeper: int, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("\neager_blow = 1\n")
    done = run("maps", str(sleeper), "--policy", str(file))
    assert done.returncode == 2
    assert "p.toml:2" in done.stderr


def test_ps_shows_it(sleeper: int) -> None:
    rows = {row["pid"]: row for row in json.loads(run("ps", "--json").stdout)}
    assert rows[sleeper]["command"] == "sleep 60"
    assert rows[sleeper]["migrate"] in ("yes", "asks", "no")
    assert (rows[sleeper]["migrate"] == "yes") == (not rows[sleeper]["obstacles"])
    assert str(sleeper) in run("ps").stdout


def test_check_of_the_host() -> None:
    done = run("check", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["ok"] else 3)
    assert "userfaultfd" in run("check").stdout


def test_check_finds_what_stands_in_the_way() -> None:
    code = "import os, signal\nif os.fork() == 0: signal.pause()\nprint(flush=True); signal.pause()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        done = run("check", str(process.pid), "--json")
        assert done.returncode == 5
        assert "children" in {obstacle["name"] for obstacle in json.loads(done.stdout)["obstacles"]}
        assert "children" in run("check", str(process.pid)).stdout
        refused = run("clone", str(process.pid))
        assert refused.returncode == 5, refused.stderr
        assert "children" in refused.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_reader_that_has_seen_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -m tuimig.cli ps --json | head -c 1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr == ""


def test_a_hostile_name_does_not_reach_the_terminal() -> None:
    code = "import signal; print(flush=True); signal.pause()"
    process = subprocess.Popen(["\x1b[31m[bold]evil", "-c", code], executable=sys.executable, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        shown = run("ps").stdout
        assert "\x1b" not in shown
        assert "\\x1b[31m[bold]evil" in shown
    finally:
        process.kill()
        process.communicate()


def test_no_snapshot_there(tmp_path: Path) -> None:
    for verb in ("inspect", "verify", "restore"):
        done = run(verb, str(tmp_path / "none"))
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("tuimig: ")
        done = run(verb, str(tmp_path))
        assert done.returncode == 1, done.stderr


def test_a_receiver_says_when_it_is_ready(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tuimig.cli", "receive", "--listen", f"unix:{tmp_path}/sock"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    assert process.stderr.readline() == f"tuimig receive: ready, on unix:{tmp_path}/sock\n"
    taken = run("receive", "--listen", f"unix:{tmp_path}/sock")
    assert taken.returncode == 2
    assert "Remove it if it is a socket that nobody listens on any more" in taken.stderr
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 143
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("missing/sock", "Make its directory first"),
        ("file/sock", "is no directory"),
        ("x" * 200, "Name a shorter path"),
        (".", "or name another path"),
    ],
)
def test_a_place_where_nobody_can_listen(tmp_path: Path, path: str, cure: str) -> None:
    (tmp_path / "file").touch()
    done = run("receive", "--listen", f"unix:{tmp_path}/{path}")
    assert done.returncode == 2
    assert "cannot listen there: " in done.stderr
    assert cure in done.stderr
    assert "None" not in done.stderr


def test_journals(tmp_path: Path) -> None:
    place = tmp_path / "tuimig"
    place.mkdir(mode=0o700)
    kept = place / "move-0123456789ab-destination.json"
    kept.write_text('{"state": "running", "comm": "redis"}\n')
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    rows = [row for row in json.loads(run("journals", "--json", env=env).stdout) if row["path"] == str(kept)]
    assert [(row["session"], row["state"], row["command"]) for row in rows] == [("0123456789ab", "running", "redis")]
    shown = run("journals", env=env).stdout
    assert "0123456789ab (destination): the copy ran without all its pages" in shown
    assert run("journals", "--yes", env=env).returncode == 2
    assert run("journals", "--clear", "0123456789ab", env=env).stdout == f"removed {kept}\n"
    assert run("journals", "--clear", "0123456789ab", env=env).returncode == 2


# ---------------------------------------------------------------- with a session of our own


REPORT = Report(verb="clone", pid=7, regions=3, bytes=8192, total_us=5, frozen_us=2, frozen={"stop": 1}, new_pid=8)
FAULT = Fault(1, 2, 0x1000, 0, FaultKind.WP, 900, 4)


class Scripted:
    """A session that says what a test wants it to say; stands where the real one does."""

    script: Any = None

    def __init__(self, listener: model.Listener, *, detail: bool, gate: object) -> None:
        self.listener = listener
        assert not detail  # asked for by --record only
        assert gate is None
        self.cancelled = False

    def clone(self, pid: int, policy: object, options: Options) -> Report:
        report: Report = type(self).script(self)
        return report

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(session, "Session", Scripted)
    return Scripted


def events(one: Scripted) -> Report:
    one.listener(Phase("freeze", 5))
    one.listener(Note("again, under the guard"))
    one.listener(Faults.of((FAULT, FAULT)))
    one.listener(Progress("capture", 10, 4))
    return REPORT


def test_event_lines(scripted: type[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.script = events
    file = tmp_path / "events"
    assert cli.main(["clone", "7", "--json", "--events", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["phase", "note", "fault", "fault", "progress", "report"]
    assert (lines[2]["kind"], lines[2]["address"], lines[2]["latency_ns"]) == ("wp", 0x1000, 900)
    report = json.loads(capsys.readouterr().out)
    assert report == {key: value for key, value in lines[-1].items() if key != "event"}
    assert (report["frozen"], report["frozen_us"], report["fault_us"]["p99"]) == ({"stop": 1}, 2, 0.0)


def test_events_on_stdout(scripted: type[Scripted], capsys: pytest.CaptureFixture[str]) -> None:
    scripted.script = events
    assert cli.main(["clone", "7", "--events", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "report"


def test_events_that_cannot_be_written_are_said(scripted: type[Scripted], capsys: pytest.CaptureFixture[str]) -> None:
    scripted.script = events
    assert cli.main(["clone", "7", "--events", "/dev/full"]) == 0
    assert "events were not written" in capsys.readouterr().err
    assert cli.main(["clone", "7", "--events", "/nowhere/at/all"]) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CaptureLost("a page was lost"), 1),
        (errors.UsageError("no"), 2),
        (errors.PrivilegeError("no"), 3),
        (errors.TargetGone("no"), 4),
        (errors.Unsupported("no", [errors.Obstacle("io_uring", "fd 3", "why", "cure")]), 5),
        (errors.Cancelled("no"), 130),
        (ValueError("a bug of ours"), 1),
        (MemoryError(), 1),
    ],
)
def test_exit_codes(scripted: type[Scripted], capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    def fail(_: Scripted) -> Report:
        raise error

    scripted.script = fail
    assert cli.main(["clone", "7"]) == code
    said = capsys.readouterr().err
    assert said.startswith("tuimig: ")
    assert "Traceback" not in said
    if isinstance(error, errors.Unsupported):
        assert "io_uring (fd 3)" in said


def test_an_error_is_the_last_event(scripted: type[Scripted], tmp_path: Path) -> None:
    def fail(one: Scripted) -> Report:
        one.listener(Phase("look", 1))
        raise errors.CaptureLost("a page was lost", subject="process 7")

    scripted.script = fail
    file = tmp_path / "events"
    assert cli.main(["clone", "7", "--events", str(file)]) == 1
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["event"], last["error"], last["subject"]) == ("error", "CaptureLost", "process 7")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels(scripted: type[Scripted], number: signal.Signals) -> None:
    def wait(one: Scripted) -> Report:
        os.kill(os.getpid(), number)
        assert one.cancelled
        raise errors.Cancelled("cancelled")

    scripted.script = wait
    before = signal.getsignal(number)
    assert cli.main(["clone", "7"]) == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_too_late_changes_nothing(scripted: type[Scripted]) -> None:
    def done(_: Scripted) -> Report:
        os.kill(os.getpid(), signal.SIGTERM)
        return REPORT

    scripted.script = done
    assert cli.main(["clone", "7"]) == 0


def test_what_is_said_to_nobody_stops_nothing() -> None:
    """A receiver whose first connection is gone has nobody to tell its warnings."""
    program = (
        "import os; from tuimig.cli import say; near, far = os.pipe(); os.dup2(far, 2); os.close(near); "
        "say('one'); say('two'); print('on')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "on\n")
