"""Recordings of live runs: replayed to the same totals, compared, made into a page that a browser opens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import recordings
from harness.command import argv, environment, start, tuimig

from tuimig import demo
from tuimig.core.errors import TuimigError
from tuimig.core.recording import load
from tuimig.core.summary import summarize


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(*words), capture_output=True, text=True, env=environment(), timeout=120)


@pytest.mark.parametrize("name", ["churn", "hog"])
def test_a_live_run_is_replayed_to_the_same_totals(name: str, need: Callable[..., None], place: Path) -> None:
    need(root=True)
    live = tuimig("demo", name, "--memory", "24MiB", "--record", place / "a.rec").report
    assert tuimig("replay", place / "a.rec").report == live
    words = run("replay", place / "a.rec")
    assert words.returncode == 0
    assert "clone: done" in words.stdout
    assert f"{live['wp_faults']} write-protect, {live['demand_faults']} on demand" in words.stdout
    recording = load(place / "a.rec")
    assert recording.header.redacted is False
    assert {"look", "attach", "freeze", "capture", "restore", "fill"} <= {
        timed.record.name for timed in recording.records if type(timed.record).__name__ == "Phase"
    }


def test_snapshot_and_restore_are_recorded(need: Callable[..., None], place: Path, copies: object) -> None:
    need(root=True)
    with demo.workload(8 << 20) as (pid, port):
        taken = tuimig(
            "snapshot", pid, place / "snap", "--tcp", "close", "--record", place / "s.rec", "--redact"
        ).report
        again = ("--map-port", f"{port}:{demo.free_port()}")
        restored = tuimig("restore", place / "snap", *again, "--record", place / "r.rec").report
        copies.add(restored)  # type: ignore[attr-defined]
    assert tuimig("replay", place / "s.rec").report == {**taken, "directory": "(hidden)"}
    assert tuimig("replay", place / "r.rec").report == restored
    assert b"counter" not in recordings.text_of(place / "s.rec")
    assert b"counter" in recordings.text_of(place / "r.rec")


def test_a_kill_leaves_a_recording(need: Callable[..., None], place: Path, quiet: Path) -> None:
    need(root=True)
    with demo.workload(256 << 20) as (pid, _):
        process = start("snapshot", pid, quiet / "snap", "--verify", "--record", place / "a.rec", temporary=quiet)
        phases: set[str] = set()
        while "freeze" not in phases and process.poll() is None:
            if (place / "a.rec").exists() and (place / "a.rec").stat().st_size > 100:
                told = (timed.record for timed in load(place / "a.rec").records)
                phases = {record.name for record in told if type(record).__name__ == "Phase"}
        process.kill()
        process.communicate()
        assert demo.ask(_).wrong == 0
    done = run("replay", place / "a.rec")
    assert done.returncode == 0, done.stderr
    assert "recorded in part" in done.stdout
    assert "it has no end" in done.stderr
    shutil.rmtree(quiet / "snap", ignore_errors=True)


def test_a_recording_that_ends_at_once(place: Path) -> None:
    """Before it says what it is of, and whatever is left of it."""
    whole = recordings.write(place / "a.rec").read_bytes()
    titles = set()
    for length in (*range(0, 400, 5), *range(400, len(whole), 200)):
        cut = place / "b.rec"
        cut.write_bytes(whole[:length])
        try:
            summary = summarize(load(cut))
        except TuimigError:
            continue
        if (summary.report.verb, summary.complete) not in titles:
            titles.add((summary.report.verb, summary.complete))
            shown = run("replay", cut).stdout.splitlines()
            assert shown[0] == f"{summary.report.verb or 'a migration'}: recorded in part"
            assert ("process" in shown[1]) == bool(summary.report.verb)
    assert titles == {("", False), ("clone", False)}


def test_what_failed_is_told_again(place: Path) -> None:
    gone = run("snapshot", "999999999", place / "snap", "--record", place / "a.rec")
    assert gone.returncode == 4
    done = run("replay", place / "a.rec")
    assert done.returncode == 0
    assert gone.stderr.strip() in done.stderr


def test_files_that_are_no_recordings(place: Path) -> None:
    (place / "a.rec").write_text("hello")
    whole = recordings.write(place / "b.rec").read_bytes()
    (place / "c.rec").write_bytes(whole[:60] + b"\0" + whole[61:])
    for name, code, words in (
        ("a.rec", 2, "not a recording of tuimig"),
        ("none.rec", 2, "No such file"),
        ("c.rec", 1, "damaged at byte"),
    ):
        done = run("replay", place / name)
        assert (done.returncode, done.stdout) == (code, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_two_side_by_side(place: Path) -> None:
    one, two = recordings.write(place / "a.rec"), recordings.write(place / "b.rec", end=False)
    done = run("replay", one, two)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "totals total 90 ms 94 ms 1.04" in lines
    assert "capture 68 ms 68 ms 1.00" in lines
    assert "runs after 50 ms -" in lines
    rows = json.loads(run("replay", one, two, "--json").stdout)
    phases = {row["name"]: (row["first"], row["second"]) for row in rows if row["group"] == "phase"}
    assert phases["capture"] == (68_000, 68_000)
    frozen = {row["name"]: row["first"] for row in rows if row["group"] == "frozen"}
    assert frozen == {"in all": 3100, "stop": 100, "eager": 1000, "arm": 2000}
    buckets = [row for row in rows if row["group"] == "faults of the source"]
    assert sum(row["first"] for row in buckets) == 30
    assert run("replay", one, one).returncode == 2


def test_where_nothing_can_be_written_nothing_is_started(place: Path) -> None:
    with demo.workload(1 << 20) as (pid, _):
        for option in ("--record", "--report"):
            done = run("snapshot", str(pid), place / "snap", option, place / "missing" / "x")
            assert done.returncode == 2
            assert "cannot write" in done.stderr
        done = run("snapshot", str(pid), place / "snap", "--redact")
        assert done.returncode == 2
        assert "--redact without a recording" in done.stderr
    assert not (place / "snap").exists()


def test_the_page_in_a_browser(need: Callable[..., None], place: Path) -> None:
    need("chromium", root=True)
    with demo.workload(24 << 20, "hog") as (pid, _):
        words = ("snapshot", pid, place / "snap", "--tcp", "close", "--precopy", "off")
        live = tuimig(*words, "--report", place / "a.html").report
    text = (place / "a.html").read_text()
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script", text)
    done = subprocess.run(
        [
            *["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"],
            f"--user-data-dir={place / 'browser'}",
            (place / "a.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(place)},
        timeout=120,
    )
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    for figure in (live["wp_faults"], live["swept_pages"], live["directory"]):
        assert f"<dd>{figure}</dd>" in dom
    assert f"<dd>{live['fault_us']['p50']:.1f} us</dd>" in dom
    assert dom.count("<svg") == 5
    assert dom.count("<tr>") >= live["regions"]
    assert f"Faults of the source: {live['wp_faults']}" in dom
    for name in ("look", "attach", "freeze", "capture", "commit", *live["frozen"]):
        assert f">{name}</text>" in dom
