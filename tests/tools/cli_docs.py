"""docs/cli.md, made of the parser: `make docs`, or `python -m tests.tools.cli_docs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from streamconv.cli.options import EXIT_CODES
from streamconv.cli.parser import build_parser

PATH = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Command line

Generated from the parser by `make docs`; `streamconv COMMAND --help` prints the same. A size is a number of bytes, or
has a unit: KiB, MiB and GiB are powers of 1024, K, M and G powers of 1000.

- With `--json`, the result is one JSON object on stdout ([json.md](json.md)). Each warning and error is one line on
  stderr, `streamconv: FILE: TENSOR: problem (what to do)`; progress is shown on stderr too.
- The progress bar is shown only on a terminal. Output has no colour, with or without `NO_COLOR`.
- A closed pipe ends the command silently. Characters that the terminal's encoding does not have are shown escaped.
- `-v` prints more, and the traceback of an internal error, which is otherwise one line.
- `pip install` puts a man page, and completion for bash, zsh and fish, into `share/` of its prefix. If the shell does
  not look there, as in a virtual environment, add `eval "$(streamconv completion bash)"` to ~/.bashrc.
"""


def render() -> str:
    """The page."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    shown = {action.dest: action.help for action in commands._choices_actions}
    lines = [HEAD, "```text", str(parser.epilog), "```", ""]
    lines += [f"- [`streamconv {name}`](#streamconv-{name}): {text}" for name, text in shown.items()]
    for name in shown:
        lines += ["", f"## streamconv {name}", "", *_command(name, commands.choices[name])]
    return "\n".join(lines) + "\n"


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    positionals = [action for action in parser._actions if not action.option_strings]
    words = " ".join(str(action.metavar) for action in positionals)
    needed = [f"{a.option_strings[-1]} {a.metavar}" for a in parser._actions if a.option_strings and a.required]
    yield f"    {' '.join(filter(None, ('streamconv', name, words, *needed, '[options]')))}"
    yield ""
    yield str(parser.description)
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            title = "" if group.title in ("positional arguments", "options") else f"{group.title}:"
            yield from ("", *((title, "") if title else ()), "| | |", "|---|---|")
            yield from (_row(action) for action in actions)
    example, _, codes = str(parser.epilog).partition("exit codes:")
    if example.strip():
        title, _, text = example.strip().partition("\n")
        yield from ("", title, "", *(f"    {line.removeprefix('  ')}".rstrip() for line in text.splitlines()))
    if codes not in EXIT_CODES:
        yield from ("", f"exit codes: {codes.strip()}")


def _row(action: argparse.Action) -> str:
    if action.nargs == 0:
        name = ", ".join(action.option_strings)
    else:
        value = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
        name = f"{', '.join(action.option_strings)} {value}".strip()
    help_ = str(action.help).replace("|", "\\|")
    return f"| `{name}` | {help_} |"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
    sys.exit(0)
