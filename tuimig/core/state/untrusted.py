"""Ranges for numbers in the manifest's sections: what is read back must fit the kernel structures it is put into.

msgspec checks the annotated types when it decodes; its bounds end at 63 bits, so 64-bit words are checked by `words`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec

from tuimig.core.errors import SnapshotDamaged

U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
I32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # and `words` in the structure's __post_init__

Kind = TypeVar("Kind")


def words(*values: int) -> None:
    """ValueError, which msgspec turns into its own, unless all fit 64 bits."""
    if any(value >> 64 for value in values):
        raise ValueError("a number has more than 64 bits")


def of_thread(kinds: Sequence[Kind], threads: Mapping[int, int], host_tid: int) -> Kind:
    """What `threads` says of one, where sections list distinct values and each thread's index into them."""
    index = threads.get(host_tid, -1)
    if not 0 <= index < len(kinds):
        raise SnapshotDamaged(f"a section says nothing of thread {host_tid}", cure="Take a new snapshot")
    return kinds[index]
