"""llama.cpp's own converters, from the source distribution of llama-cpp-python on PyPI, without building anything.

They are fetched once into .cache/ and run in their own process; they need torch and transformers. A converter that
fails raises ConverterError with its last line; nothing falls back to another oracle.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

VERSION = "0.3.36"
CACHE = Path(__file__).resolve().parents[2] / ".cache"

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_WANTED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")


class ConverterError(RuntimeError):
    """llama.cpp's converter refused or crashed; the message is the last line that it wrote."""


def source() -> Path:
    """The folder of llama.cpp's converters, downloaded by pip on first use."""
    target = CACHE / f"llama.cpp-{VERSION}"
    if target.exists():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        package = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *package, "-d", scratch], check=True)
        root = PurePosixPath(f"llama_cpp_python-{VERSION}", "vendor", "llama.cpp")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            members = [m for m in archive if any(PurePosixPath(m.name).is_relative_to(root / name) for name in _WANTED)]
            archive.extractall(scratch, members, filter="data")
        (Path(scratch) / root).rename(target)
    return target


def convert(
    src: Path, dst: Path, outtype: str = "auto", *, pre: str | None = None, options: Sequence[str] = ()
) -> Path:
    """`dst`, written by convert_hf_to_gguf.py from a checkpoint, with further `options`.

    `pre` stands in for the pre-tokenizer's name, which llama.cpp knows by token ids of published vocabularies alone.
    """
    return _run("convert_hf_to_gguf.py", pre, dst, [str(src), "--outtype", outtype, *options])


def convert_all(
    src: Path, folder: Path, outtypes: Sequence[str], *, pre: str | None = None, mmproj: bool = False
) -> dict[str, Path | str]:
    """OUTTYPE.gguf in `folder` for each outtype, or the last line of the error; all in one process, as torch is slow.

    `pre` as in `convert`. mmproj: the projector of a vision model instead of its text half.
    """
    flags = ["--mmproj"] if mmproj else []
    runs = [
        [str(src), *flags, "--outtype", outtype, "--outfile", str(folder / f"{outtype}.gguf")] for outtype in outtypes
    ]
    command = [sys.executable, __file__, "--each", str(source()), "convert_hf_to_gguf.py", pre or "", json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | _OFFLINE)
    if done.returncode:
        raise ConverterError((done.stderr.strip() or "no output").splitlines()[-1])
    errors: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return {
        outtype: folder / f"{outtype}.gguf" if error is None else error
        for outtype, error in zip(outtypes, errors, strict=True)
    }


def convert_vocabulary(src: Path, dst: Path, *, pre: str | None = None) -> Path:
    """`dst`, with the keys and no tensors, by convert_hf_to_gguf.py from a folder that needs no weights."""
    return _run("convert_hf_to_gguf.py", pre, dst, [str(src), "--vocab-only"])


def convert_lora(adapter: Path, base: Path, dst: Path, outtype: str = "f32", *, pre: str | None = None) -> Path:
    """`dst`, written by convert_lora_to_gguf.py from a PEFT adapter on the checkpoint `base`; `pre` as in `convert`."""
    return _run("convert_lora_to_gguf.py", pre, dst, [str(adapter), "--base", str(base), "--outtype", outtype])


def _run(script: str, pre: str | None, dst: Path, arguments: list[str]) -> Path:
    command = [sys.executable, __file__, str(source()), script, pre or "", *arguments, "--outfile", str(dst)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | _OFFLINE)
    if done.returncode or not dst.exists():
        raise ConverterError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
    return dst


def _main(root: str, script: str, pre: str, *arguments: str) -> None:
    sys.path[0] = root
    if pre:
        from conversion.base import TextModel  # type: ignore[import-not-found]

        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv = [script, *arguments]
    runpy.run_path(str(Path(root, script)), run_name="__main__")


def _each(root: str, script: str, pre: str, runs: str) -> None:
    """`_main` for each list of arguments; prints the errors, or null, of all."""
    errors: list[str | None] = []
    for arguments in json.loads(runs):
        try:
            _main(root, script, pre, *arguments)
        except (Exception, SystemExit) as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            errors.append(None)
    print(json.dumps(errors))


if __name__ == "__main__":
    if sys.argv[1] == "--each":
        _each(*sys.argv[2:])
    else:
        _main(*sys.argv[1:])
