"""Completion and the man page: made of the parser, whole, and what bash and man make of them."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv.cli import main, shells
from streamconv.ggml.outtypes import WORDS

ROOT = Path(__file__).parents[2]
NAMES = list(shells.commands())


def complete(line: str) -> list[str]:
    """What bash offers at the end of `line`."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{shells.text_for('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        '_streamconv; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_values() -> None:
    assert complete("streamconv in") == ["inspect"]
    assert complete("streamconv ") == NAMES
    assert complete("streamconv convert x --outtype q8") == ["q8_0"]
    assert complete("streamconv convert x --outtype ") == list(WORDS)
    assert complete("streamconv convert x --verif") == ["--verify"]
    assert complete("streamconv verify x --io ") == []  # of other commands
    assert complete("streamconv completion f") == ["fish"]
    assert complete("streamconv convert some") == []  # files are bash's own


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", NAMES)
def test_every_option_is_in_every_text(shell: str, command: str) -> None:
    text = shells.text_for(shell)
    _, parser = shells.commands()[command]
    for action in parser._actions:
        for flag in action.option_strings:
            spelled = flag if shell != "fish" else f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            assert spelled in text, f"{command} {flag}"


def test_zsh_and_fish_know_the_options_before_a_command_and_the_words_without_one() -> None:
    """As tried by hand in both; here their texts alone, so that the shells need not be installed."""
    zsh, fish = shells.text_for("zsh"), shells.text_for("fish")
    assert "'*--version[" in zsh.partition("local -a commands")[0]
    assert "-n __fish_use_subcommand -s V -l version " in fish
    assert r"__fish_seen_subcommand_from completion' -f -a 'bash\t zsh\t fish\t'" in fish
    assert r"-l io -x -a 'mapped\t positioned\t' -d " in fish  # a tab: none has its option's description


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_that_is_here_takes_the_text(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell):
        (tmp_path / "text").write_text(shells.text_for(shell))
        assert subprocess.run([shell, "-n", tmp_path / "text"], check=False).returncode == 0
    quotes = re.sub(r"\\'", "", shells.text_for(shell))
    assert quotes.count("'") % 2 == 0


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == shells.text_for(shell)
    assert main(["completion", "none"]) == 2


def test_man_has_every_command_and_option(tmp_path: Path) -> None:
    text = shells.text_for("man")
    for name, (_, parser) in shells.commands().items():
        assert f'.SH "STREAMCONV {name.upper()}"' in text
        for action in parser._actions:
            for flag in action.option_strings:
                assert flag.replace("-", "\\-") in text
    assert not [line for line in text.splitlines() if line.startswith("'")]
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tascii", "-ww", "-P-c"], input=text, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert "--split-max-size SIZE" in re.sub(r".\x08", "", done.stdout)


def test_the_build_makes_all_of_them_without_the_dependencies(tmp_path: Path) -> None:
    """As in an isolated build: the standard library and setuptools are all that is there."""
    code = (
        "import sys, types, pathlib, importlib.util; fake = types.ModuleType('setuptools.command.build_py')\n"
        "fake.build_py = object; sys.modules[fake.__name__] = fake\n"
        f"spec = importlib.util.spec_from_file_location('build', {str(ROOT / 'streamconv' / 'cli' / 'build.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "made = module.shared_files()\n"
        "print(sorted(f'{folder}/{pathlib.Path(file).name}' for folder, files in made for file in files))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(shells.PLACES.values()))
    for what, place in shells.PLACES.items():
        assert (ROOT / "build" / "share" / place).read_text(encoding="utf-8") == shells.text_for(what)


def test_no_help_is_missing() -> None:
    for _, parser in shells.commands().values():
        assert not [one for one in parser._actions if not one.help or one.help == argparse.SUPPRESS]
