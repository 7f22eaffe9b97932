"""Processes that may end while they are looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def living(found: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one that nobody has reaped yet has."""
    there = []
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                there.append(process)
    return there
