"""What the person set: the file `config.toml`, the command line's options, and what the terminal's surroundings imply.

A bad file is a UsageError that names the file and what is wrong in it; nothing is started then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tuimig.core.errors import UsageError

THEMES: Final = ("textual-dark", "textual-light", "nord", "gruvbox", "solarized-light", "tokyo-night")
LEAST_REFRESH_S: Final = 0.2
MOST_REFRESH_S: Final = 60.0
SLOW_FPS: Final = 10
_KEYS: Final[Mapping[str, type]] = {
    "theme": str,
    "ascii": bool,
    "mouse": bool,
    "read_only": bool,
    "refresh": float,
    "low_bandwidth": bool,
    "keys": dict,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """`refresh_s`: between two readings of the process list. `keys`: binding id -> keys, comma separated."""

    theme: str = "textual-dark"
    ascii: bool = False
    mouse: bool = True
    read_only: bool = False
    refresh_s: float = 2.0
    low_bandwidth: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables_hz(self) -> float:
        """How often tables of a running migration are drawn."""
        return 2.0 if self.low_bandwidth else 4.0

    @property
    def table_every(self) -> int:
        """At which of these updates the fault table moves: all its lines change, most of what is sent."""
        return 2 if self.low_bandwidth else 1


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    return _base(environ, "XDG_CONFIG_HOME", ".config") / "config.toml"


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Log, measured rates, reports of migrations that went on in the background."""
    return _base(environ, "XDG_STATE_HOME", ".local/state")


def _base(environ: Mapping[str, str], name: str, default: str) -> Path:
    given = environ.get(name, "")
    home = Path(environ.get("HOME") or "/root")
    return (Path(given) if given.startswith("/") else home / default) / "tuimig"


def load(file: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """The file over the defaults; over SSH the terminal is taken to be slow unless the file says otherwise."""
    base = Settings(low_bandwidth=bool(environ.get("SSH_CONNECTION") or environ.get("SSH_TTY")))
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return base
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings: {error}", subject=str(file), cure="Mend or remove it") from error
    values = {name: _value(file, name, value) for name, value in document.items()}
    if "refresh" in values:
        values["refresh_s"] = values.pop("refresh")
    return checked(replace(base, **values), str(file))


def _value(file: Path, name: str, value: Any) -> Any:
    kind = _KEYS.get(name)
    if kind is None:
        raise UsageError(f"unknown key {name!r}", subject=str(file), cure=f"Known here: {', '.join(_KEYS)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise UsageError(f"{name} has the wrong type: {value!r}", subject=str(file), cure=f"It is a {kind.__name__}")
    if isinstance(value, dict) and not all(isinstance(keys, str) and keys for keys in value.values()):
        raise UsageError('in [keys] each value is a key like "x" or "ctrl+x,f2"', subject=str(file))
    return value


def checked(settings: Settings, subject: str) -> Settings:
    if settings.theme not in THEMES:
        raise UsageError(f"no such theme: {settings.theme!r}", subject=subject, cure=f"Known: {', '.join(THEMES)}")
    if not LEAST_REFRESH_S <= settings.refresh_s <= MOST_REFRESH_S:
        what = f"refresh is not between {LEAST_REFRESH_S} and {MOST_REFRESH_S:.0f} seconds: {settings.refresh_s:g}"
        raise UsageError(what, subject=subject)
    return settings


def log_to(file: Path) -> None:
    """The console's log: never the terminal. Where it cannot be written there is none."""
    logging.getLogger().addHandler(logging.NullHandler())
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        logging.basicConfig(
            filename=file, level=logging.INFO, format="%(asctime)s console %(process)d %(message)s", force=True
        )
