"""nginx and node: a snapshot and a restore of each, both answering afterwards."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.command import tuimig
from harness.pictures import undisturbed
from harness.targets import Target, free_port

NGINX = """
daemon off; master_process off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;
events {{ worker_connections 64; }}
http {{ access_log off; client_body_temp_path {place}; proxy_temp_path {place}; fastcgi_temp_path {place};
uwsgi_temp_path {place}; scgi_temp_path {place};
server {{ listen 127.0.0.1:{port}; location / {{ return 200 "served by nginx"; }} }} }}
"""

NODE = """
const big = Buffer.alloc(20 << 20, 'node');
let ticks = 0;
setInterval(() => ticks++, 5);
const sound = () => big.every((b, i) => b === 'node'.charCodeAt(i % 4));
require('http').createServer((q, r) => r.end(JSON.stringify({ticks, sound: sound()}))).listen(PORT, '127.0.0.1');
"""


def get(port: int, target: Target | None = None) -> str:
    end = time.monotonic() + 30
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/", headers={"Connection": "close"})
            return connection.getresponse().read().decode()
        except ConnectionError:
            if target is None or not target.alive or time.monotonic() > end:
                raise
        finally:
            connection.close()


def beside(target: Target, port: int, place: Path, quiet: Path, copies: Any) -> int:
    tuimig("snapshot", target.pid, place / "snap", "--tcp", "close", temporary=quiet)
    undisturbed(target.pid)
    other = free_port()
    copies.add(tuimig("restore", place / "snap", "--map-port", f"{port}:{other}", temporary=quiet).report)
    return other


def test_nginx(place: Path, quiet: Path, copies: Any, need: Callable[..., None]) -> None:
    need("nginx")
    port = free_port()
    configuration = place / "nginx.conf"
    configuration.write_text(NGINX.format(place=place, port=port))
    target = Target(["nginx", "-c", configuration, "-p", place], directory=place, handshake=False)
    try:
        assert get(port, target) == "served by nginx"
        other = beside(target, port, place, quiet, copies)
        assert get(other) == get(port) == "served by nginx"
    finally:
        target.stop()


def test_node(place: Path, quiet: Path, copies: Any, need: Callable[..., None]) -> None:
    """A just-in-time compiler, worker threads, large reservations without access."""
    need("node")
    port = free_port()
    program = place / "server.js"
    program.write_text(NODE.replace("PORT", str(port)))
    target = Target(["node", program], directory=place, handshake=False)
    try:
        assert '"sound":true' in get(port, target)
        other = beside(target, port, place, quiet, copies)
        assert '"sound":true' in get(other)
        assert '"sound":true' in get(port)
        assert get(other) != get(other)  # its timer goes on
    finally:
        target.stop()
