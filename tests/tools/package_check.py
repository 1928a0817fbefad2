"""Does the package install and run where nothing else is? `make package-check` runs this.

Builds sdist and wheel, checks their metadata and contents, and installs them in fresh environments: the wheel on every
Python from 3.11 that this machine has, the sdist, and a wheel that was built without a C compiler. Each converts the
same checkpoint; the files must be the same, byte for byte.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from streamconv.cli.shells import PLACES
from tests import tiny
from tests.tools import pythons

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What the command says; an AssertionError with all of it where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def build(out: Path, *options: str, env: dict[str, str] | None = None) -> None:
    run(sys.executable, "-m", "build", "--outdir", out, *options, env=env)


def check_contents(wheel: Path, sdist: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "streamconv").rglob("*.py")}
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert modules <= inside, sorted(modules - inside)
    assert "streamconv/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if not name.startswith("streamconv")], "foreign files in the wheel"
    extensions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    built = {name.removesuffix(".abi3.so").replace("/", ".") for name in inside if name.endswith(".abi3.so")}
    assert built == {extension["name"] for extension in extensions}, "an extension was not built"
    assert "-cp311-abi3-" in wheel.name, wheel.name
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = modules | {str(path.relative_to(ROOT)) for path in (ROOT / "streamconv/ggml/kernels").glob("*.[ch]")}
    wanted |= {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
    }
    wanted |= {"tests/cases.py", "tests/conftest.py", "docs/cli.md"}
    assert wanted <= names, sorted(wanted - names)


def try_out(python: str, package: Path, folder: Path, *, has_kernels: bool) -> bytes:
    """The file that a fresh install of `package` makes of the checkpoint."""
    run(python, "-m", "venv", folder)
    here = folder / "bin" / "python"
    run(here, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package)
    run(here, "-m", "pip", "check")
    command = folder / "bin" / "streamconv"
    missing = [place for place in PLACES.values() if not (folder / place).is_file()]
    assert not missing, missing
    assert run(command, "--version", cwd=folder).startswith("streamconv ")
    run(command, "convert", folder.parent / "model", "-o", "out.gguf", "--outtype", "q8_0", "--verify", cwd=folder)
    run(command, "inspect", "out.gguf", cwd=folder)
    for name in ("_kernels", "_blocks"):
        find = f"import importlib.util as u; print(u.find_spec('streamconv.ggml.{name}') is not None)"
        assert run(here, "-c", find, cwd=folder).strip() == str(has_kernels)
    return (folder / "out.gguf").read_bytes()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="package-check-") as name:
        folder = Path(name)
        build(folder / "dist")
        (wheel,), (sdist,) = (list((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        check_contents(wheel, sdist)
        print(f"{wheel.name}, {sdist.name}: complete")
        tiny.lfm2(folder / "model")
        found = pythons.installed()
        made = {}
        for version, python in found.items():
            made[f"wheel on Python {version}"] = try_out(python, wheel, folder / version, has_kernels=True)
        oldest, python = next(iter(found.items()))
        made[f"sdist on Python {oldest}"] = try_out(python, sdist, folder / "sdist", has_kernels=True)
        shutil.unpack_archive(sdist, folder / "tree")  # in ours, build/ may have the kernels of an earlier build
        (tree,) = (folder / "tree").iterdir()
        build(folder / "plain", "--wheel", str(tree), env={"CC": "false"})
        (plain,) = (folder / "plain").glob("*.whl")
        made["wheel without compiler"] = try_out(python, plain, folder / "no-cc", has_kernels=False)
        for what in made:
            print(f"{what}: installs, converts, verifies")
        assert len(set(made.values())) == 1, "not the same bytes everywhere"
    return 0


if __name__ == "__main__":
    sys.exit(main())
