"""The man page and the completions are those of the parser; the shells that are here accept them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tuimig import manual
from tuimig.arguments import parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", manual.FILES)
def test_the_files_are_the_parsers(name: str) -> None:
    again = f"{name} is old: run .venv/bin/python -m tuimig.manual"
    assert (ROOT / name).read_text(encoding="utf-8") == manual.FILES[name](parser()), again


@pytest.mark.parametrize("name", manual.FILES)
def test_they_name_every_verb_and_option(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\-", "-")
    for verb in manual.verbs(parser()):
        assert verb.name in text
        for option in verb.options:
            for long in option.names:
                assert (f"-l {long[2:]} " if name.endswith("fish") else long) in text, (verb.name, long)


def complete(*words: str) -> list[str]:
    """What bash proposes for the last word."""
    script = f"""
source {ROOT}/completions/tuimig.bash
compopt() {{ :; }}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_tuimig
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-uc", script, "-", *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes() -> None:
    assert {"clone", "check"} <= set(complete("tuimig", "c"))
    assert complete("tuimig", "clone", "1", "--guar") == ["--guard"]
    assert complete("tuimig", "clone", "--guard", "o") == ["on", "off"]
    assert sorted(complete("tuimig", "demo", "c")) == ["canvas", "churn", "counter"]
    assert "examples/hog.rec" in complete("tuimig", "replay", "examples/h")
    assert "1" in complete("tuimig", "maps", "1")
    assert complete("tuimig", "snapshot", "1", "doc") == ["docs"]
    assert complete("tuimig", "verify", "--precopy") == []


@pytest.mark.parametrize(("shell", "name"), [("zsh", "completions/_tuimig"), ("fish", "completions/tuimig.fish")])
def test_other_shells_can_read_theirs(shell: str, name: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", ROOT / name], check=True)


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("tuimig sn", ["snapshot"]),
        ("tuimig clone 1 --guard o", ["off", "on"]),
        ("tuimig demo c", ["canvas", "churn", "counter"]),
        ("tuimig replay examples/h", ["examples/hog.rec"]),
        ("tuimig clone 1 --freeze-budget ", []),
    ],
)
def test_fish_completes(words: str, proposed: list[str]) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    script = f"source completions/tuimig.fish; complete -C '{words}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == proposed


def test_the_man_page_is_well_formed() -> None:
    if not shutil.which("groff"):
        pytest.skip("groff is not installed")
    words = ["groff", "-man", "-Tutf8", "-ww", "-z", ROOT / "docs" / "tuimig.1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
