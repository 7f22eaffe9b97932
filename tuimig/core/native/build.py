"""Builds the cffi face of the engine (API mode, out of line, abi3): `tuimig.core.native._engine`.

The public headers are plain C that cffi parses as it stands; only the guard and include lines are left out, so each
declaration exists once.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
FACE = ("error.h", "spool.h", "ring.h", "source.h", "heat.h", "cells.h", "stub.h", "stream.h", "fill.h")


def declarations(name: str) -> str:
    """The header's text without preprocessor lines and inline bodies."""
    text = (HERE / name).read_text()
    text = re.sub(r"//[^\n]*", "", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def sources() -> list[str]:
    return sorted(str(p.relative_to(HERE.parents[2])) for p in HERE.glob("*.c") if p.name not in EXCLUDED)


EXCLUDED = {"init.c", "_engine.c"}  # a program of its own; what this script writes

ffibuilder = FFI()
present = [name for name in FACE if (HERE / name).exists()]
ffibuilder.cdef("\n".join(declarations(name) for name in present))
ffibuilder.set_source(
    "tuimig.core.native._engine",
    "\n".join(f'#include "{name}"' for name in present),
    sources=sources(),
    include_dirs=["tuimig/core/native"],
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-msse4.2", "-pthread", "-D_GNU_SOURCE"],
    libraries=["pthread"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
