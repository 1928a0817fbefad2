"""The memory that a vocabulary is declared to cost, against what is allocated: for real shapes, and for the worst."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv.errors import SourceError
from streamconv.metadata.vocab import read_vocabulary, vocabulary_nbytes
from streamconv.metadata.vocab.footprint import _strings_nbytes
from tests.tiny import tokenizer as tiny
from tests.tiny.tokenizer import _field
from tests.vocab_cases import added, edit

ROOT = Path(__file__).parents[2]


def write_large(directory: Path, n_words: int, **options: Any) -> int:
    """A byte-level tokenizer of `n_words` merges in the shape of published ones; the number of its tokens."""
    tiny.write_bpe(directory, pre="llama-bpe")
    value = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = value["model"]
    parts = [letter for letter in model["vocab"] if len(letter) == 1]
    for left in [*parts, *(a + b for a in parts[:200] for b in parts[:200])]:
        for right in parts[:30]:
            if len(model["merges"]) < n_words and left in model["vocab"] and left + right not in model["vocab"]:
                model["vocab"][left + right] = len(model["vocab"])
                model["merges"].append([left, right])
    value["added_tokens"] = [added(index, text, special=True) for index, text in enumerate(tiny.SPECIALS)]
    (directory / "tokenizer.json").write_text(json.dumps(value, ensure_ascii=False, **options), encoding="utf-8")
    return len(model["vocab"])


def many_merges(directory: Path) -> int:
    merges = "[" + ",".join(['"a b"'] * 100_000) + "]"
    model = f'{{"type":"BPE","vocab":{{"a":0,"b":1,"ab":2}},"merges":{merges}}}'
    pre = json.dumps({"type": "ByteLevel", "add_prefix_space": False})
    (directory / "tokenizer.json").write_text(f'{{"pre_tokenizer":{pre},"model":{model}}}')
    return 3


def long_tokens(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    n_tokens, text = 60, "x" * 30_000

    def change(value: Any) -> None:
        value["model"]["vocab"] |= {f"{text}{n}": tiny.N_BPE_TOKENS + n for n in range(n_tokens)}

    edit(directory / "tokenizer.json", change)
    return tiny.N_BPE_TOKENS + n_tokens


def escaped_quotes(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    n_tokens, text = 200, '"' * 9_000  # two bytes each in the file

    def change(value: Any) -> None:
        value["model"]["vocab"] |= {f"{text}{n}": tiny.N_BPE_TOKENS + n for n in range(n_tokens)}

    edit(directory / "tokenizer.json", change)
    return tiny.N_BPE_TOKENS + n_tokens


def merges_of_spaces(directory: Path) -> int:
    """Each space becomes a letter of two bytes."""
    vocab = {" " * n: n - 1 for n in range(1, 900)}
    merges = [[" " * n, " " * m] for n in range(1, 450) for m in (1, n // 2 + 1, n)]
    value = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    value["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
    (directory / "tokenizer.json").write_text(json.dumps(value, separators=(",", ":")))
    return len(vocab)


def many_fields(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    edit(directory / "tokenizer.json", lambda value: value["model"].update({f"x{n}": [[]] * 500 for n in range(900)}))
    return tiny.N_BPE_TOKENS


def many_added_tokens(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    n_tokens = 5_000
    tokens = [{"id": tiny.N_BPE_TOKENS + n, "content": f"<{n}>" + "y" * 60} for n in range(n_tokens)]
    edit(directory / "tokenizer.json", lambda value: value["added_tokens"].extend(tokens))
    return tiny.N_BPE_TOKENS + n_tokens


def many_configured_tokens(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    decoder = {str(tiny.N_BPE_TOKENS + n): {"content": f"<{n}>"} for n in range(10_000)}
    edit(
        directory / "tokenizer_config.json", lambda value: value.update(added_tokens_decoder=decoder, x=[[]] * 100_000)
    )
    return tiny.N_BPE_TOKENS + 10_000


def large_companions(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    for name in ("special_tokens_map.json", "generation_config.json"):
        (directory / name).write_text('{"x":[' + ",".join(["[]"] * 100_000) + "]}")
    edit(directory / "tokenizer_config.json", lambda value: value.update(chat_template="t" * 500_000 + "🚀"))
    (directory / "chat_template.jinja").write_text("j" * 900_000 + "🚀")
    return tiny.N_BPE_TOKENS


def deep_companions(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    deep = "[" * 50 + "]" * 50
    (directory / "special_tokens_map.json").write_text('{"x":[' + ",".join([deep] * 2_000) + "]}")
    members = ",".join(f'"{n}":"{n}\U0001f680"' for n in range(87_400))  # one more than their dict had room for
    (directory / "generation_config.json").write_text("{" + members + "}")
    return tiny.N_BPE_TOKENS


def large_parts(directory: Path) -> int:
    tiny.write_bpe(directory, pre="llama-bpe")
    junk = [[]] * 5000
    edit(directory / "tokenizer.json", lambda value: value.update(truncation=junk, post_processor={"x": junk[:3500]}))
    edit(directory / "tokenizer.json", lambda value: value.update(normalizer={"type": "NFC", "map": "m" * 500_000}))
    return tiny.N_BPE_TOKENS


def escaped_text(directory: Path) -> int:
    """A string that is long, and has a quote in each piece of the file."""
    tiny.write_bpe(directory, pre="llama-bpe")
    edit(directory / "tokenizer.json", lambda value: value.update(normalizer={"type": "NFC", "map": '"' * 250_000}))
    return tiny.N_BPE_TOKENS


def sentencepiece_model(directory: Path) -> int:
    n_pieces = 20_000
    pieces = b"".join(_field(1, _field(1, f"▁{n}".encode())) for n in range(n_pieces))
    (directory / "tokenizer.model").write_bytes(pieces)
    return n_pieces + 500


def tekken(directory: Path) -> int:
    return 20 + len(tiny.write_tekken(directory))


def tekken_of_fillers(directory: Path) -> int:
    """Special tokens that the file does not list take rows, and no bytes of it."""
    return 40_000 + len(tiny.write_tekken(directory, n_special=40_000))


def tekken_of_one_letter(directory: Path) -> int:
    """Nearly as many merges as a file may have for its size."""
    tiny.write_tekken(directory)

    def change(value: Any) -> None:
        lengths = range(2, 60)
        longer = [
            {"rank": 254 + n, "token_bytes": tiny.b64encode(b"a" * n).decode(), "x": "y" * 2_000} for n in lengths
        ]
        value["vocab"] = value["vocab"][:256] + longer
        value["config"]["default_vocab_size"] = 20 + len(value["vocab"])

    edit(directory / "tekken.json", change)
    return 500


SHAPES: dict[str, Callable[[Path], int]] = {
    "indented": lambda directory: write_large(directory, 6000, indent=2) + 3000,
    "compact": lambda directory: write_large(directory, 6000, separators=(",", ":")),
    "many merges": many_merges,
    "long tokens": long_tokens,
    "escaped quotes": escaped_quotes,
    "merges of spaces": merges_of_spaces,
    "many fields": many_fields,
    "many added tokens": many_added_tokens,
    "many configured tokens": many_configured_tokens,
    "large companions": large_companions,
    "deep companions": deep_companions,
    "large parts": large_parts,
    "escaped text": escaped_text,
    "tokenizer.model": sentencepiece_model,
    "tekken.json": tekken,
    "tekken.json of fillers": tekken_of_fillers,
    "tekken.json of one letter": tekken_of_one_letter,
    "rows without tokens": lambda directory: (tiny.write_bpe(directory, pre="llama-bpe"), 40_000)[1],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_allocated_is_below_declared(shape: str, tmp_path: Path) -> None:
    n_vocab = SHAPES[shape](tmp_path)
    kept, extra = vocabulary_nbytes(tmp_path, n_vocab)
    tracemalloc.start()
    try:
        vocabulary = read_vocabulary(tmp_path, config={}, n_vocab=n_vocab, default_pre="lfm2", pre=None)
        held, peak = tracemalloc.get_traced_memory()
    except SourceError:
        assert shape == "large parts"  # a bound holds for what is refused as well
        held, peak = 0, tracemalloc.get_traced_memory()[1]
        vocabulary = None
    finally:
        tracemalloc.stop()
    assert held <= kept + (64 << 10)  # and some names and small objects
    assert peak <= kept + extra
    assert vocabulary is None or vocabulary.keys


def short_tokens(directory: Path, n_tokens: int) -> None:
    """As many tokens as a file can have for its size, in ascending order of ids or not."""
    vocab = ",".join(f'"{n:x}":{n}' for n in range(n_tokens))
    pre = json.dumps({"type": "ByteLevel", "add_prefix_space": False})
    model = f'{{"type":"BPE","vocab":{{{vocab}}},"merges":["1 0"]}}'
    (directory / "tokenizer.json").write_text(f'{{"pre_tokenizer":{pre},"model":{model}}}')


@pytest.mark.parametrize("before", range(4))
def test_the_longest_string_is_not_longer_than_found(tmp_path: Path, before: int) -> None:
    """Wherever pieces end: between a backslash and its quote as well."""
    for text in ("x" * 300_001, '"' * 200_001, '\\"' * 100_001, "\\" * 200_000):
        path = tmp_path / "tokenizer.json"
        raw = json.dumps({"a" * before: text, "b": "c"})
        path.write_text(raw)
        longest = _strings_nbytes(path)[2]
        assert len(json.dumps(text)) - 2 <= longest <= len(raw) + 2 * (64 << 10)
    (tmp_path / "tokenizer.json").write_text(json.dumps({str(n): n for n in range(200_000)}))
    assert _strings_nbytes(tmp_path / "tokenizer.json")[2] <= 2 * (64 << 10)


def test_each_row_costs_what_is_declared_for_it(tmp_path: Path) -> None:
    declared, peaks = [], []
    for n_vocab in (15_000, 45_000):  # a dict has just grown at the latter
        short_tokens(tmp_path, n_vocab)
        declared.append(sum(vocabulary_nbytes(tmp_path, n_vocab)))
        tracemalloc.start()
        read_vocabulary(tmp_path, config={}, n_vocab=n_vocab, default_pre=None, pre=None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= declared[1] - declared[0]


def test_declared_is_near_the_real_cost(tmp_path: Path) -> None:
    """A bound that is far too large would refuse machines that suffice."""
    n_vocab = write_large(tmp_path, 6000, indent=2)
    kept, extra = vocabulary_nbytes(tmp_path, n_vocab)
    size = (tmp_path / "tokenizer.json").stat().st_size
    assert kept + extra < 3 * size + 240 * n_vocab + (10 << 20)


def test_nothing_is_declared_for_files_that_are_not_there(tmp_path: Path) -> None:
    assert vocabulary_nbytes(tmp_path / "missing", 0)[0] == 0


PROBE = """
import resource, sys
from pathlib import Path
from streamconv.metadata.vocab import read_vocabulary
directory, n_vocab = Path(sys.argv[1]), int(sys.argv[2])
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
read_vocabulary(directory, config={}, n_vocab=n_vocab, default_pre=None, pre=None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def test_resident_growth_is_below_declared(tmp_path: Path) -> None:
    n_vocab = write_large(tmp_path, 6000, indent=2)
    kept, extra = vocabulary_nbytes(tmp_path, n_vocab)
    command = [sys.executable, "-c", PROBE, str(tmp_path), str(n_vocab)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= kept + extra
