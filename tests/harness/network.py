"""Two hosts on one: network namespaces joined by veth, a real sshd with keys of its own in the far one.

Both see the same files and processes; addresses, ports and the line between them are their own. Root only. What is made
is removed by `close`, whatever has happened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.command import ROOT, environment

NEAR, FAR = "10.213.7.1", "10.213.7.2"
SHARED = "10.213.7.9"  # an address that moves along with a process
PORT = 2222


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], check=check, capture_output=True, text=True)


class Network:
    """`near` and `far` are the names of the namespaces. `place` holds keys and configuration."""

    def __init__(self, place: Path) -> None:
        tag = os.urandom(2).hex()
        self.near, self.far = f"mig-{tag}-a", f"mig-{tag}-b"
        self.place = place / "net"
        self.place.mkdir(mode=0o700)
        self._sshd: subprocess.Popen[bytes] | None = None
        try:
            self._lay()
            self._serve()
        except BaseException:
            self.close()
            raise

    def _lay(self) -> None:
        for name in (self.near, self.far):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        veth = f"v{self.near[4:8]}"
        run("ip", "-n", self.near, "link", "add", veth, "type", "veth", "peer", "name", veth, "netns", self.far)
        self.device = veth
        for name, address in ((self.near, NEAR), (self.far, FAR)):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", veth)
            run("ip", "-n", name, "link", "set", veth, "up")

    def _serve(self) -> None:
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.place / name)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        (self.place / "authorized").write_text((self.place / "user.pub").read_text())
        server = self.place / "sshd_config"
        server.write_text(
            f"Port {PORT}\nListenAddress {FAR}\nHostKey {self.place}/host\nAuthorizedKeysFile {self.place}/authorized\n"
            f"PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\nPrintMotd no\n"
            f"SetEnv XDG_RUNTIME_DIR={self.runtime} PYTHONPATH={ROOT}\n"
        )
        known = (self.place / "host.pub").read_text().split()
        (self.place / "known").write_text(f"[{FAR}]:{PORT} {known[0]} {known[1]}\n")
        client = self.place / "ssh_config"
        client.write_text(
            f"Host *\n  IdentityFile {self.place}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.place}/known\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n"
        )
        programs = self.place / "bin"
        programs.mkdir()
        wrapper = programs / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
        wrapper.chmod(0o755)
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
        assert sshd
        log = (self.place / "sshd.log").open("wb")
        self._sshd = subprocess.Popen(
            self.within(self.far, sshd, "-D", "-e", "-f", server),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        end = time.monotonic() + 30
        while run(*self.within(self.near, wrapper, "-p", PORT, f"root@{FAR}", "true"), check=False).returncode:
            assert self._sshd.poll() is None, (self.place / "sshd.log").read_text()
            assert time.monotonic() < end, (self.place / "sshd.log").read_text()

    @property
    def runtime(self) -> Path:
        """Where sessions of both sides keep their files."""
        path = self.place / "run"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def destination(self) -> str:
        return f"ssh://root@{FAR}:{PORT}"

    @property
    def remote_command(self) -> str:
        return f"{sys.executable} -m tuimig.cli"

    def within(self, name: str, *command: Any) -> list[str]:
        """Not `ip netns exec`: that makes a mount namespace too."""
        return ["nsenter", f"--net=/run/netns/{name}", *map(str, command)]

    def environment(self, temporary: Path) -> dict[str, str]:
        env = environment(temporary)
        env["PATH"] = f"{self.place}/bin:{env['PATH']}"
        env["XDG_RUNTIME_DIR"] = str(self.runtime)
        return env

    def cut(self) -> None:
        """Nothing goes through, and nobody is told."""
        run("ip", "-n", self.far, "link", "set", self.device, "down")

    def mend(self) -> None:
        run("ip", "-n", self.far, "link", "set", self.device, "up")

    def limit(self, rate: str) -> None:
        """Both ways."""
        for name in (self.near, self.far):
            run(*f"tc -n {name} qdisc replace dev {self.device} root tbf rate {rate} burst 128kb latency 50ms".split())

    def close(self) -> None:
        if self._sshd is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._sshd.pid, signal.SIGTERM)
            self._sshd.wait(20)
        for name in (self.near, self.far):
            for pid in run("ip", "netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread in a network namespace, for sockets of our own."""
    ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    theirs = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(theirs)
        yield
    finally:
        _setns(ours)
        os.close(theirs)
        os.close(ours)


def _setns(fd: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
