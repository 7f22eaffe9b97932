"""The command under test, run as a person runs it: a process of its own, judged by exit code, report and words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    code: int
    report: dict[str, Any]
    stdout: str
    stderr: str


class CommandError(AssertionError):
    """The command ended with another exit code than the test expects; its words are in the message."""


def argv(*args: str | int | Path) -> list[str]:
    return [sys.executable, "-m", "tuimig.cli", *map(str, args)]


def environment(directory: Path | None = None) -> dict[str, str]:
    """Ours; temporary files go to `directory`, so that what is left behind can be seen."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if directory is not None:
        env["TMPDIR"] = str(directory)
    return env


def tuimig(
    *args: str | int | Path,
    expect: int | None = 0,
    timeout_s: float = 120,
    temporary: Path | None = None,
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Result:
    """Run it with `--json`; `expect` is the exit code that the test wants, None for any. `before`: what runs it."""
    done = subprocess.run(
        [*before, *argv(*args, "--json")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout_s,
        env=environment(temporary) if env is None else env,
    )
    if expect is not None and done.returncode != expect:
        raise CommandError(
            f"tuimig {' '.join(map(str, args))}: exit code {done.returncode}, not {expect}\n"
            f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    try:
        report = json.loads(done.stdout) if done.stdout.strip() else {}
    except json.JSONDecodeError as error:
        raise CommandError(f"stdout is not one JSON document: {error}\n{done.stdout[:2000]}") from error
    return Result(done.returncode, report, done.stdout, done.stderr)


def start(
    *args: str | int | Path,
    temporary: Path | None = None,
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """The same without waiting; for tests that kill it."""
    return subprocess.Popen(
        [*before, *argv(*args, "--json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(temporary) if env is None else env,
    )
