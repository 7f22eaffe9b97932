"""The options of a connection to a destination: their grammar, where they have an effect, what they mean.

They have no defaults in the grammar: what was given where it has no effect is refused, not passed over.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from tuimig.core import transport
from tuimig.core.errors import UsageError
from tuimig.core.model import Options
from tuimig.core.policy import format_size, parse_size

MOST_STREAMS: Final = 16
COMPRESSIONS: Final = ("none", "lz4", "zstd")
MOST_RECONNECT_S: Final = 86_400.0
_FIELDS: Final = {  # the option's name in the namespace, and that of its value in Options
    "remote_command": "remote_command",
    "streams": "streams",
    "compress": "compress",
    "bandwidth": "bandwidth",
    "reconnect": "reconnect_s",
    "on_loss": "on_loss",
}


def add(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("the connection to another host")
    group.add_argument("--remote-command", metavar="CMD", help="what ssh runs (default tuimig)")
    group.add_argument("--streams", metavar="N", type=int, help="connections for pages (default 1)")
    group.add_argument("--compress", choices=COMPRESSIONS, help="of pages on the way (default none)")
    group.add_argument(
        "--bandwidth",
        metavar="SIZE",
        help="most that pages in the background may take in a second, like 50MiB; demands are not held up",
    )
    group.add_argument("--reconnect", metavar="SECONDS", type=float, help="try that long (default 60)")
    group.add_argument(
        "--on-loss",
        choices=["kill", "poison"],
        help="a copy whose source is gone for good: end it (default), or only whoever touches a missing page",
    )


def check(found: argparse.Namespace) -> None:
    """A destination that there can be, and nothing that has no effect on the way to it."""
    to = transport.parse(found.destination)
    given = [name for name in _FIELDS if getattr(found, name) is not None]
    if given and found.verb == "clone" and to.is_local:
        raise UsageError(
            "it has no effect on a clone on this host",
            subject=_option(given[0]),
            cure="Leave it out, or name a destination: ssh://[user@]host[:port] or unix:PATH",
        )
    if found.remote_command is not None:
        if to.kind != "ssh":
            raise UsageError(
                f"it has no effect on the way to {to.text}",
                subject="--remote-command",
                cure="Leave it out: it is what ssh runs, for ssh://[user@]host[:port]",
            )
        transport.check_command(found.remote_command)
    if found.streams is not None and not 1 <= found.streams <= MOST_STREAMS:
        raise UsageError(f"not between 1 and {MOST_STREAMS}: {found.streams}", subject="--streams")
    if found.reconnect is not None and not 0 <= found.reconnect <= MOST_RECONNECT_S:
        raise UsageError(f"not between 0 and {MOST_RECONNECT_S:.0f}: {found.reconnect:g}", subject="--reconnect")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def values(found: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as fields of Options."""
    given = {field: getattr(found, name, None) for name, field in _FIELDS.items()}
    if given["bandwidth"] is not None:
        given["bandwidth"] = parse_size(given["bandwidth"])
    return {field: value for field, value in given.items() if value is not None}


def words(options: Options) -> list[str]:
    """The command line's words for what is not as without them."""
    plain = Options()
    made = []
    for name, field in _FIELDS.items():
        value = getattr(options, field)
        if value != getattr(plain, field):
            shown = format_size(value) if field == "bandwidth" else f"{value:g}" if field == "reconnect_s" else value
            made += [_option(name), str(shown)]
    return made
