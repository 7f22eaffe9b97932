"""Makes recordings/: real migrations of a redis-server under a light load, as the console polls them. Needs root.

python tests/tui/record.py
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from harness.redis import Redis, populate
from harness.targets import end, free_port
from stage import RECORDINGS, keep

from tuimig.core.client import LiveSession, Update
from tuimig.core.jobs import Job
from tuimig.core.model import Options, PortMap

POLL_S = 0.05


def load(port: int, stop: threading.Event) -> None:
    """Overwrites keys here and there until told to stop."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        number = 1
        while not stop.is_set():
            number = number * 48271 % 2147483647
            key = f"fill:{number % 30000}"
            client.sendall(f"*3\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n$6\r\nfresh!\r\n".encode())
            client.recv(64)
            time.sleep(0.0002)


def record(job: Job) -> list[Update]:
    session = LiveSession(job)
    updates: list[Update] = []
    while not updates or not updates[-1].over:
        time.sleep(POLL_S)
        update = session.poll()
        if update.events or update.state or update.over:
            updates.append(update)
    session.close()
    return updates


def main() -> None:
    RECORDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mig-") as directory:
        server = Redis(Path(directory) / "redis")
        stop = threading.Event()
        thread = threading.Thread(target=load, args=(server.port, stop))
        try:
            populate(server.port, 120)
            thread.start()
            options = Options(tcp="close", map_ports=(PortMap(server.port, free_port()),))
            clone = record(Job("clone", server.pid, "local", options=options))
            keep(clone, RECORDINGS / "clone.xz")
            report = clone[-1].report
            assert report is not None, clone[-1].error
            for pid in (report.new_pid, report.init_pid):
                if pid:
                    end(pid)
            snapshot = record(Job("snapshot", server.pid, f"{directory}/snap", options=options))
            assert snapshot[-1].report is not None, snapshot[-1].error
            keep(snapshot, RECORDINGS / "snapshot.xz")
            failed = record(Job("clone", server.pid, "local", options=Options(map_ports=options.map_ports)))
            assert failed[-1].error is not None
            keep(failed, RECORDINGS / "failed.xz")
        finally:
            stop.set()
            thread.join()
            server.stop()


if __name__ == "__main__":
    main()
