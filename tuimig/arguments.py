"""The command's grammar: verbs, their options, and what the options mean as values of the core.

A value that makes no sense is a UsageError; argparse's own complaints become one too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

from tuimig import __version__, connecting
from tuimig.core import policy
from tuimig.core.errors import UsageError
from tuimig.core.jobs import Job
from tuimig.core.model import Options, PortMap, Treatment
from tuimig.core.policy import DEFAULT_EAGER_BELOW, Policy, Rule, format_size
from tuimig.settings import Settings, checked

DEMOS: Final = ("counter", "canvas", "kv", "churn", "hog", "redis")
MOST_BUDGET_MS: Final = 60_000.0
DESTINATIONS: Final = "local, unix:PATH or ssh://[user@]host[:port]"
EXIT_CODES: Final = """exit codes:
  0 done                                      4 the target is gone
  1 failed, the source runs as before         5 the target holds state that cannot be migrated
  2 usage                                     6 failed after hand-over
  3 a privilege or kernel feature is missing  129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM"""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting: cli.py alone decides on the exit code."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, cure=f"See {self.prog} --help")


class _Choice(argparse.Action):
    """--eager and --protect share one list, so that their order on the command line is kept."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        treatment = Treatment.EAGER if option == "--eager" else Treatment.PROTECTED
        namespace.rules = [*(namespace.rules or []), Rule(str(values), treatment, f"{option} {values}")]


def parser() -> Parser:
    top = Parser(
        prog="tuimig",
        description="Exact copy-on-write snapshots and live copies of a running process.",
        epilog=f"{EXIT_CODES}\n\n`tuimig VERB --help` explains a verb and shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tuimig {__version__}")
    _console(top)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)

    ps = _verb(verbs, "ps", "list processes and whether each can be migrated", "tuimig ps --user redis")
    ps.add_argument("--user", help="only this user's")
    ps.add_argument("--all", action="store_true", help="kernel threads too")

    maps = _verb(verbs, "maps", "a process's regions, what would be done with each, and why", "tuimig maps 4711")
    _pid(maps)
    _policy(maps)

    check = _verb(verbs, "check", "can this host do it; with a PID: can this process", "tuimig check 4711")
    check.add_argument("pid", metavar="PID", type=int, nargs="?", help="process to look at")
    _state(check)

    snapshot = _verb(
        verbs, "snapshot", "an exact picture of a process; it runs on", "tuimig snapshot 4711 /var/tmp/redis.snap"
    )
    _pid(snapshot)
    snapshot.add_argument("directory", metavar="DIR", type=Path, help="is created; mode 0700")
    _policy(snapshot)
    _capture(snapshot)
    _state(snapshot)
    _long(snapshot)

    restore = _verb(
        verbs,
        "restore",
        "run a snapshot; its pages come when they are touched",
        "tuimig restore /var/tmp/redis.snap --map-port 6379:6380",
    )
    restore.add_argument("directory", metavar="DIR", type=Path)
    restore.add_argument("--full", action="store_true", help="fill in all pages before the copy runs")
    _destination(restore)
    _state(restore)
    _long(restore)

    clone = _verb(verbs, "clone", "a live copy; the source runs on", "tuimig clone 4711 --map-port 6379:6380")
    _pid(clone)
    clone.add_argument(
        "destination", metavar="DEST", nargs="?", default="local", help=DESTINATIONS + " (default: local)"
    )
    _policy(clone)
    _capture(clone)
    clone.add_argument("--full", action="store_true", help="fill in all pages before the copy runs")
    _destination(clone)
    _state(clone)
    connecting.add(clone)
    _long(clone)

    move = _verb(
        verbs,
        "move",
        "it goes on elsewhere; the source ends when the destination has every page",
        "tuimig move 4711 ssh://root@backup --tcp close",
    )
    _pid(move)
    move.add_argument("destination", metavar="DEST", help=DESTINATIONS)
    _policy(move)
    _capture(move)
    move.add_argument("--full", action="store_true", help="bring in all pages before it runs there (it waits longer)")
    _destination(move)
    _state(move)
    connecting.add(move)
    _long(move)

    receive = _verb(
        verbs, "receive", "the destination's end of a clone or a move", "tuimig receive --listen unix:/run/tuimig.sock"
    )
    where = receive.add_mutually_exclusive_group(required=True)
    where.add_argument("--stdio", action="store_true", help="one connection on standard input and output, under ssh")
    where.add_argument(
        "--listen", metavar="unix:PATH", help="until it is ended; only your own user and root may connect"
    )

    journals = _verb(
        verbs, "journals", "what moves that did not end well have left here, and what to do", "tuimig journals"
    )
    journals.add_argument("--clear", metavar="SESSION", help="remove this one; not while its move still runs")
    journals.add_argument("--yes", action="store_true", help="also where its source is stopped and may be needed")

    inspect = _verb(verbs, "inspect", "what a snapshot holds", "tuimig inspect /var/tmp/redis.snap")
    inspect.add_argument("directory", metavar="DIR", type=Path)

    verify = _verb(verbs, "verify", "whether every byte of a snapshot is sound", "tuimig verify /var/tmp/redis.snap")
    verify.add_argument("directory", metavar="DIR", type=Path)

    demo = _verb(verbs, "demo", "start a workload, clone it, show that both run on", "tuimig demo kv --memory 256MiB")
    demo.add_argument("name", metavar="NAME", nargs="?", default="counter", choices=DEMOS, help=", ".join(DEMOS))
    demo.add_argument("--list", action="store_true", help="the workloads, and what to look at in each")
    demo.add_argument("--no-console", action="store_true", help="run through by itself, on a terminal too")
    demo.add_argument("--memory", metavar="SIZE", help="what the workload holds, if not as much as --list says")
    _long(demo)
    replay = _verb(
        verbs,
        "replay",
        "what a recording comes to; with two recordings: compare them",
        "tuimig replay clone.rec",
    )
    replay.add_argument("recording", metavar="FILE", type=Path, help="made with --record; replaying needs no privilege")
    replay.add_argument("--no-console", action="store_true", help="print the totals, on a terminal too")
    replay.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="another one, to compare with")
    return top


def _console(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("console (no VERB): pick, inspect, decide, launch, watch")
    group.add_argument("--pid", type=int, metavar="PID", dest="open_pid", help="open this process at once")
    group.add_argument("--read-only", action="store_true", default=None, help="look only: nothing is launched")
    group.add_argument("--ascii", action="store_true", default=None, help="ASCII characters only")
    group.add_argument("--no-mouse", action="store_false", default=None, dest="mouse", help="leave the mouse alone")
    group.add_argument("--refresh", type=float, metavar="SECONDS", help="between readings of the process list")
    group.add_argument("--theme", metavar="NAME", help="textual-dark, textual-light, nord, gruvbox, ...")


def _verb(verbs: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def _pid(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("pid", metavar="PID", type=int)


def _policy(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("policy: eager (copied while stopped) or protected (captured while it runs)")
    group.add_argument("--eager-below", metavar="SIZE", help="regions smaller than this are eager (default 1MiB)")
    what = "address range in hex, heap, stack, anon, or a glob on the path"
    group.add_argument("--eager", metavar="RANGE|NAME", action=_Choice, dest="rules", help=what)
    group.add_argument("--protect", metavar="RANGE|NAME", action=_Choice, dest="rules", help="likewise")
    group.add_argument("--policy", metavar="FILE", type=Path, help="TOML file of rules")


def _capture(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("capture")
    group.add_argument("--guard", choices=["auto", "on", "off"], default="auto", help="against memory freed after T0")
    group.add_argument("--precopy", metavar="ROUNDS|auto|off", default="auto", help="copy before T0 (auto)")
    group.add_argument("--track", choices=["auto", "async"], default="auto", help="how writes are followed")
    group.add_argument("--max-slowdown", metavar="PERCENT", type=float, default=25.0, help="what that may cost (25)")
    group.add_argument("--freeze-budget", metavar="MS", type=float, help="most time for copying while stopped (5)")
    group.add_argument("--verify", action="store_true", help="hash all pages at T0 and compare (a longer freeze)")


def _destination(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("the copy")
    group.add_argument("--map-port", metavar="OLD:NEW", action="append", default=[], help="listen there instead")
    group.add_argument("--map-path", metavar="OLD=NEW", action="append", default=[], help="likewise, unix sockets")
    group.add_argument("--pid-namespace", choices=["auto", "new", "host"], default="auto")


def _state(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("state that reaches outside the process")
    group.add_argument("--tcp", choices=["close", "refuse"], default="refuse", help="established connections")
    group.add_argument("--stdio", metavar="null|inherit|FILE", default="null", help="the copy's terminal or pipes")
    group.add_argument("--yes", action="store_true", help="accept what `check` asks about")


def _long(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--events", metavar="FILE|-", help="JSON lines while it runs; - is stdout")
    verb.add_argument("--record", metavar="FILE", type=Path, help="record it, for `tuimig replay`")
    verb.add_argument("--redact", action="store_true", help="no command lines and names in the recording and the page")
    verb.add_argument("--step", action="store_true", help="stop before each phase until Enter; the source runs on")
    verb.add_argument("--report", metavar="FILE.html", type=Path, help="the summary as one HTML page")


# ---------------------------------------------------------------- values


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    found, rest = parser().parse_known_args(arguments)
    if found.verb == "clone" and found.destination == "local" and len(rest) == 1 and not rest[0].startswith("-"):
        found.destination = rest.pop()  # argparse gives up a positional that may be left out at the first option
    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}", cure="See tuimig --help")
    if found.verb is None:
        found.json = False
        if found.open_pid is not None and found.open_pid <= 0:
            raise UsageError(f"not a process id: {found.open_pid}")
        return found
    if getattr(found, "events", None) == "-" and found.json:
        raise UsageError("--events - and --json both write to stdout", cure="Give --events a file")
    for name in ("record", "report"):
        if str(getattr(found, name, None)) == "-":
            raise UsageError(f"--{name} does not go to stdout", cure="Name a file; --events - is for stdout")
    if hasattr(found, "destination"):
        connecting.check(found)
    _check_listen(getattr(found, "listen", None))
    precopy = getattr(found, "precopy", "off")
    if precopy not in ("auto", "off") and not (precopy.isascii() and precopy.isdigit() and 0 < int(precopy) <= 1000):
        raise UsageError("not a number of rounds", subject=f"--precopy {precopy}", cure="Use auto, off, or 1 to 1000")
    if not 1 <= getattr(found, "max_slowdown", 25.0) <= 100:
        raise UsageError(f"not between 1 and 100 percent: {found.max_slowdown:g}", subject="--max-slowdown")
    budget = getattr(found, "freeze_budget", None)
    if budget is not None and not 0 < budget <= MOST_BUDGET_MS:
        raise UsageError(f"not more than 0 and at most {MOST_BUDGET_MS:.0f} ms: {budget:g}", subject="--freeze-budget")
    if getattr(found, "pid", None) is not None and found.pid <= 0:
        raise UsageError(f"not a process id: {found.pid}")
    return found


def _check_listen(path: str | None) -> None:
    if path is None:
        return
    if not path.startswith("unix:"):
        raise UsageError(
            f"not a place to listen: {path}", cure="Only unix:PATH; over a network use ssh (receive --stdio)"
        )
    if not path.removeprefix("unix:"):
        raise UsageError("no path", subject="--listen")


def settings_of(found: argparse.Namespace, base: Settings) -> Settings:
    """The settings file's, with the options over it."""
    given = {name: getattr(found, name) for name in ("read_only", "ascii", "mouse", "theme")}
    changed = {name: value for name, value in given.items() if value is not None}
    if found.refresh is not None:
        changed["refresh_s"] = found.refresh
    return checked(replace(base, **changed), "the command line")


def policy_of(found: argparse.Namespace) -> Policy:
    """The file's policy, with the options before it."""
    base = policy.load(found.policy) if found.policy is not None else Policy()
    made = replace(base, rules=(*(found.rules or ()), *base.rules))
    if found.eager_below is not None:
        made = replace(made, eager_below=policy.parse_size(found.eager_below), below_source="--eager-below")
    return made


def options_of(found: argparse.Namespace) -> Options:
    given = {
        name: getattr(found, name)
        for name in (
            "guard",
            "verify",
            "precopy",
            "track",
            "max_slowdown",
            "pid_namespace",
            "tcp",
            "stdio",
            "full",
            "yes",
        )
        if hasattr(found, name)
    }
    return Options(
        **given,
        freeze_budget_ms=getattr(found, "freeze_budget", None),
        **connecting.values(found),
        map_ports=tuple(parse_port(text) for text in getattr(found, "map_port", ())),
        map_paths=tuple(_path(text) for text in getattr(found, "map_path", ())),
    )


def command_of(job: Job) -> list[str]:
    """The command line that does the same as a console's job."""
    options, policy = job.options, job.policy
    words = ["tuimig", job.verb, *([str(job.pid)] if job.verb != "restore" else [])]
    words += [job.place] if job.verb in ("snapshot", "restore") or job.remote else []
    if job.verb != "restore":
        if policy.eager_below != DEFAULT_EAGER_BELOW:
            words += ["--eager-below", format_size(policy.eager_below)]
        chosen = [(f"{start:x}-{end:x}", treatment) for start, end, treatment in policy.keys]
        for match, treatment in (*chosen, *((rule.match, rule.treatment) for rule in policy.rules)):
            words += ["--eager" if treatment is Treatment.EAGER else "--protect", match]
        words += ["--guard", options.guard] if options.guard != "auto" else []
        words += ["--precopy", options.precopy] if options.precopy != "auto" else []
        words += ["--track", options.track] if options.track != "auto" else []
        words += ["--verify"] if options.verify else []
    if job.verb != "snapshot":
        for port in options.map_ports:
            words += ["--map-port", f"{port.old}:{port.new}"]
        words += ["--pid-namespace", options.pid_namespace] if options.pid_namespace != "auto" else []
        words += ["--full"] if options.full else []
    words += connecting.words(options) if job.remote else []
    words += ["--record", job.record] if job.record else []
    words += ["--tcp", options.tcp] if options.tcp != "refuse" else []
    words += ["--stdio", options.stdio] if options.stdio != "null" else []
    return words + (["--yes"] if options.yes else [])


def parse_port(text: str) -> PortMap:
    old, _, new = text.partition(":")
    if not (text.isascii() and old.isdigit() and new.isdigit() and 0 < int(old) < 65536 and 0 < int(new) < 65536):
        raise UsageError(f"not a pair of ports: {text!r}", subject="--map-port", cure="Write it like 6379:6380")
    return PortMap(int(old), int(new))


def _path(text: str) -> tuple[str, str]:
    old, _, new = text.partition("=")
    if not old or not new:
        raise UsageError(f"not a pair of paths: {text!r}", subject="--map-path", cure="Write it like /run/a=/run/b")
    return old, new
