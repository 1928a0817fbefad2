"""A Hugging Face checkpoint becomes a GGUF file: open -> plan -> stream -> seal. A reader starts here.

The checkpoint's headers say what there is, the architecture's recipe what it becomes, the layout where each byte of the
output lies; `job.run` then makes those bytes, a chunk at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from streamconv.binding import bind
from streamconv.checkpoint import Checkpoint
from streamconv.dialects import LLAMA_CPP, RENAMES, written_name
from streamconv.errors import BudgetError, UsageError
from streamconv.gguf_format import KeyValue
from streamconv.graph import sources
from streamconv.job import Job, RunKeywords, RunOptions
from streamconv.memory import MIB, resident_nbytes
from streamconv.modelcard import read_general
from streamconv.outtypes import FILE_TYPES, OUTTYPES, check_scale, choose_type, resolve_auto
from streamconv.plan import RUN_OVERHEAD_NBYTES, make_layout
from streamconv.recipe import Config, Model, find_recipe
from streamconv.report import Report
from streamconv.run import run
from streamconv.vocab import Vocabulary, read_vocabulary, vocabulary_nbytes


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    outtype: str = "auto",
    dialect: str = LLAMA_CPP,
    name: str | None = None,
    pre: str | None = None,
    **keywords: Unpack[RunKeywords],
) -> Report:
    """What was written to `dst`: the checkpoint in the directory `src` as one GGUF file.

    dst: by default GGUF's naming convention, in the current directory. outtype: auto, f32, f16, bf16 or q8_0.
    name, pre: override general.name and tokenizer.ggml.pre. keywords: how the run goes, see `RunKeywords`.
    Raises StreamconvError alone; then `dst` is what it was before. Nothing is printed.
    """
    options = RunOptions(**keywords)
    with Checkpoint.open(Path(src), max_header_nbytes=options.limit_nbytes) as checkpoint:
        config = Config(checkpoint.config, checkpoint.directory / "config.json")
        model = bind(find_recipe(config), config, checkpoint.tensors)
        job = plan(checkpoint, model, dst, outtype, dialect, name, pre, options.limit_nbytes)
        return run(job, options)


def plan(
    checkpoint: Checkpoint,
    model: Model,
    dst: str | Path | None,
    outtype: str,
    dialect: str,
    name: str | None,
    pre: str | None,
    limit_nbytes: int,
) -> Job:
    """Everything that decides the output's bytes; headers and vocabulary are read, and no weight."""
    for value, choices in ((outtype, ("auto", *OUTTYPES)), (dialect, tuple(RENAMES))):
        if value not in choices:
            raise UsageError(f"{value!r} is none of {', '.join(choices)}")
    if outtype == "auto":
        outtype = resolve_auto(tensor.spec for tensor in checkpoint.lazy_tensors())
    general = read_general(
        checkpoint.directory,
        arch=model.recipe.arch,
        name=name,
        specs=[(target.name, target.tensor.spec) for target in model.targets],
    )
    vocabulary = _bounded_vocabulary(checkpoint, model, pre, limit_nbytes)
    keys = [
        *general.keys,
        KeyValue.u32("general.file_type", FILE_TYPES[OUTTYPES[outtype]]),
        *model.keys(),
        *vocabulary.keys,
    ]
    tensors = []
    for target in model.targets:
        type_ = choose_type(target.name, target.tensor.spec.shape, outtype)
        check_scale(target.name, target.tensor, type_)
        names = tuple(source.name for source in sources(target.tensor))
        tensors.append((written_name(target.name, dialect), target.tensor, names, type_))
    return Job(
        command="convert",
        dst=Path(dst) if dst is not None else Path(general.file_name(outtype)),
        keys=keys,
        layout=make_layout(keys, tensors),
        architecture=model.recipe.arch,
        dialect=dialect,
        outtype=outtype,
        shards=checkpoint.shards,
        options={"outtype": outtype, "dialect": dialect},
        cautions=[*model.cautions, *general.cautions, *vocabulary.cautions],
    )


def _bounded_vocabulary(checkpoint: Checkpoint, model: Model, pre: str | None, limit_nbytes: int) -> Vocabulary:
    """The tokenizer's keys, once it is certain that parsing them fits; BudgetError before anything is parsed else."""
    n_vocab = model.dims["V"]
    kept, extra = vocabulary_nbytes(checkpoint.directory, n_vocab)
    # The keys are held twice for a moment: as they were parsed, and in the header.
    needed = resident_nbytes()[0] + 2 * kept + extra + RUN_OVERHEAD_NBYTES
    if needed > limit_nbytes:
        raise BudgetError(
            f"--max-memory {limit_nbytes / MIB:.0f} MiB is too small: the tokenizer needs {-(-needed // MIB)} MiB",
            file=checkpoint.directory,
            hint=f"--max-memory {-(-needed // MIB)}MiB",
        )
    return read_vocabulary(
        checkpoint.directory, config=model.config.raw, n_vocab=n_vocab, default_pre=model.recipe.default_pre, pre=pre
    )
