"""`make demo`: a small LFM2 checkpoint, converted twice, looked at and verified; every command is shown."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.shapes import SHAPES, checkpoint

FOLDER = Path(".demo")


def run(*arguments: str) -> None:
    print(f"\n$ streamconv {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "streamconv", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    print("making a small LFM2 checkpoint (real structure, random weights) ...", flush=True)
    source = checkpoint(SHAPES["tiny"], FOLDER)
    for path in sorted(source.iterdir()):
        if not path.name.startswith("."):
            print(f"  {path}  {path.stat().st_size:,} bytes")
    for outtype in ("bf16", "q8_0"):
        output = str(FOLDER / f"tiny-{outtype}.gguf")
        run("convert", str(source), "-o", output, "--outtype", outtype, "--force")
        run("verify", output, "--source", str(source))
    run("inspect", str(FOLDER / "tiny-q8_0.gguf"), "--tensors", "--head", "14")


if __name__ == "__main__":
    main()
