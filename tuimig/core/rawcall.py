"""System calls that Python's library does not wrap, made by this process, with errors as OSError.

Addresses of ctypes buffers and plain integers are the only arguments; the callers own the buffers.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from tuimig.core.syscalls import NR

KCMP_FILE: Final = 0
KCMP_VM: Final = 1
KCMP_FILES: Final = 2
KCMP_FS: Final = 3

# PyDLL keeps the GIL: a call that returns twice must not leave the child waiting for another thread's lock.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str, *args: int) -> int:
    """The call's return value; OSError carries the call's name as its filename. For calls that do not block."""
    result: int = _libc.syscall(ctypes.c_long(NR[name]), *(ctypes.c_long(arg) for arg in args))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), name)
    return result


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Our own descriptor (close-on-exec) of another process's open file."""
    return call("pidfd_getfd", pidfd, number, 0)


def kcmp(pid1: int, pid2: int, kind: int, index1: int = 0, index2: int = 0) -> int:
    """0 the same, 1 less, 2 greater in an order that holds while both exist, 3 different without an order."""
    return call("kcmp", pid1, pid2, kind, index1, index2)
