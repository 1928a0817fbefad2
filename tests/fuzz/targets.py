"""What is fuzzed: each target puts a case's files into a folder, calls the library on them, and returns.

A target lets the library's exceptions pass, so anything but a StreamconvError is a finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from streamconv.api.convert_lora import plan_adapter
from streamconv.api.convert_model import convert
from streamconv.api.inspect_file import inspect
from streamconv.batch.jobs_file import read_jobs
from streamconv.batch.run import expand_splits
from streamconv.budget import MIB, Budget
from streamconv.checkpoint.folder import Checkpoint
from streamconv.cli.inspection import render
from streamconv.errors import SourceError, StreamconvError
from streamconv.ggml.imatrix import ImportanceMatrix
from streamconv.gguf.entries import Span
from streamconv.gguf.splits import GGUFSet
from streamconv.lora.files import LoraFile
from streamconv.lora.open_base import open_base
from streamconv.metadata.modelcard import read_general
from streamconv.metadata.vocab import read_vocabulary, vocabulary_nbytes
from streamconv.options import OutputOptions
from streamconv.output import journal
from streamconv.output.destination import resolve
from streamconv.output.sink import Sink
from streamconv.recipe.bind import bind
from streamconv.recipe.draft import draft
from streamconv.recipe.registry import find_recipe

LIMIT_NBYTES = 64 * MIB
N_VOCAB = 64
N_TEKKEN = 300
OUTPUT_NBYTES = 8192
IMPORTANCES = {"blk.0.attn_q.weight": (3, 8), "blk.1.ffn_down_exps.weight": (2, 3, 12)}

Call = Callable[[Path], None]


def check_checkpoint(directory: Path) -> None:
    """config.json, headers and index, held against a recipe; the keys that follow."""
    with Checkpoint.open(directory, budget=Budget(LIMIT_NBYTES)) as checkpoint:
        config = checkpoint.config
        model = bind(find_recipe(config), config, checkpoint.tensors)
        assert model.keys()
        for target in model.targets:
            assert target.tensor.spec.nbytes >= 0


def check_vocabulary(directory: Path) -> None:
    """tokenizer.json, tokenizer.model and their companions."""
    vocabulary_nbytes(directory, N_VOCAB)
    found = read_vocabulary(directory, config={"eos_token_id": 2}, n_vocab=N_VOCAB, default_pre="lfm2", pre=None)
    assert found.keys


def check_tekken(directory: Path) -> None:
    """tekken.json alone. It has a token for each byte, so there are more rows."""
    vocabulary_nbytes(directory, N_TEKKEN)
    assert read_vocabulary(directory, config={}, n_vocab=N_TEKKEN, default_pre="tekken", pre=None).keys


def check_plan(directory: Path) -> None:
    """Everything that a conversion reads before weights, the model card and generation_config.json among it."""
    convert(directory, directory / "out.gguf", dry_run=True, max_memory=1 << 40)


def check_inspect(directory: Path) -> None:
    found = inspect(directory)
    json.dumps(found.to_json(), allow_nan=False)
    for line in render(found, tensors=True):
        assert line.isprintable()


def check_draft(directory: Path) -> None:
    compile(draft(directory), "draft", "exec")


def check_card(directory: Path) -> None:
    general = read_general(directory, arch="lfm2", name=None, specs=())
    name = general.file_name("bf16")
    assert name.isprintable() and "/" not in name and len(name.encode("utf-8", "surrogatepass")) < 1024


def check_gguf(directory: Path) -> None:
    path = _first(directory, "*.gguf")
    with GGUFSet.open(path) as found:
        for file in found.files:
            for key in file.keys.values():
                if isinstance(key.value, Span):
                    key.value.first(3)
    open_base(path, Budget(LIMIT_NBYTES))


def check_gguf_inspect(directory: Path) -> None:
    check_inspect(_first(directory, "*.gguf"))


def check_imatrix(directory: Path) -> None:
    """Importances of both forms, each entry asked for in the shape that it has in a valid file."""
    with ImportanceMatrix.open(_first(directory, "imatrix*")) as matrix:
        matrix.check(IMPORTANCES)
        for name, shape in IMPORTANCES.items():
            for i in range(shape[0] if len(shape) > 2 else 1):
                found = matrix.weights(name, shape, i)
                assert found is None or (found.shape == shape[-1:] and (found >= 0).all())
        assert matrix.metadata()


_BASES = Path(__file__).parent / "bases"


def check_adapter(directory: Path) -> None:
    """adapter_config.json and the adapter's tensors, on the base that the case is of."""
    base = open_base(_BASES / "llama.gguf", Budget(LIMIT_NBYTES))
    with LoraFile.open(directory, Budget(LIMIT_NBYTES)) as adapter:
        plan_adapter(adapter, base, directory / "out.gguf", OutputOptions(), None)


def check_jobs(directory: Path) -> None:
    for path in directory.iterdir():
        if path.suffix in (".toml", ".jsonl") and b"*" not in path.read_bytes():  # a glob may walk the whole disk
            list(expand_splits(read_jobs(path)))


def check_journal(directory: Path) -> None:
    """A journal beside a part file of the right size, which the next run takes up."""
    path = _first(directory, "*.journal")
    journal.read(path)
    dst = directory / "out.gguf"
    part = dst.with_name("out.gguf.part")
    path.rename(part.with_name("out.gguf.part.journal"))
    with part.open("wb") as file:
        file.truncate(OUTPUT_NBYTES)
    with Sink.create(resolve(dst), OUTPUT_NBYTES, identity={"seed": "7"}) as sink:
        assert 0 <= sink.resumed_nbytes <= OUTPUT_NBYTES
        raise SourceError("leave", code="leave")


def _first(directory: Path, pattern: str) -> Path:
    path = next(iter(sorted(directory.glob(pattern))), None)
    if path is None:
        raise StreamconvError("the mutation removed the file", code="removed")
    return path


# Target -> its corpus folder and its call.
TARGETS: dict[str, tuple[str, Call]] = {
    "checkpoint": ("checkpoint", check_checkpoint),
    "vocabulary": ("vocabulary", check_vocabulary),
    "tekken": ("tekken", check_tekken),
    "gguf": ("gguf", check_gguf),
    "adapter": ("adapter", check_adapter),
    "jobs": ("jobs", check_jobs),
    "journal": ("journal", check_journal),
    "card": ("card", check_card),
    "plan": ("plan", check_plan),
    "inspect-gguf": ("gguf", check_gguf_inspect),
    "inspect-checkpoint": ("plan", check_inspect),
    "inspect-adapter": ("adapter", check_inspect),
    "draft": ("plan", check_draft),
    "imatrix": ("imatrix", check_imatrix),
}
