"""config.toml: what it can say; and each mistake in it is one sentence that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuimig import keys, settings
from tuimig.core.errors import UsageError
from tuimig.settings import Settings


def test_no_file_is_the_defaults(tmp_path: Path) -> None:
    assert settings.load(tmp_path / "config.toml", {}) == Settings()
    assert settings.load(tmp_path / "config.toml", {"SSH_CONNECTION": "a b"}).low_bandwidth
    assert settings.load(tmp_path / "config.toml", {"SSH_TTY": "/dev/pts/1"}).low_bandwidth


def test_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'theme = "nord"\nascii = true\nmouse = false\nread_only = true\nrefresh = 5\nlow_bandwidth = false\n'
        '[keys]\n"app.help" = "f2,h"\n'
    )
    loaded = settings.load(file, {"SSH_CONNECTION": "a b"})
    assert loaded == Settings("nord", True, False, True, 5.0, False, {"app.help": "f2,h"})
    assert loaded.tables_hz == 4.0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("theme = nord", "cannot read"),
        ("\xff", "cannot read"),
        ('theme = "disco"', "no such theme"),
        ("theme = 7", "wrong type"),
        ('colour = "red"', "unknown key"),
        ('ascii = "yes"', "wrong type"),
        ("mouse = 1", "wrong type"),
        ("refresh = true", "wrong type"),
        ("refresh = 0.1", "refresh"),
        ("refresh = 3600", "refresh"),
        ("refresh = nan", "refresh"),
        ('keys = "vim"', "wrong type"),
        ('[keys]\n"app.help" = 7', "[keys]"),
        ('[keys]\n"app.help" = ""', "[keys]"),
    ],
)
def test_each_mistake_names_the_file(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        settings.load(file, {})
    assert word in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        settings.load(tmp_path, {})


def test_where_files_are() -> None:
    home = {"HOME": "/home/ada"}
    assert settings.config_file(home) == Path("/home/ada/.config/tuimig/config.toml")
    assert settings.config_file({**home, "XDG_CONFIG_HOME": "/etc/x"}) == Path("/etc/x/tuimig/config.toml")
    assert settings.config_file({**home, "XDG_CONFIG_HOME": "relative"}) == settings.config_file(home)
    assert settings.state_directory(home) == Path("/home/ada/.local/state/tuimig")
    assert settings.state_directory({**home, "XDG_STATE_HOME": "/run/x"}) == Path("/run/x/tuimig")


def test_a_misspelt_key_is_refused_with_those_that_are_there() -> None:
    keys.refuse_unknown({}, "config.toml")
    keys.refuse_unknown({"app.help": "f2", "regions.eager": "E"}, "config.toml")
    with pytest.raises(UsageError) as caught:
        keys.refuse_unknown({"app.halp": "f2"}, "/etc/config.toml")
    assert "app.halp" in str(caught.value)
    assert "/etc/config.toml" in str(caught.value)
    assert "app.help" in str(caught.value)
    with pytest.raises(UsageError, match=r"regions\.eager"):
        keys.refuse_unknown({"nothing.here": "x"}, "config.toml")


def test_every_binding_can_be_remapped_and_no_id_is_used_twice() -> None:
    found = keys.known_bindings()
    assert {"app.quit", "page.back", "table.down", "regions.launch", "migration.cancel"} <= set(found)
