"""What is promised when things go wrong: a full disk, an impatient person, a filler that dies, a damaged page."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.command import start, tuimig
from harness.living import living
from harness.pictures import merged_maps, picture, undisturbed
from harness.targets import Target, ask

Start = Callable[..., Target]
MEGABYTES = 500


def until(attempt: subprocess.Popen[str], events: Path, phase: str) -> bool:
    """Read the events until this phase begins; False where it never did."""
    with events.open() as lines:
        for line in lines:
            event = json.loads(line)
            if event.get("event") == "phase" and event["name"] == phase:
                return True
    return False


@pytest.fixture
def small_disk(place: Path, need: Callable[..., None]) -> Iterator[Path]:
    need("mount", "umount", root=True)
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=755", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("guard", ["auto", "on"])
def test_a_full_disk(targets: Start, small_disk: Path, quiet: Path, guard: str) -> None:
    target = targets("ballast", "--mb", 200)
    target.ask(f"begin {10**12}")
    done = tuimig(
        "snapshot", target.pid, small_disk / "snap", "--precopy", "off", "--guard", guard, expect=1, temporary=quiet
    )
    assert done.report["error"] == "SpoolFull"
    assert not (small_disk / "snap").exists()
    undisturbed(target.pid)
    target.ask("end")
    assert target.ask("check")["problems"] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted(targets: Start, place: Path, quiet: Path, number: signal.Signals, code: int) -> None:
    """The person stops it in the middle: words, the right exit code, no directory, and a source that runs on."""
    target = targets("ballast", "--mb", MEGABYTES)
    before = picture(target.pid)
    events = place / "events"
    os.mkfifo(events)
    attempt = start("snapshot", target.pid, place / "snap", "--precopy", "off", "--events", events, temporary=quiet)
    with events.open() as lines:
        for line in lines:
            if '"capture"' in line:
                attempt.send_signal(number)
                break
        for _ in lines:
            pass
    _, words = attempt.communicate(timeout=60)
    assert attempt.returncode == code, words
    assert words.strip()
    assert "Traceback" not in words
    assert not (place / "snap").exists()
    assert picture(target.pid) == before
    undisturbed(target.pid)
    assert target.ask("check")["problems"] == 0


def test_the_filler_is_killed(targets: Start, place: Path, quiet: Path) -> None:
    """Without its filler the copy must never read zeros for data: it is ended, and nothing of it is left."""
    target = targets("ballast", "--mb", MEGABYTES)
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    met = 0
    for number in range(5):
        control = place / f"copy{number}"
        events = place / f"events{number}"
        os.mkfifo(events)
        restore = start(
            "restore", place / "snap", "--map-path", f"{target.control}={control}", "--events", events, temporary=quiet
        )
        assert until(restore, events, "fill")
        restore.kill()
        restore.communicate()
        answers = []
        for _ in range(200):
            try:
                answers.append(ask(control, "check", timeout_s=10))
            except (FileNotFoundError, ConnectionError, ValueError):
                break  # gone, as it should be
        assert [a["first"] for a in answers if a["problems"]] == []
        left = [pid for pid in descendants() if pid != target.pid]
        for pid in left:  # they are on their way out, or the copy was whole already
            if answers:
                os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
        met += not answers
    assert met, "each fill had ended before the kill: this test proves nothing"


def descendants() -> list[int]:
    return [process.pid for process in living(psutil.Process().children(recursive=True))]


def wait_for_end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone = select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert gone, f"process {pid} is left behind"


def test_a_damaged_page_is_never_run(targets: Start, place: Path, quiet: Path) -> None:
    """A flipped bit: `verify` names the region, `restore --full` refuses, a lazy copy never sees the page."""
    target = targets("ballast", "--mb", 64)
    snapshot = place / "snap"
    tuimig("snapshot", target.pid, snapshot, temporary=quiet)
    assert tuimig("verify", snapshot).code == 0
    pages = snapshot / "pages"
    with pages.open("r+b") as file:
        at = os.lseek(file.fileno(), pages.stat().st_size // 2, os.SEEK_DATA)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    done = tuimig("verify", snapshot, expect=1)
    assert not done.report["ok"]
    (damage,) = done.report["result"]["damage"]
    assert damage["pages"] == 1
    assert damage["region"] >= 0
    assert any(start <= damage["address"] < end for start, end, _, _ in merged_maps(target.pid))
    options = ["--map-path", f"{target.control}={place / 'copy'}"]
    tuimig("restore", snapshot, "--full", *options, expect=1, temporary=quiet)
    done = tuimig("restore", snapshot, *options, expect=None, temporary=quiet)
    assert done.code == 1, done.stdout
    assert target.ask("check")["problems"] == 0


def test_modes_and_names(targets: Start, place: Path, quiet: Path) -> None:
    """A snapshot holds a process's secrets: only its owner may look; an existing directory is not written into."""
    target = targets("ballast", "--mb", 8)
    snapshot = place / "snap"
    tuimig("snapshot", target.pid, snapshot, temporary=quiet)
    assert snapshot.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in snapshot.iterdir()} == dict.fromkeys(
        ("manifest.json", "pages", "sums"), 0o600
    )
    before = {path: path.stat().st_mtime_ns for path in snapshot.iterdir()}
    tuimig("snapshot", target.pid, snapshot, expect=2, temporary=quiet)
    assert {path: path.stat().st_mtime_ns for path in snapshot.iterdir()} == before
    (place / "link").symlink_to(place / "elsewhere")
    assert tuimig("snapshot", target.pid, place / "link", expect=None, temporary=quiet).code != 0
    assert not (place / "elsewhere").exists()


def test_a_process_that_is_not_there(quiet: Path, place: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    tuimig("snapshot", gone.pid, place / "snap", expect=4, temporary=quiet)
    assert not (place / "snap").exists()


def test_nothing_stays_behind_a_copy(targets: Start, place: Path, quiet: Path, copies: Any) -> None:
    """Once filled there is the copy, and the small init of its namespace; that one goes with the copy."""
    target = targets("ballast", "--mb", 100)
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    control = place / "copy"
    report = tuimig("restore", place / "snap", "--map-path", f"{target.control}={control}", temporary=quiet).report
    copies.add(report)
    assert set(descendants()) == {target.pid, report["new_pid"], report["init_pid"]}
    undisturbed(report["new_pid"])
    rss = Path(f"/proc/{report['init_pid']}/statm").read_text().split()[1]
    assert int(rss) * 4096 < 2 << 20
    with pytest.raises((ConnectionError, ValueError)):
        ask(control, "stop")
    wait_for_end(report["init_pid"])
