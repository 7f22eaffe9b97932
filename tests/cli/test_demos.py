"""Every workload of the demo: it notices what is wrong with it, and its clone is judged by the check that it brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.command import tuimig

from tuimig import demo
from tuimig.arguments import DEMOS
from tuimig.core.errors import TuimigError, UsageError
from tuimig.core.model import Phase
from tuimig.demos import canvas, churn, counter, hog, kv, picture, servers
from tuimig.demos.driving import judge


def test_the_grammar_and_the_list_name_the_same() -> None:
    assert tuple(workload.name for workload in demo.WORKLOADS) == DEMOS
    with pytest.raises(UsageError, match="no such workload"):
        demo.find("nothing")


@pytest.mark.parametrize("name", DEMOS)
def test_a_clone_of_each(name: str, need: Callable[..., None], quiet: Path) -> None:
    need(*(["redis-server"] if name == "redis" else []), root=True)
    report = tuimig("demo", name, "--memory", "24MiB", temporary=quiet).report
    assert report["verb"] == "clone"
    assert report["bytes"] > 12 << 20
    assert not Path(f"/proc/{report['new_pid']}").exists()
    assert not Path(f"/proc/{report['pid']}").exists()


def test_the_list() -> None:
    rows: Any = tuimig("demo", "--list").report
    assert [row["name"] for row in rows] == list(DEMOS)
    assert all(row["watch"].endswith(".") and row["memory"] >= 1 << 20 for row in rows)


# ---------------------------------------------------------------- each notices what is wrong


def spoil(state: Callable[[], dict[str, Any]], memory: Any, at: int) -> None:
    assert state()["wrong"] == 0
    before = memory[at]
    memory[at] = before ^ 0x40
    assert state()["wrong"] == 1
    memory[at] = before
    assert state()["wrong"] == 0


@pytest.mark.parametrize("at", [0, 9, 4096 * 3, 4096 * 15 + 4095])
def test_hog_and_canvas_notice_any_byte(at: int) -> None:
    for worker in (hog.Hog(16), canvas.Canvas(16)):
        worker.count = 5
        for page in range(5):
            (worker._write if isinstance(worker, hog.Hog) else worker._draw)(page, 1)
        spoil(worker.state, worker.memory, at)


def test_counter_notices_a_stale_page() -> None:
    worker = counter.Worker(8)
    assert worker.state() == (0, 0)
    worker.count += 1  # counted, but not written
    assert worker.state() == (1, 1)


def test_churn_notices_lost_and_leftover_pages() -> None:
    churning = churn.Churn(2 * churn.AREA_PAGES)
    churning.areas[1].empty(3)
    spoil(churning.state, churning.areas[1].memory, 4096 * 2)
    spoil(churning.state, churning.areas[1].memory, 4096 * 3)  # must be zero
    churning.areas[0].map_anew(churn.AREA_PAGES)
    spoil(churning.state, churning.areas[0].memory, 8)


def test_kv_notices_a_wrong_value() -> None:
    store = kv.Store(1)
    assert store.answer("set a b c\n") == "ok"
    assert store.answer("get a\n") == "b c"
    assert store.answer("get b\n") == ""
    assert store.answer("nonsense\n").startswith("error")
    assert json.loads(store.answer("state\n"))["wrong"] == 0
    store.answer("set fill:7 other\n")
    assert json.loads(store.answer("state\n"))["wrong"] == 1


# ---------------------------------------------------------------- what is right


def state(*counts: int, wrong: int = 0) -> demo.State:
    return demo.State(pid=1, threads=2, pages=3, counts=counts, wrong=wrong)


def test_both_have_to_go_on() -> None:
    judge(state(1, 1), [state(2, 2), state(3, 3)], [state(4, 4), state(5, 5)])
    with pytest.raises(TuimigError, match=r"the copy: .*stands still"):
        judge(state(1, 1), [state(2, 1), state(3, 2)], [state(4, 4)])
    with pytest.raises(TuimigError, match=r"the source: .*went back"):
        judge(state(5, 5), [state(6, 6)], [state(4, 4)])
    with pytest.raises(TuimigError, match=r"the copy: 2 pages are wrong"):
        judge(state(1, 1), [state(2, 2, wrong=2)], [state(4, 4)])


def test_writes_that_must_and_may_be_there() -> None:
    servers.judge_writes([1, 2, 3], [1, 2, 3, 4, 5], 2, 3, 5)
    for held, kept, must, may, words in (
        ([1], [1, 2, 3], 2, 3, "1 writes acknowledged before the freeze are missing"),
        ([1, 2, 3], [1, 2, 3], 1, 2, "1 writes sent after the freeze"),
        ([1, 3], [1, 2, 3], 1, 3, "gaps"),
        ([1, 2], [1, 2], 1, 3, "the source: holds 2 of 3"),
    ):
        with pytest.raises(TuimigError, match=words):
            servers.judge_writes(held, kept, must, may, 3)


def test_a_ledger_that_lost_its_server_says_so() -> None:
    running = demo.find("kv").start(1 << 20)
    try:
        running.before()
        assert isinstance(running, servers.Kv)
        assert running._ledger is not None
        running.process.kill()
        running._ledger._client.wait(60)  # by itself
        with pytest.raises(TuimigError, match="the client lost its server"):
            running._ledger.finish()
    finally:
        running.stop()


def test_the_last_freeze_counts() -> None:
    running = demo.find("counter").start(1 << 20)
    try:
        for name, time_ns in (("freeze", 10), ("capture", 20), ("freeze", 30)):
            running.see(Phase(name, time_ns))
        assert (running.frozen_ns, running.thawed_ns) == (30, 0)
        running.see(Phase("capture", 40))
        assert running.thawed_ns == 40
    finally:
        running.stop()


def test_a_picture_has_holes_where_pages_are_missing(need: Callable[..., None]) -> None:
    need(root=True)
    running = demo.find("canvas").start(1 << 20)
    assert isinstance(running, picture.Canvas)
    try:
        whole = running.picture(running.pid)
        assert all(shade is not None for row in whole for shade in row)
        assert len({shade for row in whole for shade in row}) > 20
        place = demo.ask(running.port)
        beyond = picture.seen(running.pid, place.address, place.side * 4, 8, 8)
        assert any(shade is None for row in beyond for shade in row)
        assert picture.HOLE in "".join(picture.text(beyond))
    finally:
        running.stop()
