"""A loaded Redis: snapshot while it serves, the copy beside it with exactly T0's data, and its fork while it fills."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import redis
from harness.command import start, tuimig
from harness.pictures import undisturbed
from harness.targets import free_port

MEGABYTES = 300


@pytest.fixture
def server(place: Path, quiet: Path, need: Callable[..., None]) -> Iterator[redis.Redis]:
    need("redis-server", "redis-benchmark")
    running = redis.Redis(place / "redis")
    yield running
    running.stop()


def exactly_t0(numbers: list[int], writes: list[redis.Write], t0_ns: int) -> None:
    """All acknowledged before T0 are there, none that was sent after it, and no gap."""
    last = len(numbers)
    assert numbers == list(range(1, last + 1))
    acknowledged = [w.number for w in writes if w.acknowledged_ns < t0_ns]
    later = [w.number for w in writes if w.sent_ns > t0_ns]
    assert acknowledged, "no write was acknowledged before T0"
    assert later, "no write was sent after T0"
    assert acknowledged[-1] <= last < later[0]


@pytest.mark.slow
def test_snapshot_under_load_and_restore(server: redis.Redis, place: Path, quiet: Path, copies: Any) -> None:
    keys = redis.populate(server.port, MEGABYTES)
    before = redis.digests(server.port, keys)
    port = free_port()
    numbered = redis.Numbered(server.port)
    with redis.load(server.port):
        numbered.start()
        snapshot = place / "snap"
        report = tuimig(
            "snapshot", server.pid, snapshot, "--tcp", "close", "--verify", "--precopy", "off", temporary=quiet
        ).report
        undisturbed(server.pid)
        assert report["verified_pages"] * 4096 >= MEGABYTES * 1_000_000
        assert report["wp_faults"] > 0
        restored = tuimig("restore", snapshot, "--map-port", f"{server.port}:{port}", temporary=quiet).report
        copies.add(restored)
        again = len(numbered.writes)
        while len(numbered.writes) < again + 50 and numbered.error is None:
            pass  # the source goes on answering with the copy beside it
    writes = numbered.finish()
    manifest = json.loads((snapshot / "manifest.json").read_text())
    clocks = manifest.get("manifest", manifest)["clocks"]
    exactly_t0(redis.listed(port), writes, clocks["monotonic_ns"])
    assert redis.digests(port, keys) == before
    assert redis.digests(server.port, keys) == before
    assert redis.listed(server.port) == [w.number for w in writes]
    with server.client() as client:
        assert client.info("stats")["total_error_replies"] == "0"
    with redis.Client(port) as client:
        assert client("SET", "only", "here") == "OK"
    with server.client() as client:
        assert client("GET", "only") is None
    tuimig("verify", snapshot)


@pytest.mark.slow
def test_clone_under_load(server: redis.Redis, place: Path, quiet: Path, copies: Any) -> None:
    keys = redis.populate(server.port, MEGABYTES)
    before = redis.digests(server.port, keys)
    port = free_port()
    numbered = redis.Numbered(server.port)
    with redis.load(server.port):
        numbered.start()
        while len(numbered.writes) < 20 and numbered.error is None:
            pass
        first = len(numbered.writes)
        report = tuimig(
            "clone", server.pid, "--map-port", f"{server.port}:{port}", "--tcp", "close", temporary=quiet
        ).report
        last = len(numbered.writes) + 1
        copies.add(report)
        assert report["downtime_us"] > 0
        with redis.Client(port) as copy, server.client() as source:
            assert copy("PING") == source("PING") == "PONG"
    writes = numbered.finish()
    numbers = redis.listed(port)
    assert numbers == list(range(1, len(numbers) + 1))
    assert first <= len(numbers) <= last
    assert redis.digests(port, keys) == before
    assert redis.listed(server.port) == [w.number for w in writes]


@pytest.mark.slow
def test_background_save_while_it_is_filled(server: redis.Redis, place: Path, quiet: Path, copies: Any) -> None:
    """fork() in a process whose pages have not all arrived: the child must see data, never zeros."""
    keys = redis.populate(server.port, MEGABYTES)
    before = redis.digests(server.port, keys)
    tuimig("snapshot", server.pid, place / "snap", temporary=quiet)
    server.stop()
    met = False
    for _ in range(3):
        restore = start("restore", place / "snap", temporary=quiet)
        with redis.connect(server.port, restore) as client:
            assert client("BGSAVE") == "Background saving started"
            met = met or restore.poll() is None
            out, err = restore.communicate(timeout=60)
            assert restore.returncode == 0, err
            copies.add(json.loads(out))
            while client.info("persistence")["rdb_bgsave_in_progress"] == "1":
                pass
            assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
            assert client("DBSIZE") == keys
        dump = server.directory / "dump.rdb"
        subprocess.run(["redis-check-rdb", str(dump)], check=True, stdout=subprocess.DEVNULL)
        (place / "loaded").mkdir(exist_ok=True)
        shutil.move(dump, place / "loaded" / "dump.rdb")
        loaded = redis.Redis(place / "loaded")
        try:
            assert redis.digests(loaded.port, keys) == before
        finally:
            loaded.stop()
        copies.end()
        if met:
            break
    assert met, "the save never began before the fill had ended: this test proves nothing"


def test_connections_need_a_word(server: redis.Redis, place: Path, quiet: Path) -> None:
    """An established connection stands in the way until the person says what is to become of it."""
    with server.client() as client:
        client("PING")
        done = tuimig("snapshot", server.pid, place / "snap", expect=5, temporary=quiet)
        assert "--tcp close" in done.stderr
        assert not (place / "snap").exists()
        assert client("PING") == "PONG"


def test_a_taken_port_is_said_before_anything_is_built(server: redis.Redis, place: Path, quiet: Path) -> None:
    tuimig("snapshot", server.pid, place / "snap", temporary=quiet)
    done = tuimig("restore", place / "snap", expect=None, temporary=quiet)
    assert done.code not in (0, 70)
    assert str(server.port) in done.stderr
    assert "--map-port" in done.stderr
