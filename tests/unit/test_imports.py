"""Imports run one way: a module may import what stands in an earlier row of the table in docs/source.md."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamconv
from tests import tiny

PACKAGE = Path(__file__).parents[2] / "streamconv"

# From what everything rests on to what users call: the rows of the table there. A name is a package, a module, or one
# module of a package (`lazy.scratch`) that stands lower than the rest of it.
MAP = (PACKAGE.parent / "docs" / "source.md").read_text(encoding="utf-8")
ROWS = [re.findall(r"`([\w.]+)/?`", names) for names in re.findall(r"^\| ((?:`[\w.]+/?` )+)\|", MAP, re.MULTILINE)]
LEVEL = {name: number for number, row in enumerate(ROWS) for name in row}


def level(module: str) -> int:
    return LEVEL[module if module in LEVEL else module.partition(".")[0]]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name if name == "__init__" else name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """The streamconv modules that a file imports anywhere, TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    known, names = modules(), set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "streamconv":
            base = (node.module or "").removeprefix("streamconv").removeprefix(".")
            names |= {name for alias in node.names if (name := f"{base}.{alias.name}".lstrip(".")) in known} or {base}
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("streamconv.")}
    return names - {""}


def test_every_module_has_its_layer() -> None:
    found = modules()
    assert {name.partition(".")[0] for name in found} == {name.partition(".")[0] for name in LEVEL}
    assert {name for name in LEVEL if "." in name} <= found.keys()


def test_imports_run_one_way() -> None:
    """A module imports from rows above its own, and from its own package."""
    upward = []
    for module, path in modules().items():
        for name in imported(path):
            same_package = name.partition(".")[0] == module.partition(".")[0]
            if level(name) > level(module) or (level(name) == level(module) and not same_package):
                upward.append(f"{module} imports {name}")
    assert not upward


def test_architectures_import_the_language_alone() -> None:
    for path in (PACKAGE / "architectures").glob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= {"recipe", "architectures"}, path.name


def test_no_module_hides_another() -> None:
    """No module bears the name of a standard module or of a public function."""
    names = {name.rpartition(".")[2] for name in modules()} - {"__main__", "__init__"}
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(streamconv.__all__)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from streamconv.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'gguf', 'tqdm', 'psutil', 'safetensors', 'huggingface_hub', 'distributed'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exit codes" in done.stdout


def test_a_conversion_imports_what_it_uses(tmp_path: Path) -> None:
    """Half of the time of a small conversion is that of its imports."""
    code = "import sys; from streamconv.cli import main\nmain(sys.argv[1:])\nprint('|'.join(sorted(sys.modules)))"
    command = ["convert", str(tiny.llama(tmp_path / "src")), "-o", str(tmp_path / "out.gguf"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    found = [name.removeprefix("streamconv.") for name in done.stdout.strip().split("|")]
    assert [name for name in found if name.startswith("architectures.") and "._" not in name] == ["architectures.llama"]
    unused = ("lora.merge", "lora.files", "output.modelfile", "streamconv.batch.run", "safetensors.numpy")
    assert not [name for name in found if name.startswith(unused)]


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs /proc and two cores")
def test_a_command_starts_no_threads_for_blas(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from streamconv.cli import main\n"
        "main(sys.argv[1:])\n"
        "n = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('Threads'))\n"
        "sys.exit(f'{n} threads' if n != threading.active_count() else 0)"
    )
    command = ["convert", str(tiny.llama(tmp_path / "src")), "-o", str(tmp_path / "out.gguf"), "--quiet"]
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
