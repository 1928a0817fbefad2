"""Imports run one way: a module may import what stands in an earlier row of the table in docs/source.md."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

PACKAGE = Path(__file__).parents[2] / "streamconv"

# From what everything rests on to what users call: the rows of the table there.
MAP = (PACKAGE.parent / "docs" / "source.md").read_text(encoding="utf-8")
LAYERS = [re.findall(r"\w+", names) for names in re.findall(r"^\| ((?:`\w+/?` )+)\|", MAP, re.MULTILINE)]


def imported(path: Path) -> set[str]:
    """The streamconv modules that a file imports anywhere, TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "streamconv":
            names |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streamconv."):
            names.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("streamconv.")}
    return names


def test_every_module_has_its_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"recipes"}
    assert sorted(modules) == sorted(name for layer in LAYERS for name in layer)


def test_imports_run_one_way() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module != "recipes":
            others = imported(path) - {module}
            upward += [f"{path.name} imports {name}" for name in others if level[name] >= level[module]]
    assert not upward


def test_recipes_import_the_recipe_vocabulary_alone() -> None:
    for path in (PACKAGE / "recipes").glob("*.py"):
        assert imported(path) <= {"recipe", "recipes"}, path.name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from streamconv.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'gguf', 'tqdm', 'psutil', 'safetensors', 'huggingface_hub', 'distributed', 'argcomplete'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exit codes" in done.stdout


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
