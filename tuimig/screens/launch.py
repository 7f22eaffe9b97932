"""Launch: what to do with the process, where to, and how; then one deliberate Enter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widget import Widget
from textual.widgets import Button, Input, Static

from tuimig.arguments import parse_port
from tuimig.backend import Port
from tuimig.core import transport
from tuimig.core.errors import Obstacle, TuimigError, UsageError
from tuimig.core.jobs import Job
from tuimig.core.model import Options, Plan, PortMap
from tuimig.core.policy import Policy
from tuimig.core.rates import Rates
from tuimig.screens.check import Check
from tuimig.screens.confirm import Confirm
from tuimig.screens.connection import ConnectionFields
from tuimig.screens.page import Page, Target
from tuimig.widgets.choice import Choice, Switch
from tuimig.widgets.field import Field
from tuimig.words import cut, duration, plural

PORT_OFFSET: Final = 10000  # the first port tried for a copy: 6379 -> 16379
PORT_MOST: Final = 65535
WHAT: Final = {"clone here": "clone", "snapshot": "snapshot", "clone to": "clone", "move to": "move"}


class Launch(Page):
    """A form; its defaults fit the process. `restore`: the job is to run a snapshot, and there is no source."""

    heading = "launch"
    about = """
What: clone here runs a copy beside its source on this host, snapshot makes a directory that can be restored later.
clone to and move to bring it to another place, over ssh or a unix socket where `tuimig receive --listen` runs; a move
ends its source once all of it is there. Tab moves on, arrows and Space change a choice. Ports: where the copy listens
instead. Connections: established ones are either refused, or closed in the copy. Stdio: null, or a file for what it
writes. Pre-copy: memory is copied in rounds first, while the process runs, so that its stop is short. Guard: memory
that the process frees while it is captured may be lost; auto finds that and repeats with its system calls watched, on
watches them from the start, off never does. Streams, Bandwidth, Compress and Command are about the connection. The
sentence at the bottom says what will happen; nothing happens before Enter on the Launch button."""
    DEFAULT_CSS = """
    Launch VerticalScroll { height: 1fr; padding: 1 0 0 0; scrollbar-size: 1 1; }
    Launch #sentence { height: auto; padding: 0 1; background: $surface; }
    Launch #buttons { height: 1; padding: 0 1; }
    Launch #buttons Button { margin-right: 2; min-width: 10; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "Next", show=False, id="launch.next"),
        Binding("up", "app.focus_previous", "Previous", show=False, id="launch.previous"),
        Binding("f5", "to_button", "To the button", id="launch.button"),
    ]

    def __init__(
        self, target: Target, policy: Policy, plan: Plan, restore: str = "", ports: Iterable[Port] = ()
    ) -> None:
        super().__init__()
        self.target = target
        self._policy = policy
        self._plan = plan
        self._restore = restore
        self._ports = list(ports)
        self._free = ""  # the directory that is proposed
        self._filled_in = ""  # what we have written there
        self._ports_are_theirs = False  # the person has written others
        self._proposed = ""  # for a copy on this host; elsewhere the ports can stay
        self._obstacles: list[Obstacle] = []
        self._rates = Rates()

    def process(self) -> Target | None:
        return None if self._restore else self.target  # whoever has the id of a stored process now is another one

    def body(self) -> Iterable[Widget]:
        runs = "" if self._restore else "; the source runs on"
        self._free = name = self._free_name(f"/var/tmp/{self.target.name}-{self.target.pid}")
        with_source = [
            Field("What", Choice(tuple(WHAT), id="what"), id="f-what"),
            Field("To", Input("", compact=True, id="to", placeholder="ssh://user@host or unix:/path"), id="f-to"),
            Field("Directory", Input(name, compact=True, id="directory", select_on_focus=False), id="f-directory"),
        ]
        only_source = [
            Field("Pre-copy", Choice(("auto", "off"), id="precopy"), id="f-precopy"),
            Field("Guard", Choice(("auto", "on", "off"), id="guard"), id="f-guard"),
            Field("Verify", Switch("hash all pages at T0 and compare (a longer freeze)", id="verify"), id="f-verify"),
            ConnectionFields(),
        ]
        yield VerticalScroll(
            *([] if self._restore else with_source),
            Field("Ports", Input("", compact=True, id="ports", placeholder="OLD:NEW ..."), id="f-ports"),
            Field("Connections", Choice(("refuse", "close"), id="tcp"), id="f-tcp"),
            Field("Stdio", Input("null", compact=True, id="stdio", select_on_focus=False), id="f-stdio"),
            Field("Namespace", Choice(("auto", "new", "host"), id="namespace"), id="f-namespace"),
            Field("Fill", Switch("bring in all pages before the copy runs", id="full"), id="f-full"),
            *([] if self._restore else only_source),
            Field(
                "Record to",
                Input("", compact=True, id="record", placeholder="a file, for `tuimig replay`"),
                id="f-record",
            ),
            Field("Step", Switch(f"stop before each phase until Space{runs}", id="step"), id="f-step"),
            Field("Accept", Switch("", id="accept"), id="f-accept"),
            can_focus=False,
        )
        yield Static(id="sentence", markup=False)
        yield Horizontal(
            Button("Launch", id="launch", compact=True, variant="warning"),
            Button("Back", id="back", compact=True),
            id="buttons",
        )

    def _free_name(self, stem: str) -> str:
        names = itertools.chain([f"{stem}.snap"], (f"{stem}-{number}.snap" for number in itertools.count(2)))
        return next(name for name in names if not self.console_app.backend.unfit(Path(name)))

    def title_text(self) -> str:
        return f"launch  {self._restore or f'{self.target.pid} {self.target.name}'}"

    def on_mount(self) -> None:
        self._rates = self.console_app.backend.rates()
        self.query_one("#f-accept").add_class("-hidden")
        self.query_one("#ports" if self._restore else "#what").focus()
        if self._restore:
            self._take_ports(self._ports)
        else:
            self.ask(lambda: self.console_app.backend.ports(self.target.pid), self._take_ports)
            self._look(self._first_obstacles)
        kept = self.console_app.forms.get(self._form, {})
        for field in self._filled():
            field.value = kept.get(str(field.id), field.value)
        self._changed()

    @property
    def _form(self) -> object:
        return self._restore or (self.target.pid, self.target.ticks)

    def _filled(self) -> list[Input | Choice]:
        return [field for field in (*self.query(Input), *self.query(Choice)) if field.id]

    def action_back(self) -> None:
        """What was chosen is still there when the person comes back; what was proposed is proposed anew."""
        proposed = {"ports": self._filled_in, "directory": self._free}
        fields = {str(field.id): field.value for field in self._filled()}
        self.console_app.forms[self._form] = {
            name: value for name, value in fields.items() if name != "accept" and value != proposed.get(name)
        }
        super().action_back()

    def _look(self, then: Callable[[list[Obstacle]], None]) -> None:
        options = Options(started=self.target.ticks)
        self.ask(lambda: self.console_app.backend.obstacles(self.target.pid, options), then)

    # ------------------------------------------------------------ what fits the process

    def _take_ports(self, ports: list[Port]) -> None:
        """Propose a free port for each that it listens on."""
        self._ports = ports
        proposed: dict[int, int] = {}
        for port in ports:
            number = port.number
            new = number + PORT_OFFSET if number + PORT_OFFSET <= PORT_MOST else number - PORT_OFFSET
            while new < PORT_MOST and (new in proposed.values() or self._taken(number, new)):
                new += 1
            proposed.setdefault(number, new)
        self._proposed = " ".join(f"{old}:{new}" for old, new in proposed.items())
        self._propose_ports()
        self._changed()

    def _first_obstacles(self, obstacles: list[Obstacle]) -> None:
        if any(o.name == "tcp" for o in obstacles):
            self.query_one("#tcp", Choice).value = "close"
        self._take_obstacles(obstacles)

    def _take_obstacles(self, obstacles: list[Obstacle]) -> None:
        """Connections can be closed; what asks can be accepted; the rest is shown at the launch."""
        self._obstacles = [o for o in obstacles if o.name != "tcp"]
        asking = list(dict.fromkeys(o.name for o in self._obstacles if o.asks))
        if asking:
            switch = self.query_one("#accept", Switch)
            switch.label = ", ".join(asking)
            self.query_one("#f-accept").remove_class("-hidden")
        self._changed()

    # ------------------------------------------------------------ the form's values

    @property
    def verb(self) -> str:
        if self._restore:
            return "restore"
        return WHAT[self.query_one("#what", Choice).value]

    @property
    def remote(self) -> bool:
        return not self._restore and self.query_one("#what", Choice).value.endswith(" to")

    def on_choice_changed(self) -> None:
        self._changed()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._changed()

    def on_input_submitted(self) -> None:
        self.app.action_focus_next()

    def _changed(self) -> None:
        """Fields that do not belong to the verb go away; the sentence says what will happen."""
        verb = self.verb
        copies = verb != "snapshot"
        for name in ("ports", "stdio", "namespace", "full"):
            self.query_one(f"#f-{name}").set_class(not copies, "-hidden")
        if not self._restore:
            self.query_one("#f-directory").set_class(copies, "-hidden")
            self.query_one("#f-to").set_class(not self.remote, "-hidden")
            self.query_one(ConnectionFields).show(self._kind())
            self._propose_ports()
        wrong = self._wrong_fields()
        for field in self.query(Field):
            field.wrong(wrong.get(field.id or "", ""))
        self.query_one("#launch", Button).disabled = bool(wrong)
        self.query_one("#sentence", Static).update(self._sentence(verb, bool(wrong)))

    def _wrong_fields(self) -> dict[str, str]:
        wrong = {}
        if self.verb == "snapshot":
            directory = self._directory()
            unfit = self.console_app.backend.unfit(Path(directory)) if directory else "a directory is needed"
            if unfit:
                wrong["f-directory"] = unfit
        if self.remote:
            if not (kind := self._kind()):
                wrong["f-to"] = "ssh://host or unix:/path"
            wrong |= self.query_one(ConnectionFields).wrong(kind)
        if self.verb != "snapshot":
            try:
                maps = self._maps()
                taken = [m.new for m in maps if not self.remote and self._taken(m.old, m.new)]
                if taken:
                    wrong["f-ports"] = f"{taken[0]} is in use"
                for side in ("old", "new"):
                    numbers = [getattr(m, side) for m in maps]
                    if len(set(numbers)) < len(numbers):
                        wrong["f-ports"] = "a port is there twice"
            except UsageError:
                wrong["f-ports"] = "write it like 6379:16379"
            if unfit := self._unfit_stdio():
                wrong["f-stdio"] = unfit
        return wrong

    def _propose_ports(self) -> None:
        """As long as the person has not written others."""
        ports = self.query_one("#ports", Input)
        self._ports_are_theirs |= ports.value != self._filled_in
        if not self._ports_are_theirs:
            self._filled_in = ports.value = "" if self.remote else self._proposed

    def _taken(self, old: int, new: int) -> bool:
        """As what the process listens on there: TCP where nothing else is known."""
        kinds = {port.kind for port in self._ports if port.number == old} or {"tcp"}
        return any(self.console_app.backend.taken(Port(new, kind)) for kind in kinds)

    def _to(self) -> str:
        return self.query_one("#to", Input).value.strip() or "local"

    def _kind(self) -> str:
        """Of the destination elsewhere: ssh or unix; nothing where there is none yet."""
        try:
            found = transport.parse(self._to())
        except UsageError:
            return ""
        return found.kind if self.remote and not found.is_local else ""

    def _stdio(self) -> str:
        """A path of this host may begin with the person's home."""
        text = self.query_one("#stdio", Input).value.strip()
        return text if self.remote else os.path.expanduser(text)

    def _unfit_stdio(self) -> str:
        text = self._stdio()
        if text == "null":
            return ""
        if not text.startswith("/"):
            return "null, or a file like /tmp/out"
        return "" if self.remote else self.console_app.backend.unfit_file(Path(text))

    def _directory(self) -> str:
        return os.path.expanduser(self.query_one("#directory", Input).value.strip())

    def _maps(self) -> tuple[PortMap, ...]:
        return tuple(parse_port(text) for text in self.query_one("#ports", Input).value.replace(",", " ").split())

    def _sentence(self, verb: str, wrong: bool) -> Text:
        if wrong:
            return Text("Something in the form is not right yet: it is said at the field.")
        who = f"process {self.target.pid} ({self.target.name})"
        if verb == "restore":
            return Text(f"A copy of {self.target.name} as it was in {self._restore} will run on this host.")
        precopied = self.query_one("#precopy", Choice).value != "off"
        frozen = duration(self._rates.frozen_us(self._plan, precopied=precopied))
        protected = plural(sum(1 for d in self._plan.decisions if d.treatment.value == "protected"), "region")
        first = "Its memory is copied in rounds first, while it runs. Then " if precopied else ""
        captured = "" if precopied else f" while {protected} are captured"
        text = Text(f"{first}{who} stops for about {frozen}, then runs on{captured}. ")
        if verb == "snapshot":
            text.append(f"Its memory and state at that moment go to {self._directory()}.")
            return text
        if verb == "move":
            return Text(
                f"{first}{who} stops, goes on at {self._to()}, and is ended here once all of it is there. "
                "Until the destination confirms that it runs, any failure lets it go on here."
            )
        maps = ", ".join(f"{m.new} for {m.old}" for m in self._maps())
        text.append(
            f"A copy of it will run {f'at {self._to()}' if self.remote else 'on this host'}"
            + (f", listening on {maps}" if maps else "")
            + "."
        )
        if self.query_one("#tcp", Choice).value == "close":
            text.append(" In the copy established connections are closed.")
        return text

    def job(self) -> Job:
        options = Options(
            map_ports=self._maps() if self.verb != "snapshot" else (),
            tcp=self.query_one("#tcp", Choice).value,
            stdio=self._stdio(),
            pid_namespace=self.query_one("#namespace", Choice).value,
            full=self.query_one("#full", Switch).on,
            yes=self.query_one("#accept", Switch).on,
        )
        record = self.query_one("#record", Input).value.strip()
        kept: dict[str, Any] = {
            "record": str(Path(record).absolute()) if record else "",
            "step": self.query_one("#step", Switch).on,
        }
        if self._restore:
            return Job("restore", self.target.pid, self._restore, options=options, **kept)
        options = replace(
            options,
            precopy=self.query_one("#precopy", Choice).value,
            guard=self.query_one("#guard", Choice).value,
            verify=self.query_one("#verify", Switch).on,
            started=self.target.ticks,
            **(self.query_one(ConnectionFields).values(self._kind()) if self.remote else {}),
        )
        place = self._directory() if self.verb == "snapshot" else self._to() if self.remote else "local"
        return Job(self.verb, self.target.pid, place, self._policy, options, **kept)

    # ------------------------------------------------------------ onward

    def action_to_button(self) -> None:
        self.query_one("#launch").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "back":
            self.action_back()
            return
        if self._blocking and not all(o.asks for o in self._blocking):
            self._look(self._decide)  # the person may have done something about it
        else:
            self._decide(self._obstacles)

    @property
    def _blocking(self) -> list[Obstacle]:
        accepted = self.query_one("#accept", Switch).on
        return [o for o in self._obstacles if not (o.asks and accepted)]

    def _decide(self, obstacles: list[Obstacle]) -> None:
        self._take_obstacles(obstacles)
        blocking = self._blocking
        if self.console_app.running is not None:
            self.say(f"{self.console_app.busy(self.console_app.running)}: m shows it")
        elif blocking and all(o.asks for o in blocking):
            self.query_one("#f-accept", Field).wrong("say yes to go on")
            self.query_one("#accept").focus()
        elif blocking and not self._restore:
            self.app.push_screen(Check(self.target, blocking))
        elif self.verb == "move":
            self._confirm_move()
        else:
            self._launch()

    def _confirm_move(self) -> None:
        """The one thing here that cannot be taken back."""

        def decide(answer: str | None) -> None:
            if answer == "move":
                self._launch()

        question = (
            f"Move process {self.target.pid} ({cut(self.target.command, 40)}) to {self._to()}? "
            "It stops now, and is ended here once the destination has all of it."
        )
        self.app.push_screen(Confirm(question, [("cancel", "Cancel"), ("move", "Move it")]), decide)

    def _launch(self) -> None:
        try:
            self.console_app.launch(self.job())
        except (TuimigError, OSError) as error:
            self.complain(error if isinstance(error, TuimigError) else TuimigError(f"cannot start: {error}"))
