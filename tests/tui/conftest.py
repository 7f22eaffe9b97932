"""Pictures: where they lie, and that they are only renewed under the versions they were made with."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import pytest_textual_snapshot as plugin

PICTURES = Path(__file__).resolve().parents[2] / "snapshots"
MADE_WITH = PICTURES / "made-with"


class Pictures(plugin.SVGImageExtension):  # type: ignore[misc]
    """SVG files in the top-level `snapshots/`, named by the test's id alone."""

    file_extension = "svg"

    @classmethod
    def dirname(cls, *, test_location: object) -> str:
        return str(PICTURES)


plugin.SVGImageExtension = Pictures


def versions() -> str:
    return f"textual {version('textual')}, rich {version('rich')}\n"


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--snapshot-update", default=False):
        if MADE_WITH.exists() and MADE_WITH.read_text() != versions() and not os.environ.get("NEW_BASELINE"):
            raise pytest.UsageError(
                f"the pictures were made with {MADE_WITH.read_text().strip()}, this is {versions().strip()}. "
                "Set NEW_BASELINE=1 to renew them all"
            )
        PICTURES.mkdir(exist_ok=True)
        MADE_WITH.write_text(versions())


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the surroundings would change: colours, the terminal's program, the person's own settings."""
    for name in ("NO_COLOR", "SSH_CONNECTION", "SSH_TTY", "COLORTERM", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib/state")
