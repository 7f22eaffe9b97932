"""Who may load whom: the core neither Textual nor rich, the looking verbs no Textual, no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "tuimig" / "core").rglob("*.py")
    if path.name != "build.py"  # run by the packaging, not part of the program
)


def modules_after(code: str) -> set[str]:
    text = f"{code}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_core_loads_no_interface() -> None:
    assert len(CORE) > 10
    loaded = modules_after("import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in CORE))
    assert not {"textual", "rich"} & loaded


@pytest.mark.parametrize(
    "arguments",
    [["maps", str(os.getpid()), "--json"], ["ps", "--json"], ["check", "--json"], ["--help"]],
)
def test_json_loads_neither_textual_nor_rich(arguments: list[str]) -> None:
    loaded = modules_after(f"from tuimig.cli import main\nassert main({arguments!r}) == 0")
    assert "tuimig" in loaded
    assert not {"textual", "rich"} & loaded


def test_tables_load_no_textual() -> None:
    loaded = modules_after(f"from tuimig.cli import main\nassert main(['maps', '{os.getpid()}']) == 0")
    assert "rich" in loaded
    assert "textual" not in loaded


def test_looking_does_not_need_the_engine() -> None:
    """`maps` works where nothing was compiled."""
    code = (
        "import sys\n"
        "from tuimig.cli import main\n"
        f"assert main(['maps', '{os.getpid()}', '--json']) == 0\n"
        "assert 'tuimig.core.native._engine' not in sys.modules\n"
    )
    modules_after(code)
