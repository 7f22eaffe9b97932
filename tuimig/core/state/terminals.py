"""What belongs to others on descriptors 0, 1, 2: terminals, pipes and sockets to other processes; `--stdio` decides.

On any other descriptor a terminal cannot be migrated. Modules that find such a file keep it as `Outside` in their
section.
"""

from __future__ import annotations

import os
from typing import ClassVar

import msgspec

from tuimig.core.errors import Obstacle, RebuildFailed
from tuimig.core.manifest import Strict
from tuimig.core.state.base import Build, Frozen, Look, Probe
from tuimig.core.state.descriptors import Group, OpenFile, groups, place, raise_obstacles

CURE = "Redirect it to a file or close it; on descriptors 0, 1 and 2 --stdio decides"


class Outside(Strict, frozen=True):
    """An open file of 0, 1 or 2 whose other end is not in the process. `link` is for the person."""

    file: OpenFile
    link: str


def outside(group: Group) -> Outside:
    return Outside(group.file, group.link)


def stand_in(entry: Outside, build: Build) -> None:
    """Place what --stdio asks for: the null device, our own descriptor, or a file for what is written."""
    choice = build.options.stdio
    access = entry.file.flags & os.O_ACCMODE
    standard = min(slot.number for slot in entry.file.slots if slot.number <= 2)
    try:
        if choice == "inherit":
            fd = os.dup(standard)
        elif choice == "null" or (access != os.O_WRONLY and standard == 0):
            fd = os.open(os.devnull, access | entry.file.flags & (os.O_NONBLOCK | os.O_APPEND))
        else:
            flags = os.O_CREAT | os.O_APPEND | entry.file.flags & os.O_NONBLOCK
            fd = os.open(choice, flags | access, 0o600)
    except OSError as error:
        raise RebuildFailed(
            "the stand-in for a standard descriptor cannot be opened",
            subject=f"{entry.file.where} ({entry.link}), --stdio {choice}",
            syscall="open",
            errno=error.errno or 0,
            cure="Choose another --stdio",
        ) from error
    place(build, entry.file, fd)


class Terminal(Strict, frozen=True):
    files: list[Outside]


class Terminals:
    name: ClassVar[str] = "terminals"
    Section: ClassVar[type[msgspec.Struct]] = Terminal

    def obstacles(self, look: Look) -> list[Obstacle]:
        return [_obstacle(group) for group in groups(look, look.descriptors, self.name) if not group.standard]

    def probes(self, look: Look) -> list[Probe]:
        return []

    def dump(self, frozen: Frozen) -> Terminal:
        found = groups(frozen.look, frozen.descriptors, self.name)
        raise_obstacles(_obstacle(group) for group in found if not group.standard)
        return Terminal([outside(group) for group in found])

    def rebuild(self, section: Terminal, build: Build) -> None:
        for entry in section.files:
            stand_in(entry, build)


def _obstacle(group: Group) -> Obstacle:
    return Obstacle("terminal", group.where, f"{group.link} is a terminal", CURE)


KIND = Terminals()
