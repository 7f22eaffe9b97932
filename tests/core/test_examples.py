"""The recordings in examples/ are of real runs, small, without names, and show what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuimig.core.model import Round
from tuimig.core.recording import load
from tuimig.core.summary import summarize
from tuimig.page import page

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.rec"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path: Path) -> None:
    assert path.stat().st_size < 64 << 10
    recording = load(path)
    assert recording.complete
    assert recording.header.redacted
    summary = summarize(recording)
    assert summary.command == "(hidden)"
    assert summary.recorded_faults > 0
    assert page(summary, recording.header).count("<svg") >= 4


def test_what_they_show() -> None:
    shown = {path.stem: load(path) for path in EXAMPLES}
    assert set(shown) == {"canvas", "churn", "hog"}
    churn = summarize(shown["churn"]).report
    assert (churn.attempts, churn.guard) == (2, "guarded")
    assert summarize(shown["canvas"]).report.wp_faults > 0
    assert any(isinstance(timed.record, Round) for timed in shown["hog"].records)
