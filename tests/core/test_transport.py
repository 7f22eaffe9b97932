"""Connections that cannot be made: what the ssh client and the remote shell say is handed on, with what helps."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tuimig.core import sshwords, transport, wire
from tuimig.core.errors import ConnectionLost
from tuimig.core.model import Options
from tuimig.core.peer import Peer

SETTINGS = wire.Settings("move", [], [], "auto", "close", "null", False, True, "kill", 60.0)
NEEDS = wire.Needs("x86_64", 4096, "6.18", [], [], 1 << 20, 7, "sleep", [], [], "none")


def tried(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> ConnectionLost:
    """What becomes of a connection through an ssh client that does this."""
    client = place / "ssh"
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    peer = Peer(transport.parse("ssh://me@far:2222"), Options(remote_command="/opt/tuimig"))
    with contextlib.closing(peer), pytest.raises(ConnectionLost) as caught:
        peer.open(NEEDS, SETTINGS)
    return caught.value


@pytest.mark.parametrize(
    ("said", "code", "cure"),
    [
        ("bash: line 1: /opt/tuimig: No such file or directory", 127, "--remote-command /path/to/tuimig"),
        ("sh: 1: tuimig: not found", 127, "--remote-command /path/to/tuimig"),
        ("sh: 1: /opt/tuimig: Permission denied", 126, "may not be run there"),
        ("me@far: Permission denied (publickey,password).", 255, "ssh -p 2222 -l me far"),
        ("Host key verification failed.", 255, "check its key: ssh -p 2222"),
        ("ssh: Could not resolve hostname far: Name or service not known", 255, "Check the host's name"),
        ("ssh: connect to host far port 2222: Connection refused", 255, "Start sshd there"),
        ("ssh: connect to host far port 2222: No route to host", 255, "firewall"),
        ("sudo: a password is required", 1, "NOPASSWD"),
        ("kex_exchange_identification: Connection closed by remote host", 255, "MaxStartups"),
        ("Something else", 255, "Try it by hand: ssh -p 2222 -l me far /opt/tuimig --version"),
    ],
)
@pytest.mark.parametrize("before", ["", "sleep 0.3; "])
def test_what_ssh_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, cure: str, before: str
) -> None:
    """Whether it ends before anything is written to it or behind that."""
    error = tried(place, monkeypatch, f"{before}echo '{said}' >&2; exit {code}")
    assert error.what == f"no connection could be made: {said}"
    assert error.subject == "ssh://me@far:2222"
    assert cure in error.cure
    assert "lost" not in str(error)


def test_a_client_that_says_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = tried(place, monkeypatch, "exit 255")
    assert str(error).startswith("ssh://me@far:2222: no connection could be made. Try it by hand: ssh")


def test_a_remote_command_that_is_not_there_by_its_words_alone() -> None:
    assert "--remote-command" in sshwords.cure("zsh:1: command not found: tuimig", None, "far", "tuimig")


def test_there_is_no_ssh_client(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(ConnectionLost, match=r"cannot start ssh.*Install the OpenSSH client"):
        transport.connect(transport.parse("ssh://far"), "tuimig")
