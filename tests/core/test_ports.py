"""A --map-port of a port that the process does not have: refused before anything is stopped, with those it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.command import tuimig
from harness.targets import Target, free_port

from tuimig import demo


def test_of_a_process_and_of_its_snapshot(need: Callable[..., None], place: Path, quiet: Path) -> None:
    need(root=True)
    with demo.workload(8 << 20) as (pid, port):
        wrong = f"{port + 1 if port < 65535 else 1}:{free_port()}"
        for verb in (["clone", pid, "--tcp", "close"], ["move", pid, "local", "--tcp", "close"]):
            done = tuimig(*verb, "--map-port", wrong, expect=2, temporary=quiet)
            assert f"--map-port {wrong}: process {pid} does not listen on port" in done.stderr
            assert f"It has {port}" in done.stderr
        tuimig("snapshot", pid, place / "snap", "--tcp", "close", temporary=quiet)
        done = tuimig("restore", place / "snap", "--map-port", wrong, expect=2, temporary=quiet)
        assert f"snap does not listen on port {wrong.partition(':')[0]}. It has {port}" in done.stderr
        assert demo.ask(port).wrong == 0


def test_of_a_process_without_ports(targets: Callable[..., Target], need: Callable[..., None], quiet: Path) -> None:
    need(root=True)
    target = targets("ballast", "--mb", 1)
    done = tuimig("clone", target.pid, "--map-port", "80:81", expect=2, temporary=quiet)
    assert "It has no port: leave it out" in done.stderr
