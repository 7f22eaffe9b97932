"""Builds the two native parts: the engine (a cffi module) and `tuimig-init`, the small program beside it.

Everything else is in pyproject.toml. `tuimig-init` is the init of a copy's PID namespace; it is linked statically where
the C library allows it, so that it does not depend on the mounts that the copy sees.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("tuimig/core/native")
MODULE = "tuimig.core.native._engine"


class BuildNative(build_ext):
    """build_ext that knows the headers and builds the init program where it puts the engine."""

    def run(self) -> None:
        for extension in self.extensions:
            extension.depends = sorted(str(path) for path in NATIVE.glob("*.h"))
        super().run()
        source = NATIVE / "init.c"
        if source.exists():
            target = NATIVE if self.inplace else Path(self.get_ext_fullpath(MODULE)).parent
            target.mkdir(parents=True, exist_ok=True)
            compile_program(source, target / "tuimig-init")


def compile_program(source: Path, program: Path) -> None:
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-o", str(program), str(source)]
    if subprocess.run([*command, "-static"], check=False, capture_output=True).returncode != 0:
        subprocess.run(command, check=True)


setup(
    cffi_modules=["tuimig/core/native/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
