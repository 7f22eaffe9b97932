"""The snapshot's page: what it holds, and running it again. On a real snapshot, through the real backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.command import tuimig
from harness.targets import Target
from stage import Recorded, Stage, console, drive, ready, words
from textual.pilot import Pilot
from textual.widgets import Input

from tuimig.backend import LiveBackend, Port
from tuimig.core.errors import TuimigError
from tuimig.screens.launch import Launch
from tuimig.screens.snapshot import Snapshot
from tuimig.widgets.table import Table


def test_a_snapshot_is_shown_and_restored(
    targets: Callable[..., Target], need: Callable[..., None], place: Path, quiet: Path
) -> None:
    need(root=True)
    target = targets("ballast", "--mb", 8)
    tuimig("snapshot", target.pid, place / "snap", temporary=quiet)
    backend = LiveBackend(place / "state")
    manifest = backend.inspect(place / "snap")
    stage = Stage()
    stage.manifest = manifest
    stage.feeds = [Recorded([])]
    app = console(stage)

    async def act(pilot: Pilot[Any]) -> None:
        app.open_snapshot(str(place / "snap"))
        await pilot.pause()
        assert isinstance(app.screen, Snapshot)
        assert "ballast" in words(app)
        assert len(app.screen.query_one(Table).keys) == len(manifest.regions)
        await pilot.press("R")
        assert isinstance(app.screen, Launch)
        assert app.screen.query_one("#ports", Input).value == "6379:16379"
        assert "as it was in" in words(app)
        await pilot.press("f5", "enter")
        job = stage.jobs[0]
        assert (job.verb, job.place) == ("restore", str(place / "snap"))

    drive(app, act)


def test_ports_of_a_real_snapshot(need: Callable[..., None], place: Path, quiet: Path) -> None:
    need("redis-server", root=True)
    from harness.redis import Redis

    server = Redis(place / "redis")
    try:
        backend = LiveBackend(place / "state")
        assert Port(server.port, "tcp") in backend.ports(server.pid)
        assert backend.taken(Port(server.port, "tcp"))
        tuimig("snapshot", server.pid, place / "snap", temporary=quiet)
        assert backend.stored_ports(backend.inspect(place / "snap")) == [Port(server.port, "tcp")]
        assert server.pid in {line.pid for line in backend.processes()}
        assert os.getpid() not in {line.pid for line in backend.processes()}
        assert "redis-server" in backend.threads(server.pid).values()
    finally:
        server.stop()


def test_read_only_restores_nothing(place: Path) -> None:
    stage = Stage()
    stage.trouble = None
    app = console(stage, read_only=True)

    async def act(pilot: Pilot[Any]) -> None:
        await ready(pilot)
        stage.trouble = TuimigError("no snapshot there", subject=str(place))
        app.open_snapshot(str(place))
        await pilot.pause()
        assert "no snapshot there" in words(app)
        await pilot.press("R")
        assert isinstance(app.screen, Snapshot)

    drive(app, act)


def test_the_name_of_a_snapshot_is_asked_for(place: Path) -> None:
    app = console(Stage())

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("O")
        app.screen.query_one(Input).value = str(place)
        app.backend.trouble = TuimigError("no snapshot there", subject=str(place))  # type: ignore[attr-defined]
        await pilot.press("enter")
        assert isinstance(app.screen, Snapshot)
        assert "no snapshot there" in words(app)

    drive(app, act)
