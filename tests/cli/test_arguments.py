"""The grammar: every verb has an example, values become what they mean, nonsense is a usage error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuimig import arguments
from tuimig.core.errors import UsageError
from tuimig.core.model import PortMap, Treatment

VERBS = ["ps", "maps", "check", "snapshot", "restore", "clone", "journals", "inspect", "verify", "demo"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.parse([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    example = next(line for line in text.splitlines() if line.strip().startswith(f"tuimig {verb}"))
    words = example.split()[1:]
    assert arguments.parse(words).verb == verb


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["maps"], "required: PID"),
        (["maps", "x"], "invalid int"),
        (["maps", "0"], "not a process id"),
        (["maps", "1", "--eager-above", "2"], "unrecognized"),
        (["clone", "1", "host"], "no such destination"),
        (["move", "1", "ssh://-oProxyCommand=x"], "no such destination"),
        (["clone", "1", "ssh://host:70000"], "no such destination"),
        (["clone", "1", "--precopy", "much"], "not a number of rounds"),
        (["clone", "1", "--precopy", "0"], "not a number of rounds"),
        (["clone", "1", "--max-slowdown", "nan"], "not between"),
        (["clone", "1", "--freeze-budget", "0"], "not more than 0 and at most"),
        (["clone", "1", "--freeze-budget", "nan"], "not more than 0 and at most"),
        (["clone", "1", "--guard", "maybe"], "invalid choice"),
        (["move", "1", "local", "--streams", "17"], "not between 1 and 16"),
        (["move", "1", "local", "--reconnect", "nan"], "not between 0 and"),
        (["move", "1", "ssh://host", "--remote-command", " "], "not a command"),
        (["receive", "--listen", "unix:"], "no path"),
        (["receive", "--listen", "/run/x"], "not a place to listen"),
        (["clone", "1", "--events", "-", "--json"], "both write to stdout"),
        (["clone", "1", "--record", "-"], "--record does not go to stdout"),
        (["demo", "kv", "--report", "-"], "--report does not go to stdout"),
        (["clone", "1", "--eager", "20-10"], "empty address range"),
    ],
)
def test_usage_errors(words: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        arguments.parse(words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "option",
    [
        ["--remote-command", "x"],
        ["--streams", "1"],
        ["--compress", "none"],
        ["--bandwidth", "1M"],
        ["--reconnect", "60"],
        ["--on-loss", "kill"],
    ],
)
def test_the_connection_of_a_clone_on_this_host(option: list[str]) -> None:
    """What has no effect is refused, also where it says what holds without it."""
    for words in (["clone", "7"], ["clone", "7", "local"]):
        with pytest.raises(UsageError, match=rf"^{option[0]}: it has no effect on a clone on this host.*ssh://"):
            arguments.parse([*words, *option])
    assert arguments.parse(["clone", "7", "ssh://host", *option])


@pytest.mark.parametrize("words", [["clone", "7", "unix:/run/x"], ["move", "7", "unix:/run/x"], ["move", "7", "local"]])
def test_a_remote_command_is_what_ssh_runs(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--remote-command: it has no effect"):
        arguments.parse([*words, "--remote-command", "tuimig"])
    options = arguments.options_of(arguments.parse([*words, "--streams", "2", "--bandwidth", "1M", "--reconnect", "5"]))
    assert (options.streams, options.bandwidth, options.reconnect_s) == (2, 1 << 20, 5.0)


def test_what_a_connection_has_by_default() -> None:
    options = arguments.options_of(arguments.parse(["move", "7", "ssh://host"]))
    assert (options.remote_command, options.streams, options.compress) == ("tuimig", 1, "none")
    assert (options.bandwidth, options.reconnect_s, options.on_loss) == (0, 60.0, "kill")


@pytest.mark.parametrize("text", ["80", "80:", ":80", "80:x", "0:80", "80:65536", "-1:80", "80:81:82"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(UsageError, match="pair of ports"):
        arguments.options_of(arguments.parse(["clone", "1", f"--map-port={text}"]))


@pytest.mark.parametrize("text", ["/a", "=/b", "/a="])
def test_bad_paths(text: str) -> None:
    with pytest.raises(UsageError, match="pair of paths"):
        arguments.options_of(arguments.parse(["clone", "1", "--map-path", text]))


def test_options() -> None:
    words = "clone 7 --map-port 1:2 --map-port 3:4 --map-path /a=/b=c --tcp close --stdio /tmp/out --yes --full"
    options = arguments.options_of(
        arguments.parse([*words.split(), "--verify", "--guard", "on", "--freeze-budget", "5"])
    )
    assert options.map_ports == (PortMap(1, 2), PortMap(3, 4))
    assert options.map_paths == (("/a", "/b=c"),)
    assert (options.tcp, options.stdio, options.yes, options.full) == ("close", "/tmp/out", True, True)
    assert (options.verify, options.guard, options.freeze_budget_ms) == (True, "on", 5.0)


def test_an_option_between_process_and_destination() -> None:
    found = arguments.parse(["clone", "7", "--yes", "--map-port", "1:2", "unix:/run/x"])
    assert (found.pid, found.destination, found.yes) == (7, "unix:/run/x", True)
    with pytest.raises(UsageError, match="unrecognized arguments: unix:/run/x more"):
        arguments.parse(["clone", "7", "local", "unix:/run/x", "more"])


def test_policy_options_come_before_the_file_and_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('eager_below = "8MiB"\n[[rule]]\nmatch = "stack"\ntreatment = "eager"\n')
    words = ["maps", "1", "--protect", "heap", "--eager", "heap", "--policy", str(file)]
    policy = arguments.policy_of(arguments.parse(words))
    assert [(rule.match, rule.treatment) for rule in policy.rules] == [
        ("heap", Treatment.PROTECTED),
        ("heap", Treatment.EAGER),
        ("stack", Treatment.EAGER),
    ]
    assert [rule.source for rule in policy.rules] == ["--protect heap", "--eager heap", "p.toml:2"]
    assert (policy.eager_below, policy.below_source) == (8 << 20, "p.toml")
    own = arguments.policy_of(arguments.parse([*words, "--eager-below", "64K"]))
    assert (own.eager_below, own.below_source) == (65536, "--eager-below")
