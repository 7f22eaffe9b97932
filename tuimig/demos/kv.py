"""kv: a key-value server that keeps all in memory. `python -m tuimig.demos.kv MEGABYTES`.

One line a command, one line an answer: `set KEY VALUE` -> `ok`, `get KEY` -> the value or nothing, `size` -> keys,
`state` -> JSON. It is filled with values that can be computed from their keys, so it can say whether one is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading

VALUE_BYTES = 2000


def value_of(number: int) -> str:
    """What the key `fill:NUMBER` must hold: text that does not repeat from key to key."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=50).hexdigest()
    return digest * (VALUE_BYTES // len(digest))


class Store:
    def __init__(self, megabytes: int) -> None:
        self.filled = max(megabytes * (1 << 20) // VALUE_BYTES, 1)
        self.data = {f"fill:{number}": value_of(number) for number in range(self.filled)}
        self.commands = 0

    def answer(self, line: str) -> str:
        self.commands += 1
        match line.rstrip("\n").split(" ", 2):
            case ["set", key, value]:
                self.data[key] = value
                return "ok"
            case ["get", key]:
                return self.data.get(key, "")
            case ["size"]:
                return str(len(self.data))
            case ["state"]:
                return json.dumps(self.state())
            case _:
                return "error: set KEY VALUE, get KEY, size, state"

    def state(self) -> dict[str, object]:
        wrong = sum(self.data.get(f"fill:{number}") != value_of(number) for number in range(self.filled))
        mine = {"pid": os.getpid(), "threads": threading.active_count()}
        return {**mine, "pages": self.filled, "counts": [self.commands], "wrong": wrong}


async def main() -> None:
    store = Store(max(int(sys.argv[1]), 1))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(f"{store.answer(line.decode())}\n".encode())
                await writer.drain()
        except ConnectionError:
            pass  # the copy's side of a connection that belongs to the source
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
