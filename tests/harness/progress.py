"""What a target or its copy says of itself over its control socket: nothing is wrong in it, and it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

LIMIT_S = 40.0


def sound(answer: dict[str, Any]) -> None:
    assert answer["problems"] == 0, answer["first"]


def goes_on(question: Callable[[str], dict[str, Any]], kinds: str) -> None:
    """The writers and every churner of `kinds` (comma-separated) make progress, and all is sound."""
    before = question("check")
    sound(before)
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        now = question("counts")
        if now["steps"] > before["steps"] and all(now["rounds"][k] > before["rounds"][k] for k in kinds.split(",")):
            break
        time.sleep(0.02)  # between two looks: it needs the CPU itself
    else:
        pytest.fail(f"stands still: {before} {now}")
    sound(question("check"))
