"""The reading side: open a snapshot, having checked everything but the content of the pages.

Nothing here trusts the directory: files are opened without following links, sizes are bounded before they are read, the
manifest is typed, checked against its checksum and for sense, the sums against the regions' digests.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TypeVar

import msgspec

from tuimig.core.errors import PrivilegeError, SnapshotDamaged, UsageError
from tuimig.core.manifest import FORMAT, Manifest
from tuimig.core.model import PAGE
from tuimig.core.snapshot import layout
from tuimig.core.snapshot.sums import Sums
from tuimig.core.snapshot.validate import fault, label, slots
from tuimig.core.spool import SUM, Spool

Section = TypeVar("Section", bound=msgspec.Struct)

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not hold us
_RETAKE = "Take a new snapshot"


class _FormatOnly(msgspec.Struct):
    """The one field that every version's manifest has."""

    format: int


class Snapshot:
    """An open snapshot. Owns the descriptor of `pages` and the spool, whose sums are loaded."""

    def __init__(self, directory: Path, manifest: Manifest, pages_fd: int, spool: Spool, warnings: list[str]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.pages_fd = pages_fd
        self.spool = spool
        self.warnings = tuple(warnings)

    @property
    def sums(self) -> memoryview:
        """One uint32 a page of `pages`. Dead after `close`."""
        return self.spool.sums

    def section(self, name: str, kind: type[Section]) -> Section:
        """A state module's section, typed."""
        if name not in self.manifest.state:
            _damaged(self.directory / layout.MANIFEST, f"the section `{name}` is missing")
        try:
            return msgspec.json.decode(self.manifest.state[name], type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            _damaged(self.directory / layout.MANIFEST, f"the section `{name}` is malformed: {error}")

    def close(self) -> None:
        self.spool.close()
        if self.pages_fd >= 0:
            os.close(self.pages_fd)
            self.pages_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_snapshot(directory: Path) -> Snapshot:
    """Open it for reading. SnapshotDamaged names the file and the region; UsageError: there is no such directory."""
    warnings: list[str] = []
    try:
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        _no_directory(directory, error)
    try:
        _look_at_owner(directory, os.fstat(dir_fd), warnings)
        manifest = _read_manifest(directory, dir_fd, warnings)
        pages_fd = _open_file(directory, dir_fd, layout.PAGES, manifest.pages_size, warnings)
        try:
            spool = _open_spool(directory, dir_fd, pages_fd, manifest, warnings)
        except BaseException:
            os.close(pages_fd)
            raise
    except OSError as error:
        _damaged(directory, "it cannot be read", error)
    finally:
        os.close(dir_fd)
    return Snapshot(directory, manifest, pages_fd, spool, warnings)


def _read_manifest(directory: Path, dir_fd: int, warnings: list[str]) -> Manifest:
    path = directory / layout.MANIFEST
    names = set(os.listdir(dir_fd))
    if layout.MANIFEST not in names:
        if names & set(layout.FILES):
            _damaged(directory, "the snapshot is unfinished: whoever wrote it was interrupted before the manifest")
        _damaged(directory, "it is no snapshot: there is no manifest.json", cure="Name a snapshot's directory")
    fd = _open_file(directory, dir_fd, layout.MANIFEST, None, warnings)
    with os.fdopen(fd, "rb") as file:
        data = file.read(layout.MANIFEST_LIMIT + 1)
    if len(data) > layout.MANIFEST_LIMIT:
        _damaged(path, f"it is larger than {layout.MANIFEST_LIMIT >> 20} MiB")
    try:
        wrapper = msgspec.json.decode(data, type=layout.Wrapper)
        raw = bytes(wrapper.manifest)
        if layout.checksum(raw) != wrapper.blake2b or layout.wrap(raw) != data:
            _damaged(path, "its checksum does not match: it was changed after it was written")
        version = msgspec.json.decode(raw, type=_FormatOnly).format
        if version != FORMAT:
            _damaged(
                path,
                f"it has format {version}, this version of tuimig reads format {FORMAT}",
                cure="Use the version of tuimig that wrote it",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _damaged(path, f"it is malformed: {error}")
    if wrong := fault(manifest):
        _damaged(path, wrong)
    return manifest


def _open_spool(directory: Path, dir_fd: int, pages_fd: int, manifest: Manifest, warnings: list[str]) -> Spool:
    path = directory / layout.SUMS
    n_pages = manifest.pages_size // PAGE
    fd = _open_file(directory, dir_fd, layout.SUMS, n_pages * SUM, warnings)
    try:
        spool = Spool(pages_fd, n_pages, writable=False, subject=str(directory / layout.PAGES))
        try:
            _check_sums(path, Sums.load(fd, spool.sums), manifest)
        except BaseException:
            spool.close()
            raise
    except EOFError:
        _damaged(path, "it was cut while it was read")
    finally:
        os.close(fd)
    return spool


def _check_sums(path: Path, sums: Sums, manifest: Manifest) -> None:
    for region in manifest.regions:
        if region.slot is None:
            continue
        digest, pages = sums.region(region.slot, region.size)
        if digest != region.digest:
            _damaged(path, f"{label(region)}: its sums are not those that were written")
        if pages != region.pages:
            _damaged(path, f"{label(region)}: it has {pages} stored pages, the manifest says {region.pages}")
    stray = sums.stray([(start, end) for start, end, _ in slots(manifest.regions)])
    if stray is not None:
        _damaged(path, f"page {stray} has a sum and belongs to no region")


def _open_file(directory: Path, dir_fd: int, name: str, size: int | None, warnings: list[str]) -> int:
    """Open a regular file of exactly this size."""
    path = directory / name
    try:
        fd = os.open(name, _READ, dir_fd=dir_fd)
    except FileNotFoundError:
        _damaged(path, "the file is missing")
    except OSError as error:
        if error.errno == errno.ELOOP:
            _damaged(path, "it is a symbolic link")
        _damaged(path, "it cannot be opened", error)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            _damaged(path, "it is no regular file")
        if size is not None and status.st_size != size:
            word = "cut" if status.st_size < size else "too long"
            _damaged(path, f"it is {word}: {status.st_size} bytes, the manifest says {size}")
        _look_at_owner(path, status, warnings)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _look_at_owner(path: Path, status: os.stat_result, warnings: list[str]) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        warnings.append(f"{path} belongs to user {status.st_uid}, who can change what is restored from it")
    if status.st_mode & 0o022:
        warnings.append(f"{path} can be changed by other users (mode {stat.S_IMODE(status.st_mode):04o})")
    elif status.st_mode & 0o055:
        warnings.append(f"{path} can be read by other users (mode {stat.S_IMODE(status.st_mode):04o})")


def _no_directory(directory: Path, error: OSError) -> NoReturn:
    if error.errno in (errno.EACCES, errno.EPERM):
        raise PrivilegeError("it may not be read", subject=str(directory), syscall="open", errno=error.errno) from error
    raise UsageError(
        "there is no such snapshot directory", subject=str(directory), syscall="open", errno=error.errno or 0
    ) from error


def _damaged(path: Path, what: str, error: OSError | None = None, cure: str = _RETAKE) -> NoReturn:
    raise SnapshotDamaged(
        what, subject=str(path), errno=(error.errno or 0) if error else 0, syscall="read" if error else "", cure=cure
    ) from error
