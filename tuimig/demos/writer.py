"""The client of kv and redis: numbers its writes, waits for each answer, keeps the times of both.

A process of its own, so that what it measures is the server and not us: `python -m tuimig.demos.writer SERVER PORT`. It
says `ready` after its first writes, writes until its stdin is closed, and then says the times as one line of JSON.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Final

from tuimig.demos.clients import KvClient, RedisClient

PAUSE_S: Final = 0.0003  # a pace that leaves the machine usable
FIRST_WRITES: Final = 20


def main() -> None:
    kind, port = sys.argv[1], int(sys.argv[2])
    client = KvClient(port) if kind == "kv" else RedisClient(port)
    writes: list[tuple[int, int]] = []
    error = ""
    try:
        while not select.select([0], [], [], PAUSE_S)[0]:
            sent = time.monotonic_ns()
            client.write(len(writes) + 1)
            writes.append((sent, time.monotonic_ns()))
            if len(writes) == FIRST_WRITES:
                os.write(1, b"ready\n")
    except OSError as failure:
        error = str(failure)
    sys.stdout.write(json.dumps({"writes": writes, "error": error}) + "\n")


if __name__ == "__main__":
    main()
