"""The man page and shell completion scripts, generated from the parser so that they are always complete.

They are static: pressing Tab starts no process. `cli/build.py` installs them where shells and `man` look for them.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from streamconv import __version__
from streamconv.cli.options import EXIT_CODES
from streamconv.cli.parser import build_parser

# By shell and for `man`, where the files lie below the prefix of an installation.
PLACES: Final[Mapping[str, str]] = {
    "bash": "share/bash-completion/completions/streamconv",
    "zsh": "share/zsh/site-functions/_streamconv",
    "fish": "share/fish/vendor_completions.d/streamconv.fish",
    "man": "share/man/man1/streamconv.1",
}


def text_for(what: str) -> str:
    """Return the text of one of PLACES."""
    makers: dict[str, Callable[[], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish, "man": _man}
    return "\n".join(makers[what]()) + "\n"


def commands() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Return help and parser of each command by name."""
    (found,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    helps = {one.dest: str(one.help) for one in found._choices_actions}
    return {name: (help, found.choices[name]) for name, help in helps.items()}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [one for one in parser._actions if one.option_strings and one.help != argparse.SUPPRESS]


def _places(parser: argparse.ArgumentParser) -> list[str]:
    """The words, if they are known, that a command takes without an option before them."""
    return [value for one in parser._actions if not one.option_strings for value in _values(one)]


def _values(action: argparse.Action) -> list[str]:
    return [str(value) for value in action.choices or ()]


# ---------------------------------------------------------------- bash


def _bash() -> Iterator[str]:
    known = commands()
    yield "# bash completion of streamconv"
    yield "_streamconv() {"
    yield "    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= word words="
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield f"        case $word in {'|'.join(known)}) command=$word; break;; esac"
    yield "    done"
    yield '    case "$command $before" in'
    for name, (_, parser) in known.items():
        for action in _options(parser):
            if values := _values(action):
                cases = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                yield f"        {cases}) words={shlex.quote(' '.join(values))};;"
    yield "    esac"
    yield "    if [[ -z $words ]]; then"
    yield '        case "$command ${current:0:1}" in'
    yield "            ' -') words='--help --version';;"
    yield f"            ' '*) words={shlex.quote(' '.join(known))};;"
    for name, (_, parser) in known.items():
        flags = " ".join(flag for action in _options(parser) for flag in action.option_strings)
        yield f"            '{name} -') words={shlex.quote(flags)};;"
        if shown := _places(parser):
            yield f"            '{name} '*) words={shlex.quote(' '.join(shown))};;"
    yield "        esac"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$current"))'
    yield "}"
    yield "complete -o default -o bashdefault -F _streamconv streamconv"


# ---------------------------------------------------------------- zsh


def _zsh() -> Iterator[str]:
    known = commands()
    yield "#compdef streamconv"
    yield "_streamconv() {"
    yield "  if (( CURRENT == 2 )) && [[ $PREFIX == -* ]]; then"
    yield "    _arguments \\"
    root = [_zsh_option(action, flag) for action in _options(build_parser()) for flag in action.option_strings]
    yield from (f"      {option} \\" for option in root[:-1])
    yield f"      {root[-1]}"
    yield "    return"
    yield "  fi"
    yield "  if (( CURRENT == 2 )); then"
    yield "    local -a commands=("
    yield from (f"      {_zsh_quoted(f'{name}:{help}')}" for name, (help, _) in known.items())
    yield "    )"
    yield "    _describe command commands"
    yield "    return"
    yield "  fi"
    yield "  (( CURRENT-- ))"
    yield "  shift words"
    yield "  case $words[1] in"
    for name, (_, parser) in known.items():
        yield f"    {name})"
        yield "      _arguments \\"
        for action in _options(parser):
            yield from (f"        {_zsh_option(action, flag)} \\" for flag in action.option_strings)
        places = _places(parser)
        rest = f"({' '.join(places)})" if places else "_files"
        yield f"        {_zsh_quoted(f'*:file:{rest}')};;"
    yield "  esac"
    yield "}"
    yield 'if [[ $funcstack[1] == _streamconv ]]; then _streamconv "$@"; else compdef _streamconv streamconv; fi'


def _zsh_option(action: argparse.Action, flag: str) -> str:
    help = re.sub(r"([\[\]:])", r"\\\1", str(action.help))
    text = f"*{flag}[{help}]"
    if action.nargs != 0:
        values = _values(action)
        text += f":{action.metavar or 'value'}:{'(' + ' '.join(values) + ')' if values else '_files'}"
    return _zsh_quoted(text)


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------- fish


def _fish() -> Iterator[str]:
    known = commands()
    yield "# fish completion of streamconv"
    for action in _options(build_parser()):
        yield f"complete -c streamconv -n __fish_use_subcommand {_fish_option(action)}"
    for name, (help, _) in known.items():
        yield f"complete -c streamconv -f -n __fish_use_subcommand -a {name} -d {_fish_quoted(help)}"
    for name, (_, parser) in known.items():
        start = f"complete -c streamconv -n '__fish_seen_subcommand_from {name}'"
        yield from (f"{start} {_fish_option(action)}" for action in _options(parser))
        if places := _places(parser):
            yield f"{start} -f -a {_fish_words(places)}"


def _fish_option(action: argparse.Action) -> str:
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings)
    values = _values(action)
    needs = "" if action.nargs == 0 else f" -x -a {_fish_words(values)}" if values else " -r"
    return f"{flags}{needs} -d {_fish_quoted(str(action.help))}"


def _fish_words(words: Sequence[str]) -> str:
    """Words to offer, without a description, which would follow the tab; without the tab it would be the option's."""
    return "'" + " ".join(rf"{word}\t" for word in words) + "'"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# ---------------------------------------------------------------- man


def _man() -> Iterator[str]:
    parser = build_parser()
    yield f'.TH STREAMCONV 1 "" "streamconv {__version__}" "User Commands"'
    yield from (".SH NAME", f"streamconv \\- {_roff('convert checkpoints and LoRA adapters to GGUF')}")
    yield from (".SH SYNOPSIS", ".B streamconv", r"\fICOMMAND\fR [\fIoptions\fR]")
    yield from (".SH DESCRIPTION", _roff(str(parser.description)))
    for name, (_, one) in commands().items():
        yield from (f'.SH "STREAMCONV {name.upper()}"', _roff(" ".join(str(one.description).split())))
        for action in one._actions:
            yield from (".TP", _man_head(action), _roff(str(action.help)))
        example, _, codes = str(one.epilog).partition("exit codes:")
        if example.strip():
            yield from (".PP", ".nf", *map(_roff, example.strip("\n").splitlines()), ".fi")
        if codes not in EXIT_CODES:
            yield from (".PP", ".nf", _roff("exit codes:"), *map(_roff, codes.strip("\n").splitlines()), ".fi")
    yield from (".SH EXIT STATUS", ".nf", *map(_roff, EXIT_CODES.splitlines()[1:]), ".fi")


def _man_head(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(_values(action)) if action.nargs != 0 else "")
    flags = ", ".join(rf"\fB{_roff(flag)}\fR" for flag in action.option_strings)
    return f"{flags} \\fI{_roff(str(value))}\\fR".strip() if value else flags


def _roff(text: str) -> str:
    """Text of one line; a dot or quote at its beginning would be a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
