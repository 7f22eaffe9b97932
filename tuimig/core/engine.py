"""The native engine as Python sees it: one table from the engine's error codes to the exception tree.

Every native call returns 0 or a code and fills a `struct tm_error`; `check` turns that into the exception that says
what failed, on what, by which system call, and the cure. Nothing else in Python looks at codes.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from tuimig.core import errors
from tuimig.core.native._engine import ffi, lib

__all__ = ["check", "ffi", "lib", "new_error", "raise_error"]

_CLASSES: Final[dict[int, type[errors.TuimigError]]] = {
    lib.TM_SYS: errors.EngineError,
    lib.TM_GONE: errors.TargetGone,
    lib.TM_PRIVILEGE: errors.PrivilegeError,
    lib.TM_UNSUPPORTED: errors.Unsupported,
    lib.TM_LOST: errors.CaptureLost,
    lib.TM_DEADLINE: errors.FreezeFailed,
    lib.TM_FULL: errors.SpoolFull,
    lib.TM_CANCELLED: errors.Cancelled,
    lib.TM_DAMAGED: errors.SnapshotDamaged,
    lib.TM_NOMEM: errors.EngineError,
}

# Used where the caller knows no better cure.
_CURES: Final[dict[int, str]] = {
    lib.TM_PRIVILEGE: "Run as root, or see `tuimig check` for what is missing",
    lib.TM_LOST: "Repeat it with `--guard on`",
    lib.TM_DEADLINE: "Try again, or give it more time with `--freeze-budget`",
    lib.TM_FULL: "Make room there, or choose another place",
    lib.TM_DAMAGED: "`tuimig verify` lists all damage; take a new snapshot",
    lib.TM_NOMEM: "Free some memory and try again",
}


def new_error() -> Any:
    """A cleared `struct tm_error *`."""
    return ffi.new("struct tm_error *")


def raise_error(error: Any, subject: str = "", cure: str = "") -> NoReturn:
    """Raise what a filled `struct tm_error *` means. `subject` is the process, region or file it was done on."""
    code = int(error.code)
    what = _text(error.what) or _text(error.where) or f"the engine failed with code {code}"
    if error.tid:
        what += f", thread {error.tid}"
    if error.address and code != lib.TM_DAMAGED:  # there it is a page's index, which `what` names
        what += f", at {error.address:#x}"
    syscall = _text(error.where) if error.what[0] != b"\0" else ""
    kind = _CLASSES.get(code, errors.EngineError)
    raise kind(what, subject=subject, syscall=syscall, errno=int(error.err), cure=cure or _CURES.get(code, ""))


def check(code: int, error: Any, subject: str = "", cure: str = "") -> None:
    """Raise unless a native call returned 0."""
    if code:
        if not error.code:
            error.code = code
        raise_error(error, subject, cure)


def _text(field: Any) -> str:
    return bytes(ffi.string(field)).decode("utf-8", "replace")
