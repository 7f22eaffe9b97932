"""The command: what each verb does with the core, what is printed, and which exit code comes out.

The only place that prints and that maps errors to exit codes. Textual is never loaded here, rich only for tables and
progress. A signal cancels the migration in an orderly way; the source then runs as before.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from tuimig import arguments, stepping
from tuimig.core.errors import Cancelled, Obstacle, TuimigError, Unsupported, UsageError
from tuimig.core.model import Event, Listener, Report
from tuimig.keeping import Keeper
from tuimig.output import EventWriter, document, error_fields

if TYPE_CHECKING:
    from tuimig.core.recording import Recording
    from tuimig.render import ProgressBar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PIPE_CLOSED = 128 + signal.SIGPIPE


class Signalled(BaseException):
    """A signal came while nothing was to be cancelled."""


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into a cancel of what runs, or into the end of the command."""

    def __init__(self) -> None:
        self.number = 0
        self._cancel: Callable[[], None] | None = None

    def __enter__(self) -> Signals:
        # What was ignored stays ignored (nohup).
        self._before = {n: signal.signal(n, self._on) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None

    def _on(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if self._cancel is None:
            raise Signalled
        self._cancel()


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code. Nothing else leaves here, no exception either."""
    wants_json = False
    with Signals() as signals:
        try:
            found = arguments.parse(sys.argv[1:] if given is None else given)
            wants_json = found.json
            code = VERBS[found.verb](found, signals) if found.verb else console(found)
            sys.stdout.flush()
            return code
        except SystemExit as stop:  # argparse's --help and --version
            return stop.code if isinstance(stop.code, int) else 0
        except (Signalled, KeyboardInterrupt):
            return 128 + (signals.number or signal.SIGINT)
        except BrokenPipeError:
            _write_nowhere(sys.stdout)  # the reader has seen enough
            return PIPE_CLOSED
        except TuimigError as error:
            _complain(error, wants_json)
            return 128 + signals.number if isinstance(error, Cancelled) and signals.number else error.exit_code
        except Exception as error:
            if os.environ.get("TUIMIG_DEBUG"):
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                say(f"tuimig: cannot write to the standard output: {error.strerror}. What was asked for may be done")
                _write_nowhere(sys.stdout)
                return 1
            say(f"tuimig: {_unexpected(error)}")
            return 1


def _write_nowhere(stream: TextIO) -> None:
    """It is flushed once more at exit: it gets a place to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unexpected(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").endswith("._engine"):
        return "the native engine is not built. Run `make build`, or `pip install .`"
    return f"internal error: {type(error).__name__}: {error}. TUIMIG_DEBUG=1 shows where; please report it"


def say(text: str) -> None:
    """A sentence for the person; what goes on does not depend on whether anybody hears it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


def _complain(error: TuimigError, as_json: bool) -> None:
    if as_json:
        document(error_fields(error))
    say(f"tuimig: {error}")
    if isinstance(error, Unsupported):
        for obstacle in error.obstacles:
            say(f"  - {obstacle}")


def console(found: argparse.Namespace, recording: Recording | None = None) -> int:
    """No verb: the console, where there is a terminal for it. With a recording it opens that."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):  # it draws on stderr
        raise UsageError("no verb given, and no terminal for the console", cure="See tuimig --help")
    from tuimig import settings

    chosen = arguments.settings_of(found, settings.load(settings.config_file()))
    if chosen.low_bandwidth:  # Textual reads these when it is imported
        os.environ.setdefault("TEXTUAL_FPS", str(settings.SLOW_FPS))
        os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    from tuimig.app import Console
    from tuimig.backend import LiveBackend
    from tuimig.keys import refuse_unknown

    refuse_unknown(chosen.keys, str(settings.config_file()))
    settings.log_to(settings.state_directory() / "tuimig.log")
    backend = LiveBackend(settings.state_directory())
    app = Console(backend, chosen, found.open_pid, recording=recording)
    code = app.run(mouse=chosen.mouse)
    if found.verb == "demo":
        backend.end_copies()
    return app.return_code or 0 if code is None else code


# ---------------------------------------------------------------- verbs that look


def ps(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core import check, procfs
    from tuimig.core.model import Options

    rows: list[dict[str, Any]] = []
    for line in procfs.processes():
        if (line.kernel and not found.all) or (found.user and line.user != found.user) or line.pid == os.getpid():
            continue
        obstacles: list[Obstacle] = []
        if line.readable or line.kernel:
            try:
                obstacles = check.check_process(line.pid, Options())
            except TuimigError as error:
                obstacles = [Obstacle("gone-or-closed", f"process {line.pid}", error.what, error.cure)]
        else:
            obstacles = [Obstacle("permission", f"process {line.pid}", "we may not look into it", procfs.PTRACE_CURE)]
        verdict = "no" if any(not o.asks for o in obstacles) else "asks" if obstacles else "yes"
        rows.append({**{k: getattr(line, k) for k in line.__slots__}, "migrate": verdict, "obstacles": obstacles})
    if found.json:
        document(rows)
    else:
        from tuimig import render

        render.processes(rows)
    return 0


def maps(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core import procfs

    chosen = arguments.policy_of(found)
    plan = chosen.plan(procfs.read_regions(found.pid))
    if found.json:
        document({"pid": found.pid, "decisions": plan.decisions})
    else:
        from tuimig import render

        render.plan(plan)
    return 0


def check(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core import check as checks

    probes = checks.probe_host()
    options = arguments.options_of(found)
    obstacles = checks.check_process(found.pid, options) if found.pid is not None else []
    standing = [o for o in obstacles if not (o.asks and options.yes)]
    missing = [probe for probe in probes if probe.required and not probe.ok]
    if found.json:
        document({"pid": found.pid, "probes": probes, "obstacles": obstacles, "ok": not missing and not standing})
    else:
        from tuimig import render

        render.probes(probes)
        if found.pid is not None:
            render.obstacles(found.pid, obstacles)
    return 3 if missing else 5 if standing else 0


def journals(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core import journals as left

    if found.yes and found.clear is None:
        raise UsageError("--yes without --clear", cure="Say --clear SESSION as well")
    rows = left.kept() if found.clear is None else left.clear(found.clear, accepted=found.yes)
    if found.json:
        document(rows)
    elif found.clear is not None:
        for row in rows:
            print(f"removed {row.path}")
    elif not rows:
        print("No move has left a journal here")
    else:
        from tuimig import render

        render.journals(rows)
    return 0


def inspect(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core.snapshot import open_snapshot

    with open_snapshot(found.directory) as snapshot:
        if found.json:
            document(snapshot.manifest)
        else:
            from tuimig import render

            render.manifest(found.directory, snapshot.manifest)
        for warning in snapshot.warnings:
            say(f"tuimig: {warning}")
    return 0


def verify(found: argparse.Namespace, signals: Signals) -> int:
    from tuimig.core import snapshot

    stop = threading.Event()
    with signals.cancelling(stop.set):
        result = snapshot.verify(found.directory, cancel=stop)
    if found.json:
        document({"ok": result.ok, "result": result})
    else:
        for damage in result.damage:
            say(f"tuimig: {damage}")
        if result.more:
            say(f"tuimig: and {result.more} more bad pages")
        for warning in result.warnings:
            say(f"tuimig: {warning}")
        verdict = "sound" if result.ok else "DAMAGED"
        print(f"{found.directory}: {result.pages} pages in {result.regions} regions, {verdict}")
    return 0 if result.ok else 1


# ---------------------------------------------------------------- verbs that do


def snapshot(found: argparse.Namespace, signals: Signals) -> int:
    policy, options = arguments.policy_of(found), arguments.options_of(found)
    return _migrate(found, signals, lambda s: s.snapshot(found.pid, found.directory, policy, options))


def restore(found: argparse.Namespace, signals: Signals) -> int:
    options = arguments.options_of(found)
    return _migrate(found, signals, lambda s: s.restore(found.directory, options))


def clone(found: argparse.Namespace, signals: Signals) -> int:
    from tuimig.core import transport

    policy, options = arguments.policy_of(found), arguments.options_of(found)
    to = transport.parse(found.destination)
    if to.is_local:
        return _migrate(found, signals, lambda s: s.clone(found.pid, policy, options))
    return _migrate(found, signals, lambda s: s.clone_to(found.pid, to, policy, options), remote=True)


def move(found: argparse.Namespace, signals: Signals) -> int:
    from tuimig.core import transport

    policy, options = arguments.policy_of(found), arguments.options_of(found)
    to = transport.parse(found.destination)
    return _migrate(found, signals, lambda s: s.move_to(found.pid, to, policy, options), remote=True)


def receive(found: argparse.Namespace, signals: Signals) -> int:
    from tuimig.core import door

    with contextlib.ExitStack() as stack:
        notify = lambda text: say(f"tuimig receive: {text}")  # noqa: E731
        if found.stdio:
            door.serve_stdio(notify, lambda receiver: stack.enter_context(signals.cancelling(receiver.cancel)))
            return 0
        listener = door.Listener(found.listen.removeprefix("unix:"))
        with signals.cancelling(listener.cancel):
            connections = listener.run(notify)
    if found.json:
        document({"listen": found.listen, "connections": connections})
    return 128 + signals.number if signals.number else 0


def demo(found: argparse.Namespace, signals: Signals) -> int:
    from tuimig import demo as demos
    from tuimig.core.policy import parse_size

    if found.list:
        return _list_demos(found)
    chosen = demos.find(found.name)
    words = (lambda _: None) if found.json or found.events == "-" else print
    words(f"{chosen.name}: {chosen.what}\n{chosen.watch}\n")
    running = chosen.start(parse_size(found.memory) if found.memory else chosen.memory)
    try:
        if _wants_console(found):
            found.open_pid = running.pid
            return console(found)
        return _migrate(found, signals, lambda s: demos.run(s, running, words), running.see)
    finally:
        running.stop()


def _wants_console(found: argparse.Namespace) -> bool:
    """On a terminal, where nothing asks for a run without a person."""
    headless = (found.json, found.events, found.record, found.report, found.step, found.no_console)
    return sys.stdin.isatty() and sys.stdout.isatty() and not any(headless)


def replay(found: argparse.Namespace, _: Signals) -> int:
    from tuimig.core.errors import UsageError
    from tuimig.core.recording import load
    from tuimig.core.summary import summarize
    from tuimig.replay import compared

    if found.other is not None:
        files = (found.recording, found.other)
        if files[0] == files[1]:
            raise UsageError("the same recording twice", subject=str(files[0]))
        comparison = compared(*(summarize(load(path)) for path in files))
        if found.json:
            document(comparison)
        else:
            from tuimig import render

            render.comparison(str(files[0]), str(files[1]), comparison)
        return 0
    recording = load(found.recording)
    if not (found.json or found.no_console) and sys.stdin.isatty() and sys.stdout.isatty():
        return console(found, recording)
    if recording.failure is not None:
        from tuimig.core.jobs import error_of

        say("the recorded migration failed:")
        _complain(error_of(recording.failure), found.json)
        return 0
    summary = summarize(recording)
    if found.json:
        document(summary.report)
    else:
        from tuimig import render

        render.report(summary.report, "done" if summary.complete else "recorded in part")
    for warning in summary.report.warnings:
        say(f"tuimig: {warning}")
    return 0


def _list_demos(found: argparse.Namespace) -> int:
    from tuimig import demo as demos

    rows = [
        {"name": w.name, "what": w.what, "watch": w.watch, "memory": w.memory, "missing": w.missing()}
        for w in demos.WORKLOADS
    ]
    if found.json:
        document(rows)
    else:
        from tuimig import render

        render.demos(rows)
    return 0


def _migrate(
    found: argparse.Namespace,
    signals: Signals,
    work: Callable[[Any], Report],
    *listeners: Listener,
    remote: bool = False,
) -> int:
    """Runs one migration: events, progress bar, cancel by signal, report."""
    from tuimig.core.session import Session

    kind = Session
    if remote:
        from tuimig.core.remote import RemoteSession

        kind = RemoteSession
    steps = stepping.Steps(found) if found.step else None
    with EventWriter(found.events) as writer, Keeper(found) as keeper, contextlib.ExitStack() as until_told:
        with _progress(found) as bar:
            more = (*listeners, *keeper.listeners, *((steps.see,) if steps else ()))
            session = kind(
                _listener(writer, bar, *more), detail=bool(keeper.listeners), gate=steps.wait if steps else None
            )

            def cancel() -> None:
                session.cancel()
                if steps is not None:
                    steps.leave()

            until_told.enter_context(signals.cancelling(cancel))
            try:
                report = work(session)
            except TuimigError as error:
                writer.error(error)
                keeper.error(error)
                raise
        # What is done is told, whatever signal comes now.
        writer.report(report)
        keeper.report(report)
        if found.json:
            document(report)
        elif found.events != "-":
            from tuimig import render

            render.report(report)
        for warning in report.warnings:
            say(f"tuimig: {warning}")
    if writer.broken:
        say(f"tuimig: events were not written to the end: {writer.broken}")
    for broken in keeper.broken:
        say(f"tuimig: {broken}")
    return 0


@contextlib.contextmanager
def _progress(found: argparse.Namespace) -> Iterator[ProgressBar | None]:
    """A bar on a terminal's stderr; nothing where nobody sees it."""
    if not sys.stderr.isatty() or found.events == "-" or found.step:
        yield None
        return
    from tuimig.render import ProgressBar

    with ProgressBar() as bar:
        yield bar


def _listener(writer: EventWriter, bar: ProgressBar | None, *others: Listener) -> Listener:
    def listen(event: Event) -> None:
        writer(event)
        for other in others:
            other(event)
        if bar is not None:
            bar.show(event)

    return listen


VERBS: dict[str, Callable[[argparse.Namespace, Signals], int]] = {
    "ps": ps,
    "maps": maps,
    "check": check,
    "snapshot": snapshot,
    "restore": restore,
    "clone": clone,
    "move": move,
    "receive": receive,
    "journals": journals,
    "inspect": inspect,
    "verify": verify,
    "demo": demo,
    "replay": replay,
}

if __name__ == "__main__":
    sys.exit(main())
