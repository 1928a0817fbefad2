"""The kernels under test, and gguf-py's result for the same numbers.

Builds the compiled kernels as pyproject.toml declares them, from the current tree (a stale build cannot hide a change);
if there is a compiler, a build that fails is a failure and never a skip. `encode` checks that no byte around its
result is written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from streamconv.ggml import encode as codecs
from streamconv.ggml.reference import BF16, F16, F32, FLOATS
from streamconv.lazy.dtype import Dtype
from streamconv.lazy.scratch import Scratch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "streamconv" / "ggml" / "kernels"
SOURCES = (F32, F16, BF16)
GUARD = 0xA5

Bits = NDArray[Any]


def has_compiler() -> bool:
    """Whether what setuptools would compile with is there, Python's own headers (python3-dev) among it."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return shutil.which(command[0]) is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


# "c" runs what the loader chooses for this machine, "c-baseline" what it chooses where there is no AVX2.
FLAGS = {"c": "", "c-baseline": "-DCLONED="} if has_compiler() else {}
NAMES = ("numpy", *FLAGS)


@functools.cache
def _built(name: str, flags: str) -> Path:
    """A folder with the extension, compiled with `flags` besides its own; kept until something of it changes."""
    files = [path for path in sorted(KERNELS.glob("*.[ch]")) if (path.name == "floats.c") == (name == "_kernels")]
    sources = ["pyproject.toml", "LICENSE", *(str(path.relative_to(ROOT)) for path in files)]
    what = [name, flags, os.environ.get("CC", ""), os.environ.get("CFLAGS", ""), sys.version]
    digest = hashlib.sha256("\0".join([*what, *sources]).encode())
    for source in sources:
        digest.update((ROOT / source).read_bytes())
    kept = ROOT / ".cache" / "kernels" / digest.hexdigest()[:16]
    if kept.is_dir():
        return kept
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        (tree / "streamconv" / "ggml" / "kernels").mkdir(parents=True)
        for source in sources:
            shutil.copy(ROOT / source, tree / source)
        project = tree / "pyproject.toml"  # without the command that adds shared files, which needs the whole package
        project.write_text(re.sub(r"\[tool\.setuptools\.cmdclass\]\n[^[]*", "", project.read_text("utf-8")), "utf-8")
        (tree / "README.md").touch()
        command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"]
        environ = {**os.environ, "CFLAGS": f"{os.environ.get('CFLAGS', '')} {flags}"}
        build = subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True, check=False)
        found = list((tree / "streamconv" / "ggml").glob(f"{name}.*"))  # the other one, without sources, is optional
        assert build.returncode == 0 and len(found) == 1, build.stdout + build.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=kept.parent))
        shutil.copy(found[0], made)
        with contextlib.suppress(OSError):  # another run of the tests was faster
            made.rename(kept)
    return kept


@functools.cache
def compiled(flags: str = "", name: str = "_kernels") -> ModuleType:
    """The extension `name` of the tree as it is."""
    (path,) = _built(name, flags).iterdir()
    spec = importlib.util.spec_from_file_location(f"streamconv.ggml.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(name: str) -> codecs.Kernel:
    """The kernel of that name, one of NAMES."""
    return codecs.compiled_kernel(compiled(FLAGS[name])) if name in FLAGS else codecs.REFERENCE


def values(source: Dtype, bits: Bits) -> NDArray[np.float32]:
    """The numbers that the patterns `bits` of `source` stand for."""
    if source == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if source == F16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def patterns(source: Dtype, numbers: NDArray[np.float32]) -> Bits:
    """Patterns of `source`: the numbers cut to BF16, rounded to F16, or as they are."""
    if source == BF16:
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    if source == F16:
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).view(np.uint16)
    return numbers.view(np.uint32)


def expected(source: Dtype, target: Dtype, bits: Bits) -> NDArray[np.uint8]:
    """The bytes that gguf-py makes of rows `bits`; a type that does not change keeps its own."""
    if source == target:
        return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    with np.errstate(all="ignore"):
        rows = quants.quantize(values(source, bits), GGMLQuantizationType[target.name])
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)


def encode(source: Dtype, target: Dtype, bits: Bits, offset: int = 0) -> tuple[codecs.Stats, NDArray[np.uint8]]:
    """Rows `bits` encoded `offset` bytes into a buffer, with a scratch of exactly what is declared."""
    n_rows, n_columns = bits.shape
    nbytes = n_rows * target.row_nbytes(n_columns)
    slab = np.ascontiguousarray(bits, dtype=FLOATS[source].bits).reshape(-1).view(np.uint8)
    kept = slab.copy()
    buffer = np.full(offset + nbytes + 64, GUARD, dtype=np.uint8)
    scratch = Scratch(codecs.encode_scratch_nbytes(source, target, n_rows, n_columns))
    with scratch.frame():
        scratch.take(scratch.nbytes)[:] = 0x7F  # as an earlier call may leave it: huge, read as whatever
    stats = codecs.encode(
        source, target, slab, buffer[offset : offset + nbytes], scratch, n_columns, codecs.best_kernel()
    )
    assert np.array_equal(slab, kept), "the source was changed"
    assert (buffer[:offset] == GUARD).all() and (buffer[offset + nbytes :] == GUARD).all(), "written beyond the rows"
    return stats, buffer[offset : offset + nbytes]
