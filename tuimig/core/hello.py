"""What a process needs at its destination, and what of that a host does not have: compared before anything is stopped.

`needs` looks on the source, `missing` on the destination; it lists everything at once, each with its cure.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from tuimig.core import host, wire
from tuimig.core.engine import ffi, lib, new_error
from tuimig.core.errors import Obstacle
from tuimig.core.maps import parse_maps
from tuimig.core.model import PAGE, Kind, Options
from tuimig.core.procfs import LiveLook
from tuimig.core.stream import ENCODINGS

NT_GNU_BUILD_ID: Final = 3
PT_NOTE: Final = 4
SOCKETS: Final = (("tcp", socket.AF_INET, "4"), ("tcp6", socket.AF_INET6, "6"))
LISTENING: Final = "0A"
FAMILIES: Final = {"4": socket.AF_INET, "6": socket.AF_INET6}
SPARE: Final = 64 << 20  # for what is built around the process's own memory


# ---------------------------------------------------------------- the source


def needs(look: LiveLook, options: Options, encoding: str) -> wire.Needs:
    flags = _cpu_flags()
    return wire.Needs(
        arch=os.uname().machine,
        page_size=PAGE,
        kernel=os.uname().release,
        cpu_flags=sorted(flags),
        vdso=_kernel_regions(str(look.pid)),
        memory=sum(r.rss + r.swap for r in look.regions if r.kind is not Kind.FILE),
        pid=look.pid,
        command=look.status.get("Name", "")[:64],
        files=list(_files(look)),
        ports=_ports(look, options),
        encoding=encoding,
    )


def _cpu_flags() -> set[str]:
    """What the processor can do, as far as programs choose their code by it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return {flag for flag in value.split() if flag in _PROGRAM_FLAGS or flag.startswith(("avx", "sse", "amx"))}
    return set()


_PROGRAM_FLAGS: Final = frozenset(
    (
        *("aes", "pclmulqdq", "bmi1", "bmi2", "fma", "f16c", "movbe", "popcnt", "rdrand", "rdseed", "adx", "sha_ni"),
        *(
            "vaes",
            "vpclmulqdq",
            "gfni",
            "erms",
            "fsrm",
            "lzcnt",
            "abm",
            "xsave",
            "xsaveopt",
            "xsavec",
            "rdpid",
            "ssse3",
        ),
    )
)


def _kernel_regions(pid: str) -> list[tuple[str, int]]:
    regions = parse_maps(Path(f"/proc/{pid}/maps").read_bytes())
    return [(r.path, r.end - r.start) for r in regions if r.kind is Kind.KERNEL and r.path != "[vsyscall]"]


def _files(look: LiveLook) -> Iterator[wire.NeededFile]:
    seen: set[str] = set()
    exe = os.readlink(f"/proc/{look.pid}/exe")
    mapped = [(r.path, r.kind, "w" in r.perms) for r in look.regions if r.kind in (Kind.FILE, Kind.SHARED_FILE)]
    for path, kind, writable in [(exe, Kind.FILE, False), *mapped]:
        if path in seen:
            continue
        seen.add(path)
        status = os.stat(f"/proc/{look.pid}/root{path}")
        exact = kind is Kind.FILE
        yield wire.NeededFile(
            path=path,
            size=status.st_size if exact else -1,
            mtime_ns=status.st_mtime_ns if exact else -1,
            build_id=build_id(f"/proc/{look.pid}/root{path}") if exact else "",
            writable=kind is Kind.SHARED_FILE and writable,
        )
    for descriptor in look.descriptors.values():
        path = descriptor.link
        if not path.startswith("/") or path in seen or path.endswith(" (deleted)"):
            continue
        try:
            status = os.stat(f"/proc/{look.pid}/root{path}")
        except OSError:
            continue  # its state module says what becomes of it
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            seen.add(path)
            writable = descriptor.flags & os.O_ACCMODE != os.O_RDONLY
            yield wire.NeededFile(path, -1, -1, "", writable, stat.S_ISDIR(status.st_mode))


def _ports(look: LiveLook, options: Options) -> list[tuple[str, int, str]]:
    """Listening TCP sockets of the target, as they will be after --map-port."""
    inodes = {
        link[8:-1] for d in look.descriptors.values() if (link := d.link).startswith("socket:[") and link.endswith("]")
    }
    new = {pair.old: pair.new for pair in options.map_ports}
    found = []
    for name, family, letter in SOCKETS:
        try:
            lines = Path(f"/proc/{look.pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                host_hex, port_hex = fields[1].split(":")
                port = int(port_hex, 16)
                found.append((letter, new.get(port, port), _address(host_hex, family)))
    return found


def _address(text: str, family: int) -> str:
    """As /proc/net shows it: words in the processor's order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


def build_id(path: str) -> str:
    """The GNU build id of an ELF file, "" where there is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:5] != b"\x7fELF\x02":
                return ""
            (offset,) = struct.unpack_from("<Q", head, 32)
            size, count = struct.unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(min(size * count, 1 << 16))
            for at in range(0, len(table) - 55, max(size, 56)):
                kind, _, where, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
                if kind == PT_NOTE:
                    file.seek(where)
                    if found := _build_id_of(file.read(min(length, 1 << 16))):
                        return found
    except (OSError, struct.error):
        return ""
    return ""


def _build_id_of(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        data_at = name_at + (name_size + 3 & ~3)
        if kind == NT_GNU_BUILD_ID and notes[name_at : name_at + 4] == b"GNU\0":
            return notes[data_at : data_at + size].hex()
        at = data_at + (size + 3 & ~3)
    return ""


# ---------------------------------------------------------------- the destination


def missing(wanted: wire.Needs, pid_namespace: str = "auto") -> tuple[list[Obstacle], bool]:
    """All that stands in the way here, and whether a privilege or kernel feature is among it."""
    here = os.uname()
    probes = [probe for probe in host.probe_host() if probe.required and not probe.ok]
    lacks = [Obstacle("privilege", f"here: {p.name}", f"{p.needed_for}: {p.detail}", p.cure) for p in probes]
    if (wanted.arch, wanted.page_size) != (here.machine, PAGE):
        what = f"it is of {wanted.arch} with pages of {wanted.page_size} bytes, here it is {here.machine} with {PAGE}"
        lacks.append(Obstacle("architecture", "here", what, "Choose a host like the source"))
    error = new_error()
    if wanted.encoding not in ENCODINGS:
        lacks.append(Obstacle("compression", "here", f"{wanted.encoding} is not known", "Use another --compress"))
    elif lib.tm_encoding_check(ENCODINGS[wanted.encoding], error):
        why = bytes(ffi.string(error.what)).decode("utf-8", "replace")
        lacks.append(Obstacle("compression", "here", why, "Install it, or do without --compress"))
    others = list(_pid(wanted, pid_namespace))
    others += [*_processor(wanted), *_memory(wanted), *_vdso(wanted)]
    for file in wanted.files:
        others += _file(file)
    for letter, port, address in wanted.ports:
        others += _port(letter, port, address)
    return [*lacks, *others], bool(lacks)


def _pid(wanted: wire.Needs, pid_namespace: str) -> Iterator[Obstacle]:
    if pid_namespace == "host" and Path(f"/proc/{wanted.pid}").exists():
        cure = "End the process that has it, or use --pid-namespace new"
        yield Obstacle("process id", f"here: {wanted.pid}", "it is taken", cure)


def _processor(wanted: wire.Needs) -> Iterator[Obstacle]:
    absent = sorted(set(wanted.cpu_flags) - _cpu_flags())
    if absent:
        yield Obstacle(
            "processor",
            "here",
            f"it lacks {', '.join(absent[:12])}, which the process may have found at the source and use",
            "Choose a host with the source's features; accept with --yes if the process does not use them",
            asks=True,
        )


def _memory(wanted: wire.Needs) -> Iterator[Obstacle]:
    free = psutil.virtual_memory().available
    if free < wanted.memory + SPARE:
        yield Obstacle(
            "memory",
            "here",
            f"{free >> 20} MiB are free, the process has {wanted.memory >> 20} MiB",
            "Free memory there, or choose another host",
        )


def _vdso(wanted: wire.Needs) -> Iterator[Obstacle]:
    ours = _kernel_regions("self")
    if ours != list(wanted.vdso):
        yield Obstacle(
            "vdso",
            "here",
            f"the kernel ({os.uname().release}) provides other regions than the source's ({wanted.kernel})",
            "Use the same kernel on both hosts",
        )


def _file(file: wire.NeededFile) -> Iterator[Obstacle]:
    try:
        status = os.stat(file.path)
    except OSError as error:
        yield Obstacle("file-missing", file.path, f"it cannot be opened here ({error.strerror})", "Put it there")
        return
    if file.directory != stat.S_ISDIR(status.st_mode):
        yield Obstacle("file-differs", file.path, "it is of another kind here", "Put the source's there")
        return
    if file.writable and not os.access(file.path, os.W_OK):
        yield Obstacle("file-read-only", file.path, "it may not be written here", "Allow it, or receive as root")
    if file.size < 0:
        return
    ours = build_id(file.path) if file.build_id else ""
    if status.st_size != file.size:
        what = f"it has {status.st_size} bytes here, {file.size} at the source"
    elif file.build_id and ours != file.build_id:
        what = f"it is another build here ({ours[:12] or 'none'}, not {file.build_id[:12]})"
    elif file.mtime_ns >= 0 and status.st_mtime_ns != file.mtime_ns and not file.build_id:
        what = "it was changed at another time than the source's"
    else:
        return
    yield Obstacle("file-differs", file.path, what, "Install the same version there, with its time stamps")


def _port(letter: str, port: int, address: str) -> Iterator[Obstacle]:
    family = FAMILIES.get(letter)
    if family is None or not 0 < port < 65536:
        yield Obstacle("port", f"port {port}", "it is no port", "Report this as a bug")
        return
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((address, port))
            sock.listen(1)
        except OSError as error:
            yield Obstacle(
                "port",
                f"port {port} of {address}",
                f"the process listens there, here it cannot ({error.strerror})",
                "End who listens there, or use --map-port OLD:NEW",
            )
