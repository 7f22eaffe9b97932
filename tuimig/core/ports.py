"""The ports that a process has, which --map-port can name: a map of another one would have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from tuimig.core.errors import UsageError
from tuimig.core.manifest import Manifest
from tuimig.core.model import Options
from tuimig.core.state import sockets
from tuimig.core.state.base import Look

ROLES: Final = ("listening", "bound", "connected")  # whose local address is mapped


def check_look(look: Look, subject: str) -> None:
    """Of a process that runs. Raises UsageError."""
    if look.options.map_ports:
        _refuse_unknown(look.options, sockets.pictures(look), subject)


def check_stored(manifest: Manifest, options: Options, subject: str) -> None:
    """The same of a snapshot."""
    if options.map_ports:
        _refuse_unknown(options, [entry.picture for entry in _stored(manifest).files], subject)


def stored(manifest: Manifest) -> list[tuple[int, str]]:
    """(number, tcp or udp) of what a copy of a snapshot will listen on."""
    return sockets.ports_of(_stored(manifest))


def _stored(manifest: Manifest) -> sockets.Inets:
    raw = manifest.state.get(sockets.KIND.name)
    return sockets.Inets([]) if raw is None else msgspec.json.decode(raw, type=sockets.Inets)


def _refuse_unknown(options: Options, pictures: Iterable[sockets.Picture], subject: str) -> None:
    known = sorted({picture.local.port for picture in pictures if picture.role in ROLES and picture.local is not None})
    for pair in options.map_ports:
        if pair.old not in known:
            raise UsageError(
                f"{subject} does not listen on port {pair.old}",
                subject=f"--map-port {pair.old}:{pair.new}",
                cure=f"It has {', '.join(map(str, known))}" if known else "It has no port: leave it out",
            )
