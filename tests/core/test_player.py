"""The player: time that stops, steps, runs at another speed and jumps; what it hands to a screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import recordings
from harness.recordings import Clock

from tuimig.core.board import Batch
from tuimig.core.client import Feed, Update
from tuimig.core.model import Frozen, Note, Phase, Planned, Progress
from tuimig.core.player import SPEEDS, Player
from tuimig.core.recording import Recording, load


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return load(recordings.write(tmp_path / "a.rec"))


@pytest.fixture
def clock() -> Clock:
    return Clock(5)


@pytest.fixture
def player(recording: Recording, clock: Clock) -> Player:
    return Player(recording, clock)


def everything(player: Player) -> Update:
    player.jump(player.duration_us)
    return player.poll()


def test_it_is_a_feed(player: Player) -> None:
    feed: Feed = player
    feed.cancel()
    feed.to_background(Path("/nowhere"))
    feed.close()


def test_it_begins_paused_at_the_start(player: Player, clock: Clock) -> None:
    clock.after(1000)
    assert (player.position_us, player.phase, player.paused) == (0, "", True)
    first = player.poll()
    assert first.restart
    assert first.events == ()
    assert not player.poll().restart


def test_it_plays_in_real_time(player: Player, clock: Clock) -> None:
    player.play()
    clock.after(1)
    assert player.position_us == 1000
    assert [type(event) for event in player.poll().events] == [Phase, Planned]
    assert player.poll() == Update(restart=False, faults=Batch(b"", 0))
    clock.after(7)
    assert [type(event) for event in player.poll().events] == [Phase, Phase, Frozen]
    assert player.phase == "freeze"
    player.pause()
    clock.after(100)
    assert player.position_us == 8000


def test_speed(player: Player, clock: Clock) -> None:
    assert player.speed == 1.0
    player.play()
    player.faster(-2)
    assert player.speed == SPEEDS[SPEEDS.index(1.0) - 2] == 0.1
    clock.after(10)
    assert player.position_us == 1000
    player.faster(99)
    assert player.speed == SPEEDS[-1]
    player.faster(-99)
    assert player.speed == SPEEDS[0]


def test_all_of_it_and_the_end(player: Player) -> None:
    update = everything(player)
    assert update.report == recordings.report()
    assert update.over
    assert player.at_end
    assert len(update.faults.records) // 32 == 63
    assert update.state is not None
    assert update.state.progress == Progress("fill", 1060, 1060, demand_faults=3)
    assert set(update.state.details) == {"source", "copy"}
    assert update.state.details["source"].region_done == (2,)


def test_piece_by_piece_is_the_same_as_at_once(recording: Recording, clock: Clock) -> None:
    once = everything(Player(recording, clock))
    player = Player(recording, clock)
    events: list[object] = []
    faults = b""
    last = None
    for position in range(0, player.duration_us + 1, 777):
        player.jump(position)
        update = player.poll()
        events += update.events
        faults += update.faults.records
        last = update.state or last
    player.jump(player.duration_us)
    update = player.poll()
    assert (*events, *update.events) == once.events
    assert faults + update.faults.records == once.faults.records
    assert (update.state or last) == once.state


def test_back_is_from_the_beginning(player: Player, recording: Recording, clock: Clock) -> None:
    everything(player)
    player.jump(20_000)
    back = player.poll()
    assert back.restart
    assert not back.over
    fresh = Player(recording, clock)
    fresh.jump(20_000)
    assert fresh.poll() == back


def test_steps_by_event(player: Player, recording: Recording) -> None:
    seen = 0
    times = sorted({timed.time_us for timed in recording.records})
    for time_us in times:
        player.step()
        assert player.position_us == time_us
        seen += len(player.poll().events)
    assert seen == sum(isinstance(t.record, Phase | Note | Planned | Frozen) for t in recording.records)
    player.step()
    assert player.position_us == times[-1]
    player.step(-1)
    assert player.position_us < times[-1]
    player.jump(0)
    player.step(-3)
    assert player.position_us == 0


def test_steps_by_phase(player: Player) -> None:
    found = []
    for _ in range(11):
        player.step_phase()
        found.append(player.phase)
    attempt = ["attach", "freeze", "capture"]
    assert found == ["look", *attempt, *attempt, "restore", "fill", "fill", "fill"]
    assert player.at_end
    player.step_phase(-1)
    assert player.position_us == player.marks[-1].time_us
    player.step_phase(-2)
    assert player.phase == "capture"


def test_play_at_the_end_begins_again(player: Player, clock: Clock) -> None:
    everything(player)
    player.play()
    assert player.position_us == 0
    clock.after(10_000)
    assert player.at_end
    assert player.poll().over
