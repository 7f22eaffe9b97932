"""Regular files, directories and plain character devices: path, flags, position. Small deleted ones keep their content.

Files are opened again by path on the destination. What they contain there is the destination's matter; type and size
are checked.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from typing import ClassVar, Final

import msgspec

from tuimig.core.errors import Obstacle, RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Frozen, Look, Probe, ProbeKind
from tuimig.core.state.descriptors import Group, OpenFile, borrow, groups, place, raise_obstacles, refuse_new, set_flags
from tuimig.core.state.terminals import Outside, outside, stand_in

DELETED: Final = " (deleted)"
CONTENT_LIMIT: Final = 1 << 20  # bytes of a deleted file that may be read inside the freeze
_PLAIN_DEVICES: Final = frozenset((1, minor) for minor in (3, 5, 7, 8, 9))  # null zero full random urandom
_OWN_PROC: Final = re.compile(r"/proc/\d+(/|$)")
_ONLY_AT_OPEN: Final = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034


class Content(Strict, frozen=True):
    """A file without a name, at T0. Open files with the same `identity` share it."""

    identity: str
    data: bytes
    mode: int
    uid: int
    gid: int
    seals: int  # -1: not a memfd


class File(Strict, frozen=True):
    file: OpenFile
    path: str
    type: int  # file type bits of st_mode
    position: int
    size: int  # bytes when it was dumped; 0 for what is not a regular file
    content: Content | None = None


class Files(Strict, frozen=True):
    files: list[File]
    outside: list[Outside]


def status(look: Look, group: Group) -> os.stat_result | None:
    """Of the open file itself, from our duplicate or by its path; None where neither leads to it."""
    inode = int(group.first.field("ino", "-1"))
    with borrow(look, group.first) as fd:
        if fd is not None and os.fstat(fd).st_ino == inode:
            return os.fstat(fd)
    there = _by_path(group.link)
    return there if there is not None and there.st_ino == inode else None


def _by_path(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _reachable(path: str, found: os.stat_result) -> bool:
    there = _by_path(path)
    return there is not None and (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)


def _nameless(group: Group, found: os.stat_result) -> bool:
    return group.link.endswith(DELETED) and not _reachable(group.link, found)


class FilesKind:
    name: ClassVar[str] = "files"
    Section: ClassVar[type[msgspec.Struct]] = Files

    def obstacles(self, look: Look) -> list[Obstacle]:
        found = []
        for group in groups(look, look.descriptors, self.name):
            known = status(look, group)
            obstacle = None if known is None else self._obstacle(look, group, known)
            if obstacle is not None:
                found.append(obstacle)
        return found

    def probes(self, look: Look) -> list[Probe]:
        probes = []
        for group in groups(look, look.descriptors, self.name):
            known = status(look, group)
            if known is not None and _nameless(group, known) and stat.S_ISREG(known.st_mode):
                path = f"/proc/{look.pid}/fd/{group.number}"
                probes.append(Probe(f"files.content.{group.number}", ProbeKind.FILE, path=path))
        return probes

    def dump(self, frozen: Frozen) -> Files:
        files: list[File] = []
        others: list[Outside] = []
        for group in groups(frozen.look, frozen.descriptors, self.name):
            known = status(frozen.look, group)
            if known is None:
                raise refuse_new(group, "it was opened and closed around the freeze")
            obstacle = self._obstacle(frozen.look, group, known)
            raise_obstacles([obstacle] if obstacle else [])
            if stat.S_ISFIFO(known.st_mode):
                others.append(outside(group))
                continue
            files.append(
                File(
                    file=group.file,
                    path=group.link,
                    type=stat.S_IFMT(known.st_mode),
                    position=group.first.position,
                    size=known.st_size if stat.S_ISREG(known.st_mode) else 0,
                    content=self._content(frozen, group, known) if _nameless(group, known) else None,
                )
            )
        return Files(files, others)

    def _content(self, frozen: Frozen, group: Group, known: os.stat_result) -> Content:
        answer = frozen.calls.get(f"files.content.{group.number}")
        before = frozen.look.descriptors.get(group.number)
        if answer is None or answer.ret < 0 or before is None or before.field("ino") != group.first.field("ino"):
            raise refuse_new(group, "the file was deleted during the freeze")
        seals = -1
        if group.link.startswith("/memfd:"):
            with borrow(frozen.look, group.first) as fd:
                if fd is None:
                    raise refuse_new(group, "it was closed around the freeze")
                seals = fcntl.fcntl(fd, _F_GET_SEALS)
        mode = stat.S_IMODE(known.st_mode)
        return Content(f"{known.st_dev}:{known.st_ino}", answer.data, mode, known.st_uid, known.st_gid, seals)

    def _obstacle(self, look: Look, group: Group, known: os.stat_result) -> Obstacle | None:
        where, link, mode = group.where, group.link, known.st_mode
        if stat.S_ISFIFO(mode) and not group.first.flags & os.O_PATH:
            if group.standard:
                return None
            return Obstacle("fifo", where, f"{link} is a pipe to other processes", "Close it first")
        if _nameless(group, known):
            return _nameless_obstacle(look, group, known)
        if not _reachable(link, known):
            return Obstacle("hidden-file", where, f"{link} cannot be reached by its path", "Unmount what hides it")
        if _OWN_PROC.match(link):
            return Obstacle("procfs", where, f"{link} shows one process by its id", "Close it first")
        if group.first.flags & os.O_PATH or stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return None
        if stat.S_ISCHR(mode) and (os.major(known.st_rdev), os.minor(known.st_rdev)) in _PLAIN_DEVICES:
            return None
        return Obstacle("device", where, f"{link} is a device with a state of its own", "Close it first")

    # ------------------------------------------------------------ destination

    def rebuild(self, section: Files, build: Build) -> None:
        nameless: dict[str, int] = {}
        for entry in section.files:
            flags = entry.file.flags & ~_ONLY_AT_OPEN
            if not stat.S_ISDIR(entry.type):
                flags &= ~os.O_TMPFILE  # together with O_DIRECTORY, which it contains
            path = entry.path
            if entry.content is not None:
                key = entry.content.identity
                if key not in nameless:
                    nameless[key] = build.own(_recreate(entry.path, entry.content))
                path = f"/proc/self/fd/{nameless[key]}"
            elif entry.file.flags & os.O_PATH:
                flags |= entry.file.flags & os.O_NOFOLLOW
            self._open(entry, path, flags, build)
        for other in section.outside:
            stand_in(other, build)

    def _open(self, entry: File, path: str, flags: int, build: Build) -> None:
        where = f"{entry.file.where} ({entry.path})"
        try:
            # Opened without blocking, so that a path which has become a pipe cannot hang us.
            fd = place(build, entry.file, os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY))
            found = os.fstat(fd)
            if stat.S_IFMT(found.st_mode) != entry.type:
                raise RebuildFailed("the path leads to another type of file", subject=where, cure="Put it back first")
            if flags & os.O_PATH:
                return
            set_flags(fd, flags)
            if not stat.S_ISCHR(entry.type) and entry.position:
                os.lseek(fd, entry.position, os.SEEK_SET)
        except OSError as error:
            raise RebuildFailed(
                "the file cannot be opened as the source has it",
                subject=where,
                syscall="open",
                errno=error.errno or 0,
                cure="Put it in place first",
            ) from error
        if stat.S_ISREG(entry.type) and entry.content is None:
            _warn(entry, found.st_size, build)


def _nameless_obstacle(look: Look, group: Group, known: os.stat_result) -> Obstacle | None:
    if not stat.S_ISREG(known.st_mode):
        return Obstacle("deleted-file", group.where, f"{group.link} is gone", "Close it first")
    if known.st_size > CONTENT_LIMIT:
        why = f"{group.link} has {known.st_size} bytes and no name to open it by"
        return Obstacle("deleted-file", group.where, why, f"Deleted files up to {CONTENT_LIMIT} bytes can be migrated")
    if any(region.shared and region.inode == known.st_ino and region.path == group.link for region in look.regions):
        why = f"{group.link} has no name and is mapped as shared memory"
        return Obstacle("mapped-deleted-file", group.where, why, "Close the descriptor once it is mapped")
    return None


def _recreate(path: str, content: Content) -> int:
    """A new file without a name: where the old one was if that place can hold one, else in memory."""
    if content.seals >= 0:
        fd = os.memfd_create(path.removeprefix("/memfd:").removesuffix(DELETED), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        try:
            fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # the directory is gone, or its file system has no nameless files
            fd = os.memfd_create(os.path.basename(path), os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as out:
        out.write(content.data)
    os.fchown(fd, content.uid, content.gid)
    os.fchmod(fd, content.mode)
    if content.seals > 0:
        fcntl.fcntl(fd, _F_ADD_SEALS, content.seals)
    return fd


def _warn(entry: File, size: int, build: Build) -> None:
    name = f"{entry.file.where}: {entry.path}"
    if size < entry.position:
        build.warnings.append(f"{name} has {size} bytes, less than the position {entry.position}")
    elif size < entry.size:
        build.warnings.append(f"{name} has {size} bytes, {entry.size - size} less than it had")
    if build.source_ends or entry.file.flags & os.O_ACCMODE == os.O_RDONLY:
        return
    try:
        there = os.readlink(f"/proc/{build.manifest.process.host_pid}/fd/{entry.file.number}")
    except (FileNotFoundError, PermissionError):
        return
    if there == entry.path:
        build.warnings.append(f"{name} is written by the copy and by its source alike")


KIND = FilesKind()
