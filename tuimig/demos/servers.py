"""kv and redis as the demo runs them: a server, and a client with a ledger of its writes.

A write that was acknowledged before the freeze is in the copy; one that was sent after the thaw is not.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tuimig.core.errors import TuimigError
from tuimig.core.model import Report
from tuimig.demos.clients import VALUE_BYTES, Client, KvClient, RedisClient
from tuimig.demos.driving import ANSWER_S, START_S, WORKLOAD, Running, errors_to, free_port, launch

REDIS: Final = "redis-server"


@dataclass(frozen=True, slots=True)
class Write:
    """Times on CLOCK_MONOTONIC, nanoseconds."""

    sent_ns: int
    acknowledged_ns: int


class Ledger:
    """The client's process, and its writes 1, 2, 3, ... once it has been stopped."""

    def __init__(self, kind: str, port: int) -> None:
        self._client = subprocess.Popen(
            [sys.executable, "-m", "tuimig.demos.writer", kind, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_to(),
            start_new_session=True,
        )
        self._writes: list[Write] | None = None
        assert self._client.stdout is not None
        select.select([self._client.stdout], [], [], START_S)  # its first writes, or its end

    def finish(self) -> list[Write]:
        """All writes. Raises where one was not acknowledged."""
        if self._writes is None:
            out, _ = self._client.communicate(timeout=ANSWER_S)  # closes its stdin
            lines = out.splitlines()
            told = json.loads(lines[-1]) if lines else {"writes": [], "error": "it ended without a word"}
            self._writes = [Write(*times) for times in told["writes"]]
            if told["error"]:
                raise TuimigError(f"the client lost its server: {told['error']}", subject="the source")
        return self._writes

    def end(self) -> None:
        self._client.kill()
        self._client.communicate()


class Serving(Running):
    """A server under a client that keeps a ledger."""

    kind = ""
    _ledger: Ledger | None = None

    @abstractmethod
    def client(self, port: int) -> Client:
        """A fresh connection to the source or to the copy."""

    def before(self) -> list[str]:
        self._ledger = Ledger(self.kind, self.port)
        return [f"source  {self.pid:>7}  a client writes 1, 2, 3, ... to port {self.port} and waits for each answer"]

    def check(self, report: Report) -> list[str]:
        assert self._ledger is not None
        writes = self._ledger.finish()
        copy, source = self.client(self.new_port), self.client(self.port)
        try:
            held, kept = copy.written(), source.written()
            wrong = {"the copy": copy.wrong(), "the source": source.wrong()}
        finally:
            copy.close()
            source.close()
        for name, count in wrong.items():
            if count:
                raise TuimigError(f"{count} values are wrong", subject=name)
        must = sum(write.acknowledged_ns < self.frozen_ns for write in writes)
        may = sum(write.sent_ns < self.thawed_ns for write in writes)
        judge_writes(held, kept, must, may, len(writes))
        during = [write for write in writes if write.acknowledged_ns >= self.frozen_ns]
        longest_us = max((write.acknowledged_ns - write.sent_ns for write in during), default=0) // 1000
        return [
            f"source  {self.pid:>7}  {len(kept)} writes acknowledged, all are there; longest answer {longest_us} us",
            f"copy    {report.new_pid:>7}  holds {len(held)}: all {must} that were acknowledged before the freeze, "
            f"none that was sent after it",
        ]

    def stop(self) -> None:
        if self._ledger is not None:
            self._ledger.end()
        super().stop()


def judge_writes(held: Sequence[int], kept: Sequence[int], must: int, may: int, acknowledged: int) -> None:
    """`held`: numbers in the copy; `kept`: in the source. The copy's are at least `must` and at most `may`."""
    if list(kept) != list(range(1, acknowledged + 1)):
        raise TuimigError(f"holds {len(kept)} of {acknowledged} acknowledged writes", subject="the source")
    if list(held) != list(range(1, len(held) + 1)):
        raise TuimigError("its writes have gaps", subject="the copy")
    if len(held) < must:
        raise TuimigError(f"{must - len(held)} writes acknowledged before the freeze are missing", subject="the copy")
    if len(held) > may:
        raise TuimigError(f"{len(held) - may} writes sent after the freeze are in it", subject="the copy")


class Kv(Serving):
    kind = "kv"

    def __init__(self, memory: int) -> None:
        super().__init__(*launch("kv", memory))

    def client(self, port: int) -> KvClient:
        return KvClient(port)


class Redis(Serving):
    kind = "redis"

    def __init__(self, memory: int) -> None:
        if why := redis_missing():
            raise TuimigError(why, subject="redis", cure="Install it (Debian: redis-server), or choose another demo")
        port = free_port()
        options = f"--port {port} --bind 127.0.0.1 --appendonly no --dir {tempfile.gettempdir()}".split()
        process = subprocess.Popen(
            [REDIS, *options, "--save", ""],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors_to(),
            start_new_session=True,
        )
        super().__init__(process, port)
        self._keys = max(memory // VALUE_BYTES, 1)
        try:
            self._wait()
            client = self.client(port)
            client.fill()
            client.close()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            client = self.client(self.port)
            try:
                if client.ask(("PING",)) == ["PONG"]:
                    return
            except ConnectionAbortedError:  # it loads, or is busy
                time.sleep(0.01)
            finally:
                client.close()
        raise TuimigError(f"did not start, exit status {self.process.poll()}", subject=WORKLOAD)

    def client(self, port: int) -> RedisClient:
        return RedisClient(port, self._keys)


def redis_missing() -> str:
    return "" if shutil.which(REDIS) else f"{REDIS} is not installed"
