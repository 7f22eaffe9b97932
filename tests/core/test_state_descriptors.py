"""Descriptors go through dump and rebuild and behave in the copy as they would have in the source."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from descriptor_lab import find_obstacles, flags, program, rebuild, take

from tuimig.core import rawcall
from tuimig.core.errors import RebuildFailed, Unsupported
from tuimig.core.model import Options, PortMap
from tuimig.core.state import descriptors
from tuimig.core.state.base import Build, Stage

# Python's own start leaves 0, 1 and 2; what a program below opens first is 3.


# ---------------------------------------------------------------- files


def test_file_keeps_position_flags_and_sharing(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    code = f"""
        a = os.open({str(path)!r}, os.O_RDWR | os.O_APPEND)
        os.lseek(a, 4, 0)
        os.dup2(a, 9)
        other = os.open({str(path)!r}, os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(other, 7, 0)
        d = os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY)
        p = os.open({str(path)!r}, os.O_PATH)
        z = os.open("/dev/zero", os.O_RDONLY)
    """

    def check() -> Any:
        first = os.read(3, 2)
        shared = os.read(9, 2)
        inherited = (os.get_inheritable(3), os.get_inheritable(9))
        os.write(3, b"x")
        return [
            (first + shared + os.read(4, 3)).decode(),
            inherited,
            bool(flags(3) & os.O_APPEND),
            bool(flags(4) & os.O_NONBLOCK),
            "data" in os.listdir(5),
            os.fstat(6).st_size,
            os.read(7, 3).hex(),
        ]

    with program(code, tmp_path) as pid:
        taken = take(pid)
    assert taken.obstacles == []
    copied = rebuild(taken, check)
    assert copied.value == ["4567789", [False, True], True, True, True, 11, "000000"]
    assert copied.warnings == []


def test_writing_beside_the_source_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with program(f"os.write(os.open({str(path)!r}, os.O_RDWR | os.O_CREAT), b'12345')", tmp_path) as pid:
        taken = take(pid)
        assert "by the copy and by its source" in rebuild(taken, lambda: 0).warnings[0]
    path.write_bytes(b"1")
    assert "less than the position 5" in rebuild(taken, lambda: 0).warnings[0]
    path.unlink()
    with pytest.raises(RebuildFailed, match=r"descriptor 3 .*log.*No such file"):
        rebuild(taken, lambda: 0)
    path.mkdir()
    with pytest.raises(RebuildFailed, match="descriptor 3"):
        rebuild(taken, lambda: 0)


def test_small_deleted_files_keep_their_content(tmp_path: Path) -> None:
    code = f"""
        f = os.open({str(tmp_path / "gone")!r}, os.O_RDWR | os.O_CREAT)
        os.write(f, b"kept content")
        second = os.open({str(tmp_path / "gone")!r}, os.O_RDONLY)
        os.unlink({str(tmp_path / "gone")!r})
        t = os.open({str(tmp_path)!r}, os.O_RDWR | os.O_TMPFILE)
        os.write(t, b"never named")
        m = os.memfd_create("mem", os.MFD_ALLOW_SEALING)
        os.write(m, b"memory")
        fcntl.fcntl(m, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
    """

    def check() -> Any:
        os.pwrite(3, b"K", 0)
        try:
            os.ftruncate(6, 1)
            sealed = 0
        except OSError as error:
            sealed = error.errno
        shared = os.pread(4, 20, 0).decode()
        return [shared, os.lseek(3, 0, 1), os.pread(5, 20, 0).decode(), os.pread(6, 9, 0).decode(), sealed]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
    assert rebuild(taken, check).value == ["Kept content", 12, "never named", "memory", errno.EPERM]
    assert not (tmp_path / "gone").exists()


def test_what_cannot_be_opened_again_is_an_obstacle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    code = f"""
        f = os.open({str(tmp_path / "big")!r}, os.O_RDWR | os.O_CREAT)
        os.ftruncate(f, 2 << 20)
        os.unlink({str(tmp_path / "big")!r})
        os.open({str(tmp_path / "fifo")!r}, os.O_RDWR)
        os.open("/proc/self/status", os.O_RDONLY)
        os.open("/dev/kmsg", os.O_RDONLY)
        m, s = os.openpty()
        ctypes.CDLL(None).inotify_init1(0)
        os.pidfd_open(os.getpid())
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).detach()
        r, w = os.pipe()
    """
    with program(code, tmp_path) as pid:
        found = find_obstacles(pid)
    assert sorted((obstacle.name, obstacle.where) for obstacle in found) == [
        ("deleted-file", "descriptor 3"),
        ("device", "descriptor 6"),
        ("device", "descriptor 7"),
        ("fifo", "descriptor 4"),
        ("inotify", "descriptor 9"),
        ("pidfd", "descriptor 10"),
        ("procfs", "descriptor 5"),
        ("socket-family", "descriptor 11"),
        ("terminal", "descriptor 8"),
    ]
    assert all(obstacle.cure for obstacle in found)


# ---------------------------------------------------------------- locks


def test_locks_are_taken_again_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "pidfile"
    code = f"""
        a = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
        fcntl.flock(a, fcntl.LOCK_EX)
        b = os.open({str(path)!r}, os.O_RDWR)
        fcntl.lockf(b, fcntl.LOCK_EX, 10, 5)
        c = os.open({str(path)!r}, os.O_RDWR)
        fcntl.fcntl(c, 37, struct.pack("=hhxxxxqqixxxx", fcntl.F_RDLCK, 0, 100, 0, 0))
    """

    def check() -> Any:
        other = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        else:
            held = False
        with open(f"/proc/self/fdinfo/{4}") as info:
            record = [line.split()[2:] for line in info if line.startswith("lock")]
        return [held, [words[:1] + words[2:3] + words[-2:] for words in record]]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.names() == ["file-lock", "file-lock"]
        assert all(obstacle.asks for obstacle in taken.obstacles)
        with pytest.raises(RebuildFailed, match=r"descriptor 3: another process holds its lock"):
            rebuild(taken, check)
        loose = rebuild(taken, lambda: 0, Options(yes=True))
        assert sum("without its file lock" in warning for warning in loose.warnings) == 2
    assert rebuild(taken, check).value == [True, [["POSIX", "WRITE", "5", "14"]]]


# ---------------------------------------------------------------- pipes


def test_pipe_keeps_content_capacity_and_ends(tmp_path: Path) -> None:
    code = """
        r, w = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(w, 1031, 16384)
        os.write(w, b"first ")
        os.write(w, b"second")
        broken, _ = os.pipe()
        os.write(_, b"left over")
        os.close(_)
        _, unread = os.pipe()
        os.close(_)
    """

    def check() -> Any:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        got = os.read(3, 100)
        os.write(4, b"more")
        try:
            os.write(7 if os.path.exists("/proc/self/fd/7") else 6, b"x")
        except BrokenPipeError:
            unread = True
        else:
            unread = False
        return [
            (got + os.read(3, 100)).decode(),
            fcntl.fcntl(3, 1032),
            bool(flags(3) & os.O_NONBLOCK),
            os.read(5, 100).decode(),
            os.read(5, 100).decode(),
            unread,
        ]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        again = take(pid)
    assert taken.obstacles == []
    assert again.sections["pipes"] == taken.sections["pipes"], "the probe must not consume"
    assert rebuild(taken, check).value == ["first secondmore", 16384, True, "left over", "", True]


def test_pipe_full_to_the_brim(tmp_path: Path) -> None:
    with program("r, w = os.pipe2(os.O_NONBLOCK); os.write(w, bytes(range(256)) * 256)", tmp_path) as pid:
        taken = take(pid)

    def check() -> Any:
        data = b""
        while len(data) < 65536:
            data += os.read(3, 65536)
        return data == bytes(range(256)) * 256

    assert rebuild(taken, check).value is True


def test_pipe_to_others(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        with program("", tmp_path, pass_fds=(writer,)) as pid:
            found = find_obstacles(pid)
            assert [(obstacle.name, obstacle.where) for obstacle in found] == [("pipe", f"descriptor {writer}")]
            with pytest.raises(Unsupported, match="cannot be migrated"):
                take(pid)
        with program("os.dup2(1, 8)", tmp_path, stdout=writer) as pid:
            taken = take(pid)
    finally:
        os.close(reader)
        os.close(writer)
    assert taken.obstacles == []
    log = tmp_path / "log"
    rebuild(taken, lambda: [os.write(1, b"out"), os.write(8, b" dup")], Options(stdio=str(log)))
    assert log.read_bytes() == b"out dup"
    assert rebuild(taken, lambda: os.readlink("/proc/self/fd/1")).value == "/dev/null"
    mine = os.readlink("/proc/self/fd/1")
    assert rebuild(taken, lambda: os.readlink("/proc/self/fd/1"), Options(stdio="inherit")).value == mine


def test_terminal_on_standard_descriptors(tmp_path: Path) -> None:
    master, slave = os.openpty()
    try:
        with program("", tmp_path, stdin=slave, stdout=slave, stderr=slave) as pid:
            taken = take(pid)
    finally:
        os.close(master)
        os.close(slave)
    assert taken.obstacles == []
    value = rebuild(taken, lambda: [os.readlink(f"/proc/self/fd/{n}") for n in range(3)]).value
    assert value == ["/dev/null"] * 3


# ---------------------------------------------------------------- events and timers


def test_eventfd_and_signalfd(tmp_path: Path) -> None:
    code = """
        e = os.eventfd(7, os.EFD_NONBLOCK)
        os.eventfd_write(e, 1 << 33)
        s = os.eventfd(3, os.EFD_SEMAPHORE)
        m = (ctypes.c_uint64 * 16)(1 << (signal.SIGUSR1 - 1))
        ctypes.CDLL(None).signalfd(-1, m, os.O_NONBLOCK)
    """

    def check() -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        number = int.from_bytes(os.read(5, 128)[:4], "little")
        values = [os.eventfd_read(3), os.eventfd_read(4), os.eventfd_read(4)]
        try:
            os.eventfd_read(3)
        except BlockingIOError:
            values.append(-1)
        return [*values, number]

    with program(code, tmp_path) as pid:
        taken = take(pid)
    assert rebuild(taken, check).value == [(1 << 33) + 7, 1, 1, -1, signal.SIGUSR1]


TIMERS = """
    libc = ctypes.CDLL(None)
    def timer(clock, flags, first, interval):
        fd = libc.timerfd_create(clock, 0)
        parts = [*divmod(interval, 10**9), *divmod(first, 10**9)]
        assert libc.timerfd_settime(fd, flags, (ctypes.c_long * 4)(*parts), None) == 0
        return fd
    S = 10**9
    timer(1, 0, S // 2, 0)                              # 3: one shot
    timer(1, 0, S // 10, S // 10)                       # 4: expired and not read
    timer(0, 1, time.time_ns() + S // 2, 0)             # 5: by the wall clock
    timer(1, 0, 1000 * S, 0)                            # 6: far away
    timer(1, 0, 1000, 0)                                # 7: one shot, over, not read
    libc.timerfd_create(1, 0)                           # 8: never armed
    timer(0, 0, S // 10, S // 10)                       # 9: relative on the wall clock, expired and not read
    started = time.monotonic_ns()
    time.sleep(0.35)
"""


@pytest.mark.parametrize("clocks_continue", [True, False])
def test_timers_fire_when_they_would_have(
    tmp_path: Path, clocks_continue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not clocks_continue:
        monkeypatch.setattr("descriptor_lab.Build", functools.partial(Build, clocks_continue=False))

    with program(TIMERS, tmp_path) as pid:
        taken = take(pid)
        by_number = {timer.file.number: timer for timer in taken.sections["timerfd"].files}
        t0 = taken.manifest.clocks.monotonic_ns

    def check() -> Any:
        for number in range(3, 10):
            os.set_blocking(number, False)
        poll = select.poll()
        poll.register(3, select.POLLIN)
        poll.register(5, select.POLLIN)
        late = {}
        while len(late) < 2:
            for number, _ in poll.poll(2000):
                late[number] = time.monotonic_ns() - t0
                poll.unregister(number)
        ticks = {}
        for number in range(3, 10):
            try:
                ticks[number] = int.from_bytes(os.read(number, 8), "little")
            except BlockingIOError:
                ticks[number] = 0
        return [late[3], late[5], ticks, (time.monotonic_ns() - t0)]

    shot, wall, ticks, elapsed = rebuild(taken, check).value
    assert abs(shot - by_number[3].remaining_ns) < 60_000_000
    assert abs(wall - by_number[5].remaining_ns) < 60_000_000
    assert ticks["3"] == ticks["5"] == ticks["7"] == 1
    assert ticks["6"] == ticks["8"] == 0
    for number in (4, 9):
        before = by_number[number].ticks
        assert before >= 3
        assert abs(ticks[str(number)] - (before + elapsed / 1e8)) <= 1.6


# ---------------------------------------------------------------- epoll


def test_epoll_reports_with_the_right_data(tmp_path: Path) -> None:
    code = """
        r, w = os.pipe()                                     # 3 4
        os.write(w, b"x")
        e = os.eventfd(0)                                    # 5
        libc = ctypes.CDLL(None)
        class Event(ctypes.Structure):
            _pack_ = 1
            _fields_ = [("events", ctypes.c_uint32), ("data", ctypes.c_uint64)]
        ep = libc.epoll_create1(0)                           # 6
        outer = libc.epoll_create1(0)                        # 7
        def add(ep, fd, events, data):
            assert libc.epoll_ctl(ep, 1, fd, ctypes.byref(Event(events, data))) == 0
        one = os.eventfd(1)                                  # 8
        add(ep, one, 1 | 1 << 30, 0x88)                      # one shot, fires right away
        assert libc.epoll_wait(ep, (Event * 4)(), 4, 0) == 1
        add(ep, r, 1, 0xFFFFFFFFFFFFFFF0)
        add(ep, e, 1 | 1 << 31, 0x55)
        add(outer, ep, 1, 7)
    """

    def check() -> Any:
        outer = select.epoll.fromfd(7)
        inner = select.epoll.fromfd(6)
        seen = [outer.poll(0)]
        seen += [sorted(inner.poll(0)) for _ in range(2)]
        os.eventfd_write(5, 1)
        seen.append(sorted(inner.poll(0)))
        seen.append(sorted(inner.poll(0)))  # by edge: not again
        with open("/proc/self/fdinfo/6") as info:
            fired = [line.split()[3] for line in info if line.startswith("tfd:        8")]
        return [seen, fired]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
    seen, fired = rebuild(taken, check).value
    large, small = -16, 0x55  # epoll objects of Python hand out data as a signed int
    assert seen[0] == [[7, 1]]
    assert seen[1] == seen[2] == [[large, 1]]
    assert seen[3] == [[large, 1], [small, 1]]
    assert seen[4] == [[large, 1]]
    assert fired == ["40000000"]


def test_epoll_with_a_registration_of_a_closed_number(tmp_path: Path) -> None:
    code = """
        e = os.eventfd(0)
        p = select.epoll()
        p.register(e, 1)
        os.dup2(e, 9)
        os.close(e)
        q = os.eventfd(1)
    """
    with program(code, tmp_path) as pid:
        found = find_obstacles(pid)
    assert [obstacle.name for obstacle in found] == ["epoll-stale"]


# ---------------------------------------------------------------- TCP and UDP


def _free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_listening_sockets_with_options(tmp_path: Path) -> None:
    port, six = _free_port(), _free_port()
    code = f"""
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50000)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
        s.bind(("127.0.0.1", {port}))
        s.listen(37)
        s.setblocking(False)
        t = socket.socket(socket.AF_INET6)
        t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        t.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        t.bind(("::", {six}))
        t.listen(5)
        u = socket.socket()
        u.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    """

    def check(where: int) -> Any:
        s, t, u = (socket.socket(fileno=number) for number in (3, 4, 5))
        client = socket.create_connection(("127.0.0.1", where))
        client.send(b"hello")
        os.set_blocking(3, True)
        accepted, _ = s.accept()
        return [
            accepted.recv(9).decode(),
            s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            s.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            s.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
            s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            s.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8).hex(),
            s.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
            int.from_bytes(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:32], "little"),
            t.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
            t.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
            t.getsockname()[:2],
            u.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
        ]

    expected = ["hello", 1, 1, 77, 3, 100000, "0100000005000000", 0, 37, 1, 1]
    moved = _free_port()
    maps = Options(map_ports=(PortMap(port, moved), PortMap(six, _free_port())))
    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
        with pytest.raises(RebuildFailed, match=rf"127.0.0.1:{port} cannot be bound.*--map-port {port}:NEW"):
            rebuild(taken, lambda: 0)
        assert rebuild(taken, lambda: check(moved), maps).value[:11] == expected
    assert rebuild(taken, lambda: check(port)).value == [*expected, ["::", six], 1]


def test_reuseport_does_not_steal_from_the_source(tmp_path: Path) -> None:
    port = _free_port()
    code = f"""
        for _ in range(2):
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            s.bind(("127.0.0.1", {port}))
            s.listen(5)
            os.dup(s.fileno())
    """
    with program(code, tmp_path) as pid:
        taken = take(pid)
        with pytest.raises(RebuildFailed, match="--map-port"):
            rebuild(taken, lambda: 0)
    value = rebuild(taken, lambda: [socket.socket(fileno=number).getsockname() for number in (4, 3)]).value
    assert value == [["127.0.0.1", port]] * 2


def test_established_connections(tmp_path: Path) -> None:
    code = """
        l = socket.socket()
        l.bind(("127.0.0.1", 0))
        l.listen(5)
        c = socket.create_connection(l.getsockname())
        a, _ = l.accept()
        a.setblocking(False)
        c.send(b"in flight")
        ep = select.epoll()
        ep.register(a.fileno(), select.EPOLLIN)
        s6 = socket.socket(socket.AF_INET6)
        s6.connect(("::ffff:127.0.0.1", l.getsockname()[1]))
        l.accept()[0].detach()
        w = socket.create_connection(l.getsockname())
        os.close(w.detach()); l.close()
    """

    def check() -> Any:
        events = select.epoll.fromfd(6).poll(0)
        accepted = socket.socket(fileno=5)
        try:
            accepted.recv(10)
            first = 0
        except OSError as error:
            first = error.errno
        six = socket.socket(fileno=7)
        return [
            [(number, bool(event & select.EPOLLHUP), bool(event & select.EPOLLIN)) for number, event in events],
            first,
            accepted.recv(10).decode(),
            bool(flags(5) & os.O_NONBLOCK),
            six.family == socket.AF_INET6,
        ]

    with program(code, tmp_path) as pid:
        assert [obstacle.name for obstacle in find_obstacles(pid)] == ["tcp"] * 4
        assert "--tcp close" in find_obstacles(pid)[0].cure
        with pytest.raises(Unsupported):
            take(pid)
        taken = take(pid, Options(tcp="close"))
        assert taken.obstacles == []
    assert rebuild(taken, check).value == [[[5, True, True]], errno.ECONNRESET, "", True, True]


def test_connection_that_is_over_reads_as_ended(tmp_path: Path) -> None:
    code = """
        l = socket.socket()
        l.bind(("127.0.0.1", 0))
        l.listen(5)
        c = socket.create_connection(l.getsockname())
        a, _ = l.accept()
        l.close()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        a.close()
        try: c.recv(1)
        except ConnectionResetError: pass
    """
    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
    assert rebuild(taken, lambda: socket.socket(fileno=4).recv(5).decode()).value == ""


def test_connection_that_waits_to_be_accepted(tmp_path: Path) -> None:
    port = _free_port()
    code = f"l = socket.socket(); l.bind(('127.0.0.1', {port})); l.listen(5)"
    with program(code, tmp_path) as pid, socket.create_connection(("127.0.0.1", port)):
        assert [obstacle.name for obstacle in find_obstacles(pid)] == ["tcp"]
        taken = take(pid, Options(tcp="close"))
    assert "1 connections that wait" in rebuild(taken, lambda: 0).warnings[0]


def test_connections_come_and_go_around_the_freeze(tmp_path: Path) -> None:
    """What was accepted after the look is still told from what it is; what is gone by the dump counts as closed."""
    port = _free_port()
    code = f"""
        l = socket.socket()
        l.bind(("127.0.0.1", {port}))
        l.listen(5)
        first, _ = l.accept()
        def accept(*_):
            global second
            second, _ = l.accept()
        signal.signal(signal.SIGUSR1, accept)
    """
    held: list[socket.socket] = []
    knock = threading.Timer(0.3, lambda: held.append(socket.create_connection(("127.0.0.1", port))))
    knock.start()
    with program(code, tmp_path) as pid:

        def meanwhile() -> None:
            held.append(socket.create_connection(("127.0.0.1", port)))
            before = len(os.listdir(f"/proc/{pid}/fd"))
            os.kill(pid, signal.SIGUSR1)
            while len(os.listdir(f"/proc/{pid}/fd")) == before:
                time.sleep(0.001)

        taken = take(pid, Options(tcp="close"), meanwhile)
    for sock in held:
        sock.close()
    assert len(taken.sections["sockets"].files) == 3


def test_udp_sockets(tmp_path: Path) -> None:
    bound, connected = _free_port(socket.SOCK_DGRAM), _free_port(socket.SOCK_DGRAM)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    code = f"""
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        u.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        u.bind(("127.0.0.1", {bound}))
        c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        c.bind(("127.0.0.1", {connected}))
        c.connect({server.getsockname()!r})
        p = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    """

    def check() -> Any:
        u, c, p = (socket.socket(fileno=number) for number in (3, 4, 5))
        c.send(b"from the copy")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"ping", u.getsockname())
        return [
            u.recv(9).decode(),
            u.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST),
            p.getsockname()[1],
            u.getsockname()[1],
        ]

    with server:
        with program(code, tmp_path) as pid:
            taken = take(pid)
            assert taken.obstacles == []
            moved = _free_port(socket.SOCK_DGRAM)
            with pytest.raises(RebuildFailed, match=f"--map-port {bound}:NEW"):
                rebuild(taken, check)
            beside = rebuild(taken, check, Options(map_ports=(PortMap(bound, moved),)))
            assert beside.value == ["ping", 1, 0, moved]
            assert any("gets another local address" in warning for warning in beside.warnings)
            assert server.recv(99) == b"from the copy"
        alone = rebuild(taken, check)
        assert alone.value == ["ping", 1, 0, bound]
        assert alone.warnings == []
        assert server.recvfrom(99) == (b"from the copy", ("127.0.0.1", connected))


def test_socket_that_changes_during_the_freeze_is_refused(tmp_path: Path) -> None:
    code = """
        s = socket.socket()
        signal.signal(signal.SIGUSR1, lambda *_: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
    """
    with program(code, tmp_path) as pid:

        def meanwhile() -> None:
            os.kill(pid, signal.SIGUSR1)
            pidfd = os.pidfd_open(pid)
            with socket.socket(fileno=rawcall.pidfd_getfd(pidfd, 3)) as sock:
                os.close(pidfd)
                while not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY):
                    time.sleep(0.001)

        with pytest.raises(Unsupported, match=r"descriptor 3 .*changed during the freeze.*Try again"):
            take(pid, meanwhile=meanwhile)


# ---------------------------------------------------------------- unix sockets


def test_unix_pairs_with_what_is_queued(tmp_path: Path) -> None:
    code = """
        a, b = socket.socketpair()
        a.send(b"one "); a.send(b"two")
        b.send(b"back")
        b.setblocking(False)
        c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        c.send(b"packet")
        e, f = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        g, h = socket.socketpair()
        g.shutdown(socket.SHUT_WR)
        i, j = socket.socketpair()
        j.send(b"last words"); i.send(b"unread"); j.close()
        os.dup(a.fileno())
    """

    def check() -> Any:
        a, b, _, d, e, f, g, h, i = (socket.socket(fileno=number) for number in range(3, 12))
        seen = [b.recv(99), a.recv(99), d.recv(99), h.recv(99), i.recv(99)]
        try:
            i.recv(9)
            broken = 0
        except OSError as error:
            broken = error.errno
        a.send(b"on")
        f.send(b"gram")
        h.send(b"other way")
        seen += [b.recv(9), e.recv(9), g.recv(99)]
        os.write(12, b"dup")
        seen.append(b.recv(9))
        return [[text.decode() for text in seen], broken, b.getblocking() or bool(flags(4) & os.O_NONBLOCK)]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
        assert take(pid).sections["unix"] == taken.sections["unix"]
    texts = ["one two", "back", "packet", "", "last words", "on", "gram", "other way", "dup"]
    assert rebuild(taken, check).value == [texts, errno.ECONNRESET, True]


def test_unix_queue_that_cannot_be_read_exactly(tmp_path: Path) -> None:
    for code in (
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET); a.send(b'1'); a.send(b'2')",
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.send(b'1'); a.send(b'2')",
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])",
    ):
        with program(code, tmp_path) as pid, pytest.raises(Unsupported, match="Try again"):
            take(pid)


def test_unix_listener_by_path(tmp_path: Path) -> None:
    path, moved = tmp_path / "listen.sock", tmp_path / "moved.sock"
    code = f"""
        l = socket.socket(socket.AF_UNIX)
        l.bind({str(path)!r})
        os.chmod({str(path)!r}, 0o640)
        l.listen(9)
        c = socket.socket(socket.AF_UNIX)
        c.connect({str(path)!r})
        a, _ = l.accept()
        c.send(b"inside")
    """

    def check() -> Any:
        listener, client, accepted = (socket.socket(fileno=number) for number in (3, 4, 5))
        name = listener.getsockname()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(name)
            server, _ = listener.accept()
            server.send(b"hi")
            text = other.recv(9).decode()
        return [text, accepted.recv(99).decode(), accepted.getsockname() == name, client.getpeername() == name]

    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
        with pytest.raises(RebuildFailed, match=r"listen.sock.*--map-path .*listen.sock=NEW"):
            rebuild(taken, check)
        assert rebuild(taken, check, Options(map_paths=((str(path), str(moved)),))).value == [
            "hi",
            "inside",
            True,
            True,
        ]
        assert moved.stat().st_mode & 0o777 == 0o640
    assert path.exists(), "left behind by the source: stale"
    assert rebuild(taken, check).value == ["hi", "inside", True, True]
    path.unlink()
    path.write_text("in the way")
    with pytest.raises(RebuildFailed, match="not a socket"):
        rebuild(taken, check)


def test_unix_abstract_listener(tmp_path: Path) -> None:
    name = f"tuimig-test-{os.getpid()}"
    with program(f"l = socket.socket(socket.AF_UNIX); l.bind('\\0{name}'); l.listen(3)", tmp_path) as pid:
        taken = take(pid)
        with pytest.raises(RebuildFailed, match=f"@{name}"):
            rebuild(taken, lambda: 0)
        options = Options(map_paths=((f"@{name}", f"@{name}-2"),))
        value = rebuild(taken, lambda: socket.socket(fileno=3).getsockname().decode(), options).value
    assert value == f"\0{name}-2"
    assert rebuild(taken, lambda: socket.socket(fileno=3).getsockname().decode()).value == f"\0{name}"


def test_unix_connection_to_another_process(tmp_path: Path) -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        with program("", tmp_path, pass_fds=(theirs.fileno(),)) as pid:
            theirs_inside = theirs.fileno()
            found = find_obstacles(pid)
            assert [(obstacle.name, obstacle.where) for obstacle in found] == [
                ("unix-connection", f"descriptor {theirs_inside}")
            ]
        with program("", tmp_path, stdout=theirs) as pid:
            taken = take(pid)
    assert taken.obstacles == []
    assert rebuild(taken, lambda: os.readlink("/proc/self/fd/1")).value == "/dev/null"


def test_unix_datagram_client_is_connected_again(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    code = f"s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect({str(path)!r}); s.send(b'source')"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        with program(code, tmp_path) as pid:
            taken = take(pid)
            assert taken.obstacles == []
        assert rebuild(taken, lambda: socket.socket(fileno=3).send(b"copy")).warnings == []
        assert [server.recv(9), server.recv(9)] == [b"source", b"copy"]
    assert "could not be connected" in rebuild(taken, lambda: 0).warnings[0]


# ---------------------------------------------------------------- owners, and what comes during the freeze


def test_signal_owner(tmp_path: Path) -> None:
    code = """
        a, b = socket.socketpair()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        fcntl.fcntl(a, 8, os.getpid())      # F_SETOWN
        fcntl.fcntl(a, 10, signal.SIGUSR2)  # F_SETSIG
        fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | 0o20000)
    """
    with program(code, tmp_path) as pid:
        taken = take(pid)
        assert taken.obstacles == []
    owners = taken.sections["descriptors"].owners
    assert [(owner.number, owner.host, owner.signal, owner.asynchronous) for owner in owners] == [
        (3, pid, signal.SIGUSR2, True)
    ]

    build = Build(taken.manifest, Options())
    descriptors.KIND.rebuild(taken.sections["descriptors"], build)
    inner = taken.manifest.threads[0].tid
    assert build.calls[Stage.FINISH][0][1].args == (3, 15, struct.pack("=ii", 1, inner))
    # Without the thread in the manifest nobody is signalled: in this test the copy has another id than the source.
    taken.manifest = msgspec.structs.replace(taken.manifest, threads=[])
    value = rebuild(taken, lambda: [fcntl.fcntl(3, 11), bool(flags(3) & 0o20000)]).value
    assert value == [signal.SIGUSR2, True]


def test_pipe_that_comes_during_the_freeze_is_refused(tmp_path: Path) -> None:
    with program("signal.signal(signal.SIGUSR1, lambda *_: os.pipe())", tmp_path) as pid:

        def meanwhile() -> None:
            os.kill(pid, signal.SIGUSR1)
            while len(os.listdir(f"/proc/{pid}/fd")) < 5:
                time.sleep(0.001)

        with pytest.raises(Unsupported, match="Try again"):
            take(pid, meanwhile=meanwhile)
