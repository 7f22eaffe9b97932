"""The writing side: a directory is made, the engine fills `pages`, and `commit` makes it a snapshot in one instant.

The writer owns the directory's descriptor and that of `pages`. Until `commit` has returned, `abort` (or leaving the
context) removes whatever it made; a directory that was there before stays, as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import msgspec

from tuimig.core.errors import EngineError, PrivilegeError, SpoolFull, TuimigError, UsageError
from tuimig.core.manifest import Manifest
from tuimig.core.snapshot import layout
from tuimig.core.snapshot.sums import Sums
from tuimig.core.snapshot.validate import fault

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Writer:
    """A snapshot that is being written. Use `Writer.create`."""

    def __init__(self, directory: Path, dir_fd: int, mode_before: int | None) -> None:
        self.directory = directory
        self.pages_fd = -1
        self._dir_fd = dir_fd
        self._mode_before = mode_before  # None: the directory is ours

    @classmethod
    def create(cls, directory: Path) -> Writer:
        """Make the directory (or take an empty one) and `pages` in it. Raises UsageError, PrivilegeError, SpoolFull."""
        made = _make_directory(directory)
        try:
            dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if made:
                directory.rmdir()
            _refuse(directory, error, "open")
        writer = cls(directory, dir_fd, None if made else stat.S_IMODE(os.fstat(dir_fd).st_mode))
        try:
            if not made:
                _check_empty(directory, dir_fd)
            os.fchmod(dir_fd, layout.DIRECTORY_MODE)
            writer.pages_fd = os.open(layout.PAGES, _MAKE, layout.FILE_MODE, dir_fd=dir_fd)
        except OSError as error:
            writer.abort()
            _refuse(directory, error, "open")
        except TuimigError:
            os.close(dir_fd)  # nothing was made, nothing may be removed
            writer._dir_fd = -1
            raise
        return writer

    def commit(self, manifest: Manifest, sums: memoryview | bytes | bytearray) -> Manifest:
        """Complete the snapshot: digests, sums, all on the disk, then the manifest under its name.

        `sums`: a uint32 for each page of `pages`. Returns the manifest as written. On failure all is as before.
        """
        table = memoryview(sums)
        try:
            full = self._describe(manifest, Sums.scan(table))
            os.fsync(self.pages_fd)
            os.fsync(self._dir_fd)
            self._write_manifest(full)
        except OSError as error:
            self.abort()
            _refuse(self.directory, error, "write")
        except BaseException:
            self.abort()
            raise
        self._close()
        return full

    def abort(self) -> None:
        """Remove what was made. May be called at any time; after a commit it does nothing."""
        if self._dir_fd < 0:
            return
        for name in layout.FILES:
            try:
                os.unlink(name, dir_fd=self._dir_fd)
            except FileNotFoundError:
                continue
        if self._mode_before is not None:
            os.fchmod(self._dir_fd, self._mode_before)
        self._close()
        if self._mode_before is None:
            try:
                self.directory.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # someone else put a file there, or moved it
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _describe(self, manifest: Manifest, sums: Sums) -> Manifest:
        """Write `sums`, and fill in what the manifest says of them."""
        if len(sums.table) * 1024 != manifest.pages_size:  # 4 bytes a sum, 4096 a page
            raise EngineError(f"{len(sums.table) // 4} sums do not fit {manifest.pages_size} bytes of pages")
        os.ftruncate(self.pages_fd, manifest.pages_size)
        regions = []
        for region in manifest.regions:
            digest, pages = ("", 0) if region.slot is None else sums.region(region.slot, region.size)
            regions.append(msgspec.structs.replace(region, digest=digest, pages=pages))
        full = msgspec.structs.replace(manifest, regions=regions)
        if wrong := fault(full):
            raise EngineError(f"the manifest would be refused: {wrong}", subject=str(self.directory))
        fd = os.open(layout.SUMS, _MAKE, layout.FILE_MODE, dir_fd=self._dir_fd)
        try:
            sums.save(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        return full

    def _write_manifest(self, manifest: Manifest) -> None:
        try:
            data = memoryview(layout.wrap(msgspec.json.encode(manifest)))
        except UnicodeEncodeError as error:
            raise EngineError(
                f"a name in the process is not UTF-8: {error.object[:200]!r}",
                subject=str(self.directory),
                cure="Rename that file or thread, and try again",
            ) from error
        fd = os.open(layout.UNFINISHED, _MAKE, layout.FILE_MODE, dir_fd=self._dir_fd)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(layout.UNFINISHED, layout.MANIFEST, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        os.fsync(self._dir_fd)
        if self._mode_before is None:
            _sync_parent(self.directory)

    def _close(self) -> None:
        for fd in (self.pages_fd, self._dir_fd):
            if fd >= 0:
                os.close(fd)
        self.pages_fd = self._dir_fd = -1


def _make_directory(directory: Path) -> bool:
    """True if it is new, False if a directory was there."""
    try:
        os.mkdir(directory, layout.DIRECTORY_MODE)
        return True
    except FileExistsError:
        if directory.is_symlink():
            raise UsageError(
                "it is a symbolic link", subject=str(directory), cure="Name the directory itself"
            ) from None
        if not directory.is_dir():
            raise UsageError("it is there and is no directory", subject=str(directory), cure="Name another") from None
        return False
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            "the directory that should hold it is missing", subject=str(directory), cure=f"mkdir -p {directory.parent}"
        ) from error
    except OSError as error:
        _refuse(directory, error, "mkdir")


def _check_empty(directory: Path, dir_fd: int) -> None:
    names = set(os.listdir(dir_fd))
    if not names:
        return
    if layout.MANIFEST in names:
        what = "it holds a snapshot already"
    elif names <= set(layout.FILES):
        what = "it holds an unfinished snapshot"
    else:
        what = "the directory is not empty"
    raise UsageError(what, subject=str(directory), cure="Name another directory, or remove this one first")


def _sync_parent(directory: Path) -> None:
    fd = os.open(directory.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refuse(directory: Path, error: OSError, syscall: str) -> NoReturn:
    """Raise what an OSError of the directory means to the person."""
    kind: type[TuimigError] = EngineError
    what, cure = "the snapshot could not be written", "Name another directory"
    if error.errno in _FULL:
        kind, what, cure = SpoolFull, "there is no room for the snapshot", "Make room there, or name another directory"
    elif error.errno in _DENIED:
        kind, what, cure = PrivilegeError, "no snapshot may be written there", "Name a directory that you may write to"
    raise kind(what, subject=str(directory), syscall=syscall, errno=error.errno or 0, cure=cure) from error
