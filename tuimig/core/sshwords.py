"""What the ssh client and the remote shell say when there is no connection to be had, and what helps."""

from __future__ import annotations

import re
from typing import Final

NOT_FOUND: Final = 127  # exit codes of a shell
NOT_RUN: Final = 126

# The first that fits what was said. {host}: as ssh takes it on its command line.
_CURES: Final = (
    (r"host key verification failed", "Log in once by hand and check its key: ssh {host}"),
    (
        r"permission denied \(|too many authentication failures|no supported authentication",
        "Log in by hand first (ssh {host}): name the user as ssh://user@host, give ssh a key (ssh-add, ssh-copy-id)",
    ),
    (r"could not resolve hostname", "Check the host's name, here and in your ssh configuration"),
    (r"connection refused", "Start sshd there, or name its port: ssh://host:port"),
    (r"timed out|no route to host|network is unreachable", "Check the address, the network and the firewall between"),
    (
        r"a password is required|a terminal is required|no tty present",
        "sudo cannot ask for a password there: allow the command without one (NOPASSWD), or log in as root",
    ),
    (
        r"connection (reset|closed) by|exceeded maxstartups",
        "sshd there takes no more connections at once: raise its MaxStartups, or use fewer --streams",
    ),
)


def cure(said: str, code: int | None, host: str, command: str) -> str:
    """`code`: how the ssh client ended, where it has. It hands on the exit code of the remote command."""
    if code == NOT_FOUND or (code is None and re.search(r"command not found|: not found", said)):
        return f"Install tuimig there, or say where it is: --remote-command /path/to/tuimig (it was {command!r})"
    if code == NOT_RUN:
        return f"It may not be run there: name another with --remote-command (it was {command!r})"
    for pattern, text in _CURES:
        if re.search(pattern, said, re.IGNORECASE):
            return text.format(host=host)
    return f"Try it by hand: ssh {host} {command} --version"
