"""The demo and its workload, and the long verbs on it: exactness, events while they run, signals while they run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuimig import demo

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture
def work(need: Callable[..., None]) -> Iterator[tuple[int, int]]:
    need(root=True)
    with demo.workload(192 * MIB) as (pid, port):
        yield pid, port


def command(*words: str | int | Path) -> list[str]:
    return [sys.executable, "-m", "tuimig.cli", *map(str, words)]


def run(*words: str | int | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_workload_notices_a_wrong_page() -> None:
    with demo.workload(8 * MIB) as (pid, port):
        state = demo.ask(port)
        assert (state.pid, state.wrong, state.threads) == (pid, 0, 4)
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b") as memory:
            for line in maps:
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                if line.split()[1] != "rw-p" or len(line.split()) > 5 or end - start < 2 * MIB:
                    continue
                memory.seek(start + MIB)
                before = memory.read(16)
                memory.seek(start + MIB)
                memory.write(b"\xa5" * 16)
                memory.flush()
                if demo.ask(port).wrong:
                    return
                memory.seek(start + MIB)
                memory.write(before)
                memory.flush()
        pytest.fail("no region's change was noticed")


def test_the_demo(need: Callable[..., None]) -> None:
    need(root=True)
    done = run("demo", "--memory", "32MiB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("all as they should be" in line for line in lines) == 5
    assert "WRONG" not in done.stdout
    assert any(line.startswith("clone: done") for line in lines)
    report = json.loads(run("demo", "--memory", "16MiB", "--json").stdout)
    assert report["verb"] == "clone"
    assert report["new_pid"]
    assert not os.path.exists(f"/proc/{report['new_pid']}")
    assert not os.path.exists(f"/proc/{report['pid']}")


def test_a_snapshot_with_events(work: tuple[int, int], place: Path) -> None:
    pid, port = work
    before = demo.ask(port)
    done = run("snapshot", pid, place / "snap", "--precopy", "off", "--events", "-")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    phases = [event["name"] for event in events if event["event"] == "phase"]
    assert phases == ["look", "attach", "freeze", "capture", "commit"]
    report = events[-1]
    faults = [event for event in events if event["event"] == "fault"]
    assert report["event"] == "report"
    assert len(faults) + report["faults_dropped"] == report["wp_faults"] > 0
    assert all(fault["kind"] == "wp" and fault["latency_ns"] > 0 and fault["tid"] > 0 for fault in faults)
    served = [fault["time_ns"] + fault["latency_ns"] for fault in faults]
    assert served == sorted(served)
    assert [event for event in events if event["event"] == "progress"][-1]["pages_done"] > 48_000
    assert 0 < report["frozen_us"] < report["total_us"]
    after = demo.ask(port)
    assert after.wrong == 0
    assert all(new > old for old, new in zip(before.counts, after.counts, strict=True))

    shown = run("inspect", place / "snap").stdout
    assert "tuimig.demos.counter" in shown
    assert "Threads (4)" in shown
    assert f":{port}" in shown or str(port) in shown
    manifest = json.loads(run("inspect", place / "snap", "--json").stdout)
    assert manifest["process"]["host_pid"] == pid
    assert run("verify", place / "snap").returncode == 0
    _flip_a_byte(place / "snap" / "pages")
    broken = run("verify", place / "snap")
    assert broken.returncode == 1
    assert "DAMAGED" in broken.stdout


def _flip_a_byte(file: Path) -> None:
    fd = os.open(file, os.O_RDWR)
    try:
        at = os.lseek(fd, 0, os.SEEK_DATA) + 17
        old = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([old[0] ^ 1]), at)
    finally:
        os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_runs_leaves_nothing(work: tuple[int, int], place: Path, number: signal.Signals) -> None:
    pid, port = work
    target = place / "snap"
    process = subprocess.Popen(
        command("snapshot", pid, target, "--precopy", "off", "--events", "-", "--verify"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "phase" and event["name"] == "freeze":
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert json.loads(out.splitlines()[-1])["error"] == "Cancelled"
    assert not target.exists()
    assert demo.ask(port).wrong == 0
    assert run("snapshot", pid, target).returncode == 0  # nothing of the first attempt is in the way
