"""What is said about a run: its own figures and addresses, for every phase; and the narrator that gathers them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from harness import recordings
from harness.recordings import Clock

from tuimig.core import remote
from tuimig.core.model import Connection, FaultTimes, Frozen, Handover, Phase, Progress, Round
from tuimig.explain import HANDOVER, IDEAS, PARTS, Situation, explain, text
from tuimig.run import PHASES
from tuimig.stepping import Narrator

HOW_IT_WORKS = Path(__file__).resolve().parents[2] / "docs" / "how-it-works.md"


def after(phase: str, attempt: int = 1) -> Situation:
    """All that is known when the phase ends."""
    narrator = Narrator()
    seen = 0
    reached = False
    for event in recordings.events(Clock()):
        if isinstance(event, Phase):
            if reached:
                break
            seen += event.name == phase
            reached = event.name == phase and seen == attempt
        narrator.see(event)
    assert narrator.now.phase == phase
    return narrator.now


def test_every_phase_has_an_idea() -> None:
    assert {name for names in PHASES.values() for name in names} <= set(IDEAS)
    for idea in IDEAS.values():
        assert idea.text.endswith(".")
        assert len(idea.text) < 600


def test_it_speaks_of_this_run() -> None:
    look = " ".join(explain(after("look")).here)
    assert "Process 4711 has 3 regions: 2 eager (144 KiB), 1 protected (4 MiB), 0 that" in look
    assert "[heap] at 0x500000000000 with 4 MiB in memory; it is protected" in look
    freeze = " ".join(explain(after("freeze")).here)
    assert "stood still for 3.05 ms" in freeze
    assert "2 ms, went to write-protecting the pages" in freeze
    capture = " ".join(explain(after("capture", attempt=2)).here)
    assert "1,056 of 1,060 pages are saved" in capture
    assert "Thread 4711 wrote to 0x500000014000 in [heap]" in capture
    assert "let it go after 19 us" in capture
    assert "Of 30 faults half were served within" in capture
    fill = " ".join(explain(after("fill")).here)
    assert "1,060 of 1,060 pages are in the copy; 3 times" in fill
    assert "Thread 4711 of the copy touched 0x500000002000 in [heap], which was not there" in fill


def test_rounds() -> None:
    first, later = Round(0, 900, 900, 0, 10, 0, 500, 3), Round(3, 200, 150, 50, 0, 100_000, 700, 3)
    assert "copied all 900 pages" in explain(Situation("precopy", round=first)).here[0]
    words = explain(Situation("precopy", round=later)).here[0]
    assert words.startswith("Round 3: 200 pages had been written since the round before, 2,000 a second; 150 were")
    assert "50 that are written all the time" in words


def test_another_host() -> None:
    narrator = Narrator()
    for event in (
        Phase("fill", 1),
        Connection("connected", "ssh://other"),
        Progress("fill", side="destination", arrived_pages=4200, round_trip_us=FaultTimes(350, 900, 1000)),
    ):
        narrator.see(event)
    words = " ".join(explain(narrator.now).here)
    assert "connection to ssh://other stands" in words
    assert "4,200 pages have arrived there; half of those that were asked for came within 350 us." in words
    narrator.see(Connection("lost", "ssh://other", 41.6, "Broken pipe"))
    words = " ".join(explain(narrator.now).here)
    assert "is lost (Broken pipe). Both sides hold" in words
    assert "another 42 s" in words
    narrator.see(Connection("given-up", "ssh://other"))
    assert "has been given up." in " ".join(explain(narrator.now).here)
    assert "ssh://other" not in text(explain(replace(narrator.now, report=recordings.report())))


def test_each_step_of_a_hand_over_has_words() -> None:
    said = re.findall(r"_handover\(\"(\w+)\", \"(\w+)\"\)", Path(remote.__file__).read_text(encoding="utf-8"))
    assert len(said) >= 5
    for source, destination in said:
        narrator = Narrator()
        narrator.see(Handover(source, destination))
        assert HANDOVER[source, destination] in explain(narrator.now).here


def test_a_second_attempt_is_said_to_be_one() -> None:
    assert "attempt 2" in " ".join(explain(after("attach", attempt=2)).here)
    assert "attempt" not in " ".join(explain(after("attach")).here)


def test_the_end() -> None:
    done = explain(replace(after("fill"), report=recordings.report()))
    words = text(done)
    assert words.startswith("Both run\n")
    assert "stood still for 3.1 ms" in words
    assert "Process 4720 made its first step 50 ms after T0" in words
    assert "30 writes had to wait for a page to be saved, 3 touches for a page to come." in words
    assert "It took 2 attempts; the last one ran under the guard" in words


@pytest.mark.parametrize(
    ("verb", "title"),
    [("snapshot", "The picture is kept"), ("move", "It runs there, and only there"), ("restore", "It runs again")],
)
def test_the_end_of_other_verbs(verb: str, title: str) -> None:
    report = replace(recordings.report(), verb=verb)
    assert text(explain(replace(after("fill"), verb=verb, report=report))).startswith(f"{title}\n")


def test_an_end_before_its_time() -> None:
    words = text(explain(replace(after("capture"), error="no space is left on the device", waiting_for="commit")))
    assert words.startswith("It ended before its time\n")
    assert "no space is left on the device." in words
    assert "Next" not in words
    assert "owe the copy" not in words


def test_the_end_of_the_copy() -> None:
    done = replace(after("fill"), report=recordings.report(), copy_ended=True)
    assert text(explain(done)).startswith("The copy has been ended\n")


def test_what_comes_next() -> None:
    words = text(explain(replace(after("look"), waiting_for="attach")))
    assert words.endswith("Next, at a key: Getting a hand on its page faults.")
    assert "userfaultfd" not in words
    assert "pidfd_open" in words


def test_nothing_known_is_no_error() -> None:
    for phase in (*IDEAS, "something new"):
        assert text(explain(Situation(phase)))


def test_names_are_shown_as_text() -> None:
    situation = after("capture")
    shown = text(explain(replace(situation, region_of_fault="/tmp/\x1b[2Jx")))
    assert "\x1b" not in shown


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_freeze_has_words(part: str) -> None:
    shown = text(explain(Situation("freeze", frozen=Frozen(100, {part: 100, "other": 1}))))
    assert f"went to {PARTS[part]}." in shown


def test_the_document_says_the_same() -> None:
    text = " ".join(HOW_IT_WORKS.read_text(encoding="utf-8").split())
    for name, idea in IDEAS.items():
        assert idea.text in text, name
        assert all(f"`{call}`" in text for call in idea.calls) or name == "connect"


def test_its_pictures_and_recordings_are_there() -> None:
    text = HOW_IT_WORKS.read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert len(pictures) >= 4
    for picture in pictures:
        assert (HOW_IT_WORKS.parent / unquote(picture)).is_file(), picture


def test_its_commands_run_as_written() -> None:
    root = HOW_IT_WORKS.parents[1]
    blocks = re.findall(r"```\n(.*?)```", HOW_IT_WORKS.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tuimig ")]
    assert len(lines) == 3
    for line in lines:
        words = [sys.executable, "-m", "tuimig.cli", *line.split()[1:]]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout
