"""The registry of kinds of process state, in the order in which they are rebuilt.

Descriptors come before what refers to them by number (epoll, owners of signals), attributes that take privileges away
come last.
"""

from __future__ import annotations

from typing import Final

from tuimig.core.state import (
    attributes,
    credentials,
    descriptors,
    epoll,
    eventfd,
    files,
    locks,
    memory,
    pipes,
    scheduling,
    seccomp,
    signals,
    sockets,
    terminals,
    threads,
    timerfd,
    timers,
    unix,
)
from tuimig.core.state.base import StateKind

KINDS: Final[tuple[StateKind, ...]] = (
    files.KIND,
    terminals.KIND,
    pipes.KIND,
    eventfd.KIND,
    eventfd.SIGNALFD,
    timerfd.KIND,
    sockets.KIND,
    unix.KIND,
    locks.KIND,
    epoll.KIND,
    descriptors.KIND,
    signals.KIND,
    timers.KIND,
    memory.KIND,
    threads.KIND,
    attributes.KIND,
    scheduling.KIND,
    seccomp.KIND,
    credentials.KIND,
)
