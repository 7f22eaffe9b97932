"""What the workloads written in Python share as processes: memory in pages, and a socket that answers `state`.

Each page begins with the count of its last visit and its own number. A workload visits its pages one after the other,
over and over; so at any moment every page must hold one known count, and a page that holds another is wrong.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

PAGE = 4096
MIB_PAGES = 256
STAMP = struct.Struct("=QQ")


def memory(pages: int) -> mmap.mmap:
    """Private anonymous memory, not yet populated."""
    return mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def stamp(area: mmap.mmap, page: int, count: int) -> None:
    STAMP.pack_into(area, page * PAGE, count, page)


def wrong_pages(area: mmap.mmap, pages: int, count: int) -> int:
    """How many of `pages` pages, visited in turn, do not hold what `count` visits in all leave in them."""
    wrong = 0
    for page in range(pages):
        back = (count - page) % pages  # visits since this page's own
        if STAMP.unpack_from(area, page * PAGE) != (max(count - back, 0), page):
            wrong += 1
    return wrong


def pages_asked() -> int:
    """The memory that the command line asks for, in pages."""
    return max(int(sys.argv[1]), 1) * MIB_PAGES


def serve(state: Callable[[], dict[str, Any]], begin: Callable[[], None]) -> None:
    """Says its port on stdout, begins the work, then answers each line `state` with one line of JSON. For ever."""
    server = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{server.getsockname()[1]}\n")
    sys.stdout.flush()
    begin()
    while True:
        client, _ = server.accept()
        with client, client.makefile("rw", encoding="ascii") as lines:
            if lines.readline().strip() == "state":
                answer = {"pid": os.getpid(), "threads": threading.active_count(), **state()}
                lines.write(json.dumps(answer) + "\n")
