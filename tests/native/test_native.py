"""The C tests of the engine, run as they are for a person: `tests/native/run.sh plain`, one program a test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.c"))
NEED_ROOT = {"test_fill", "test_guardian", "test_init", "test_source", "test_trouble"}


def test_there_are_programs() -> None:
    assert {"test_spool", *NEED_ROOT} <= set(PROGRAMS)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the engine is compiled, once for all programs."""
    return str(tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, build: str) -> None:
    if program in NEED_ROOT and os.geteuid() != 0:
        pytest.skip("needs root: a userfaultfd that follows forks, or a PID namespace")
    run = [str(HERE / "run.sh"), "plain", program]
    env = {**os.environ, "NATIVE_BUILD": build}
    done = subprocess.run(run, capture_output=True, text=True, timeout=580, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert lines, done.stdout
