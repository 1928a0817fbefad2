"""Run llama.cpp's converter on a synthetic vocabulary: `python llama_cpp_shim.py SCRIPT ARGUMENTS...`."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    try:
        from conversion.base import TextModel  # type: ignore[import-not-found]
    except ImportError as error:
        if error.name not in {"conversion", "conversion.base"}:
            raise
        sys.exit(
            f"{script.name}: needs a llama.cpp that has its converters in conversion/, TextModel in conversion/base.py"
        )

    find = TextModel.get_vocab_base_pre

    def find_or_lfm2(self: object, tokenizer: object) -> str:
        try:
            return str(find(self, tokenizer))
        except NotImplementedError:
            return "lfm2"

    TextModel.get_vocab_base_pre = find_or_lfm2
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
