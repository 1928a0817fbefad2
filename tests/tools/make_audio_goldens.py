"""Make the references of the audio models again: `python -m tests.tools.make_audio_goldens`. Needs torch; a minute.

tests/data/goldens/audio.json has, for each case of tests/audio_cases.py, what llama.cpp's converter makes of the text
half, of the encoder (--mmproj) and of the detokenizer's folder, for each outtype; audio.CASE.heard.npy, what llama.cpp
predicts from the first two after a sound. Folded batch norms depend on the machine, since torch does not round square
roots correctly on all of them, and are kept as numbers in audio.CASE.norms.npy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import audio_cases, cases, tiny
from tests.oracles import ggufs
from tests.tools import llama_cpp


def main() -> None:
    record: dict[str, Any] = {}
    for name, build in audio_cases.MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            src = build(Path(scratch, name))
            record[name] = {"digest": tiny.digest(src)}
            for role, (folder, is_mmproj) in audio_cases.ROLES.items():
                if (src / folder).is_dir():
                    Path(scratch, role).mkdir()
                    record[name][role] = _made(src / folder, Path(scratch, role), is_mmproj=is_mmproj)
            text, mmproj = (Path(scratch, role, "f32.gguf") for role in ("model", "mmproj"))
            _keep_norms(name, ggufs.read(mmproj))
            np.save(
                audio_cases.heard_path(name), audio_cases.hear(text, mmproj, audio_cases.sound()).astype(np.float32)
            )
        print(name, flush=True)
    audio_cases.GOLDENS.write_text(ggufs.compact(record), encoding="utf-8")


def _made(src: Path, scratch: Path, *, is_mmproj: bool) -> dict[str, Any]:
    made = llama_cpp.convert_all(src, scratch, cases.OUTTYPES, pre="lfm2", mmproj=is_mmproj)
    return ggufs.packed(
        {
            outtype: {"error": file} if isinstance(file, str) else ggufs.read(file).golden()
            for outtype, file in made.items()
        }
    )


def _keep_norms(name: str, mmproj: ggufs.Gguf) -> None:
    folded = [
        [mmproj.float64(f"a.blk.{i}.conv_norm.{part}") for part in ("weight", "bias")]
        for i in range(audio_cases.N_LAYERS)
    ]
    np.save(audio_cases.norms_path(name), np.asarray(folded, np.float32))


if __name__ == "__main__":
    main()
