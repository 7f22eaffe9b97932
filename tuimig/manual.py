"""The man page and the completions, made from the parser: `python -m tuimig.manual` writes them into the source tree.

They are checked in; a test makes them again and compares. Nothing of this is needed to run tuimig.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuimig.arguments import EXIT_CODES, parser

INTRODUCTION: Final = """\
tuimig takes an exact picture of a running process at one instant, T0, while the process goes on working, and runs that
picture again: beside its source, elsewhere, or later. The process is stopped for milliseconds only: its memory is
write-protected then, and each page is captured before the first write to it. The copy starts at once; its pages come
when they are touched. Without a VERB the console opens."""
FILE_OPTIONS: Final = frozenset({"FILE", "FILE|-", "FILE.html", "null|inherit|FILE", "OTHER"})
DIRECTORIES: Final = frozenset({"DIR"})


@dataclass(frozen=True, slots=True)
class Option:
    """`takes`: nothing, `file`, `dir`, `pid`, `word`, or the choices with spaces between them."""

    names: tuple[str, ...]
    metavar: str
    help: str
    takes: str


@dataclass(frozen=True, slots=True)
class Verb:
    name: str
    help: str
    example: str
    usage: str
    options: tuple[Option, ...]
    arguments: tuple[Option, ...]


def verbs(top: argparse.ArgumentParser) -> list[Verb]:
    subparsers = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in subparsers._choices_actions}
    return [_verb(name, helps[name], sub) for name, sub in subparsers.choices.items()]


def _verb(name: str, what: str, sub: argparse.ArgumentParser) -> Verb:
    example = (sub.epilog or "").partition("\n")[2].strip()
    actions = [_option(action) for action in sub._actions if not isinstance(action, argparse._HelpAction)]
    options = tuple(option for option in actions if option.names)
    arguments = tuple(option for option in actions if not option.names)
    usage = " ".join(_usage(action) for action in sub._actions if not action.option_strings)
    return Verb(name, what, example, usage, options, arguments)


def _usage(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"[{name}]" if action.nargs == "?" else name


def _option(action: argparse.Action) -> Option:
    metavar = str(action.metavar or ("" if action.nargs == 0 else action.dest.upper()))
    if action.choices:
        metavar, takes = "|".join(map(str, action.choices)), " ".join(map(str, action.choices))
    elif action.nargs == 0:
        metavar, takes = "", ""
    elif metavar in FILE_OPTIONS:
        takes = "file"
    elif metavar in DIRECTORIES:
        takes = "dir"
    else:
        takes = "pid" if metavar == "PID" else "word"
    return Option(tuple(action.option_strings), metavar, action.help or "", takes)


def top_options(top: argparse.ArgumentParser) -> list[Option]:
    return [_option(action) for action in top._actions if action.option_strings]


# ---------------------------------------------------------------- the man page


def man(top: argparse.ArgumentParser) -> str:
    lines = [
        '.\\" Made by `python -m tuimig.manual` from the parser. Do not edit.',
        ".TH TUIMIG 1",
        ".SH NAME",
        "tuimig \\- clone or move a running process with milliseconds of stop",
        ".SH SYNOPSIS",
        ".B tuimig",
        "[\\fIOPTION\\fR]...",
        ".br",
        ".B tuimig",
        "\\fIVERB\\fR [\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...",
        ".SH DESCRIPTION",
        _roff(INTRODUCTION),
        ".SH OPTIONS OF THE CONSOLE",
        *_options(top_options(top)),
        ".SH VERBS",
    ]
    for verb in verbs(top):
        lines += [f".SS {verb.name}", f"\\fBtuimig {verb.name}\\fR [\\fIOPTION\\fR]... {_roff(verb.usage)}", ".PP"]
        lines += [_roff(f"{verb.help[0].upper()}{verb.help[1:]}.")]
        lines += _options([*verb.arguments, *verb.options])
        if verb.example:
            lines += [".PP", "Example:", ".PP", ".nf", f".RS\n{_roff(verb.example)}\n.RE", ".fi"]
    lines += [".SH EXIT STATUS", ".nf", *map(_roff, EXIT_CODES.splitlines()[1:]), ".fi"]
    lines += [".SH SEE ALSO", ".BR userfaultfd (2),", ".BR ptrace (2),", ".BR proc (5)"]
    return "\n".join(lines) + "\n"


def _options(options: Sequence[Option]) -> Iterator[str]:
    for option in options:
        yield ".TP"
        names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in option.names)
        value = f"\\fI{_roff(option.metavar)}\\fR" if option.metavar else ""
        yield " ".join(part for part in (names, value) if part)
        yield _roff(f"{option.help}." if option.help else "See below.")


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", escaped)


# ---------------------------------------------------------------- completions


def bash(top: argparse.ArgumentParser) -> str:
    known = verbs(top)
    names = " ".join(verb.name for verb in known)
    words = [
        "# bash completion for tuimig. Made by `python -m tuimig.manual` from the parser. Do not edit.",
        "_tuimig() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb= options= values=",
        "    local index",
        "    for ((index = 1; index < COMP_CWORD; index++)); do",
        f"        case ${{COMP_WORDS[index]}} in {names.replace(' ', '|')}) verb=${{COMP_WORDS[index]}}; break;; esac",
        "    done",
        '    case "$verb $before" in',
    ]
    for verb in known:
        for option in verb.options:
            if option.takes:
                pattern = "|".join(f'"{verb.name} {name}"' for name in option.names)
                words.append(f"        {pattern}) values={_bash_values(option.takes)} ;;")
    words += ["    esac", '    case "$verb" in', f'        "") options="{names} {_flags(top_options(top))}" ;;']
    for verb in known:
        words.append(f'        {verb.name}) options="{_flags(verb.options)}" ;;')
    words.append("    esac")
    words.append('    if [[ -z $values && $word != -* ]]; then case "$verb" in')
    for verb in known:
        takes = [argument.takes for argument in verb.arguments]
        if takes:
            words.append(f"        {verb.name}) values={_bash_values(takes[0])}")
            if len(takes) > 1:  # the first one comes right after the verb
                words.append(f"            [[ $before == {verb.name} ]] || values={_bash_values(takes[1])}")
            words[-1] += " ;;"
    words += [
        "    esac; fi",
        '    case "$values" in',
        '        "") COMPREPLY=($(compgen -W "$options" -- "$word")) ;;',
        '        file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$word")) ;;',
        '        dir) compopt -o filenames; COMPREPLY=($(compgen -d -- "$word")) ;;',
        '        pid) COMPREPLY=($(cd /proc && compgen -W "$(echo [0-9]*)" -- "$word")) ;;',
        "        word) COMPREPLY=() ;;",
        '        *) COMPREPLY=($(compgen -W "$values" -- "$word")) ;;',
        "    esac",
        "}",
        "complete -F _tuimig tuimig",
    ]
    return "\n".join(words) + "\n"


def _bash_values(takes: str) -> str:
    return f'"{takes}"' if " " in takes else takes


def _flags(options: Sequence[Option]) -> str:
    return " ".join(name for option in options for name in option.names)


def zsh(top: argparse.ArgumentParser) -> str:
    lines = [
        "#compdef tuimig",
        "# Made by `python -m tuimig.manual` from the parser. Do not edit.",
        "local context state state_descr line",
        "typeset -A opt_args",
        "_arguments -C \\",
        *(f"    {_zsh(option)} \\" for option in top_options(top)),
        "    '1: :->verb' '*:: :->rest'",
        "case $state in",
        "verb)",
        "    local -a verbs=(",
        *(f"        {_quoted(f'{verb.name}:{verb.help}')}" for verb in verbs(top)),
        "    )",
        "    _describe verb verbs ;;",
        "rest)",
        "    case $words[1] in",
    ]
    for verb in verbs(top):
        parts = [_zsh(option) for option in verb.options]
        parts += [_quoted(f"{n}:{a.help or a.metavar}:{ZSH[a.takes](a)}") for n, a in _positions(verb)]
        lines.append(f"    {verb.name}) _arguments \\\n        " + " \\\n        ".join(parts) + " ;;")
    return "\n".join([*lines, "    esac ;;", "esac"]) + "\n"


def _positions(verb: Verb) -> Iterator[tuple[int, Option]]:
    for number, argument in enumerate(verb.arguments, 1):
        takes = argument.takes if argument.takes in ZSH else "choices"
        yield number, Option(argument.names, argument.metavar, argument.help.replace(":", "\\:"), takes)


def _zsh(option: Option) -> str:
    words = option.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    value = ""
    if option.takes:
        action = ZSH.get(option.takes, ZSH["choices"])(option)
        value = f":{option.metavar.replace(':', ' ')}:{action}"
    name = option.names[-1]
    return _quoted(f"*{name}[{words}]{value}")


ZSH: Final[dict[str, Callable[[Option], str]]] = {
    "file": lambda _: "_files",
    "dir": lambda _: "_files -/",
    "pid": lambda _: "_pids",
    "word": lambda _: " ",
    "choices": lambda option: f"({option.metavar.replace('|', ' ')})",
}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish(top: argparse.ArgumentParser) -> str:
    known = verbs(top)
    lines = [
        "# fish completion for tuimig. Made by `python -m tuimig.manual` from the parser. Do not edit.",
        f"set -l verbs {' '.join(verb.name for verb in known)}",
        "complete -c tuimig -f",
    ]
    none = '"not __fish_seen_subcommand_from $verbs"'
    for verb in known:
        lines.append(f"complete -c tuimig -n {none} -a {verb.name} -d {_fish(verb.help)}")
    for option in top_options(top):
        lines.append(f"complete -c tuimig -n {none} {_fish_option(option)}")
    for verb in known:
        seen = f'"__fish_seen_subcommand_from {verb.name}"'
        lines += [f"complete -c tuimig -n {seen} {_fish_option(option)}" for option in verb.options]
        for argument in verb.arguments:
            if action := _fish_values(argument.takes):
                lines.append(f"complete -c tuimig -n {seen} {action}")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    needed = "-r" if option.takes == "file" else "-x"  # -x: and no file's name
    value = f"{needed} {_fish_values(option.takes)}".rstrip() if option.takes else ""
    return " ".join(part for part in (*names, value, f"-d {_fish(option.help)}") if part)


def _fish_values(takes: str) -> str:
    if takes in ("", "word"):
        return ""
    if takes == "file":
        return "-F"
    return f"-a {_fish({'dir': '(__fish_complete_directories)', 'pid': '(__fish_complete_pids)'}.get(takes, takes))}"


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


FILES: Final[dict[str, Callable[[argparse.ArgumentParser], str]]] = {
    "docs/tuimig.1": man,
    "completions/tuimig.bash": bash,
    "completions/_tuimig": zsh,
    "completions/tuimig.fish": fish,
}


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    for name, make in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(make(parser()), encoding="utf-8")


if __name__ == "__main__":
    main()
