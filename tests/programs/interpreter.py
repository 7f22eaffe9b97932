"""A Python program with a bit of everything, for the tests: run by them as a target, never imported.

Threads that count, an asyncio server with timers on a unix socket, an open sqlite transaction and a committed table,
a socket pair and a pipe with content, a large array. `check` on the socket verifies all of it and answers in JSON.
"""

import array
import asyncio
import json
import os
import socket
import sqlite3
import sys
import threading
import time


class State:
    def __init__(self, directory):
        self.counts = [0, 0]
        self.sums = [0, 0]
        self.ticks = 0
        self.wrong = []
        self.lock = threading.Lock()
        self.left, self.right = socket.socketpair()
        self.left.sendall(b"through the pair")
        self.reader, self.writer = os.pipe()
        os.write(self.writer, b"in the pipe")
        self.database = sqlite3.connect(os.path.join(directory, "data.db"), check_same_thread=False)
        self.database.execute("create table if not exists t (n integer primary key, square integer)")
        self.database.execute("delete from t")
        self.database.executemany("insert into t values (?, ?)", [(n, n * n) for n in range(1000)])
        self.database.commit()
        self.memory = sqlite3.connect(":memory:", check_same_thread=False)
        self.memory.execute("create table m (n integer)")
        self.memory.executemany("insert into m values (?)", [(n,) for n in range(5000)])
        self.array = array.array("Q", (n * 2654435761 % 2**64 for n in range(1 << 20)))
        self.file = open(os.path.join(directory, "words"), "w+")  # noqa: SIM115 - open for as long as the program runs
        self.file.write("buffered but not flushed")
        self.born = time.monotonic()

    def count(self, which):
        while True:
            with self.lock:
                self.counts[which] += 1
                self.sums[which] += self.counts[which]
            time.sleep(0.001)

    async def tick(self):
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            if now < last + 0.0099:
                self.wrong.append(f"a timer fired {last + 0.01 - now} s early")
            last = now
            self.ticks += 1

    def check(self):
        with self.lock:
            for count, total in zip(self.counts, self.sums, strict=True):
                if total != count * (count + 1) // 2:
                    self.wrong.append(f"count {count}, sum {total}")
        if self.right.recv(100) != b"through the pair":
            self.wrong.append("socket pair")
        if os.read(self.reader, 100) != b"in the pipe":
            self.wrong.append("pipe")
        rows = self.database.execute("select count(*), sum(square) from t").fetchone()
        if rows != (1000, sum(n * n for n in range(1000))):
            self.wrong.append(f"sqlite: {rows}")
        self.database.execute("insert into t (square) values (1)")
        self.database.rollback()
        if self.memory.execute("select sum(n) from m").fetchone() != (sum(range(5000)),):
            self.wrong.append("sqlite in memory")
        if any(self.array[n] != n * 2654435761 % 2**64 for n in range(0, 1 << 20, 100)):
            self.wrong.append("array")
        self.file.flush()
        self.file.seek(0)
        if self.file.read() != "buffered but not flushed":
            self.wrong.append("file")
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        self.left.sendall(b"through the pair")
        os.write(self.writer, b"in the pipe")
        return self.wrong

    async def serve(self, reader, writer):
        command = (await reader.readline()).decode().strip()
        wrong = self.check() if command == "check" else self.wrong
        answer = {"wrong": wrong, "ticks": self.ticks, "counts": self.counts, "pid": os.getpid()}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()


async def main(directory, control):
    state = State(directory)
    for which in range(2):
        threading.Thread(target=state.count, args=(which,), daemon=True).start()
    server = await asyncio.start_unix_server(state.serve, control)
    ticker = asyncio.create_task(state.tick())
    ready = int(os.environ["READY_FD"])
    os.write(ready, b"ready\n")
    os.close(ready)
    await asyncio.gather(server.serve_forever(), ticker)


asyncio.run(main(sys.argv[1], sys.argv[2]))
