"""The options that a user can give; each is a field of one of the classes below."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from streamconv.budget import default_limit_nbytes, parse_size
from streamconv.errors import Interrupted, UsageError
from streamconv.ggml.outtypes import AUTO, OUTTYPES, WORDS, canonical
from streamconv.options.checking import check_types
from streamconv.options.language import MAKE, Kind, Options, option
from streamconv.timing import Profile, Stopwatch

if TYPE_CHECKING:
    from pathlib import Path

    from streamconv.files.hub import Source
    from streamconv.ggml.mixes import MixOptions
    from streamconv.lora.specs import AdapterSpec
    from streamconv.recipe.registry import RecipeSource

DIALECTS: Final = ("llama.cpp", "ollama-legacy")
TOKENIZERS: Final = ("auto", "base", "adapter")
IO: Final = ("mapped", "positioned")
MMPROJ_OUTTYPES: Final = ("f32", "f16", "bf16", "q8_0")  # of a projector
MAX_DEFAULT_WORKERS: Final = 4


@dataclass(frozen=True, slots=True)
class SourceOptions(Options):
    """The inputs of a call besides its source."""

    adapters: Sequence[AdapterSpec] = option(
        (),
        {
            "convert": "merge this LoRA or DoRA adapter into the weights; may be repeated",
            "verify": "an adapter that was merged, with its weight; may be repeated",
        },
        kind=Kind.ADAPTERS,
        commands=("convert", "verify"),
        flag="--adapter",
        metavar="PATH[=WEIGHT]",
        key="adapter",
    )
    base: Source | None = option(
        None,
        "for an adapter: its base; default: the one that adapter_config.json names, from the cache",
        kind=Kind.SOURCE,
        commands=("verify",),
        metavar="BASE",
        key=None,  # jobs files have their own key for it, also for lora jobs
    )
    scale: float | None = option(
        None,
        {
            "lora": "scale of every module, instead of the configuration's",
            "verify": "for an adapter: the --scale that it was made with",
        },
        kind=Kind.NUMBER,
        commands=("lora", "verify"),
        metavar="S",
    )
    recipes: Sequence[RecipeSource] = option(
        (),
        "Python file with the recipe of an architecture; the file is executed; may be repeated",
        kind=Kind.FILES,
        commands=("convert", "lora", "verify"),
        flag="--recipe",
        metavar="FILE",
        key="recipe",
    )


@dataclass(frozen=True, slots=True)
class SplitOptions(Options):
    """Split a model into several files.

    Attributes:
        max_nbytes: The maximum number of bytes of tensor data in a part; None: no limit.
        max_tensors: The maximum number of tensors in a part; None: no limit.
        only_part: The only part to write, counted from 1; None: all parts.

    Raises:
        UsageError: A value is less than 1, or `only_part` is given without a limit.
    """

    max_nbytes: int | None = option(
        None,
        "at most this much tensor data in a file, such as 4G",
        kind=Kind.SIZE,
        commands=("convert", "quantize"),
        flag="--split-max-size",
        group="split",
        metavar="SIZE",
        key="split_max_size",
    )
    max_tensors: int | None = option(
        None,
        "at most this many tensors in a file",
        kind=Kind.COUNT,
        commands=("convert", "quantize"),
        flag="--split-max-tensors",
        group="split",
        metavar="N",
        key=None,  # a batch creates a job for each part, and supports only splits by size
    )
    only_part: int | None = option(
        None,
        "write only part K (from 1), to divide the parts among machines",
        kind=Kind.COUNT,
        commands=("convert", "quantize"),
        group="split",
        metavar="K",
        key=None,
    )

    def __post_init__(self) -> None:
        check_types(type(self), {one.name: getattr(self, one.name) for one in fields(self)})
        for one in fields(self):
            if (value := getattr(self, one.name)) is not None and value < 1:
                raise UsageError(f"{one.name} is {value}, and must be at least 1", code="split-size")
        if self.only_part is not None and not self.is_split:
            hint = "give --split-max-size or --split-max-tensors too"
            raise UsageError("--only-part needs a split", hint=hint, code="option-conflict")

    @property
    def is_split(self) -> bool:
        return self.max_nbytes is not None or self.max_tensors is not None


@dataclass(frozen=True, slots=True)
class OutputOptions(Options):
    """The options that determine the bytes of an output.

    Raises:
        UsageError: A word is not among the choices of its option, a text is not UTF-8, or options conflict.
    """

    pre: str | None = option(
        None,
        {
            "convert": "name for tokenizer.ggml.pre, for a tokenizer of unknown structure",
            "verify": "the --pre that it was made with",
        },
        kind=Kind.TEXT,
        commands=("convert", "verify"),
        metavar="NAME",
    )
    tokenizer: str = option(
        "auto",
        {
            "convert": "which tokenizer a merged model gets; default: the adapter's, if its tokens fit",
            "verify": "the --tokenizer that it was made with",
        },
        kind=Kind.WORD,
        commands=("convert", "verify"),
        choices=TOKENIZERS,
        hidden=("auto",),
    )
    outtype: str = option(
        "auto",
        {
            "convert": "default: auto, the source's own 16-bit type",
            "lora": "default: auto, each factor's own type",
            "quantize": "the type, by llama-quantize's name",
        },
        kind=Kind.WORD,
        commands=MAKE,
        group="output",
        choices={
            "convert": WORDS,
            "lora": (AUTO, *(row.name for row in OUTTYPES.values() if not row.is_mix)),
            "quantize": ("q8_0", *(row.name for row in OUTTYPES.values() if row.is_mix)),
        },
    )
    dialect: str = option(
        DIALECTS[0],
        {
            "convert": "tensor names; use the default with Ollama too: ollama-legacy is for its first LFM2 release",
            "lora": "use the default with Ollama too: ollama-legacy reproduces the files of its first LFM2 release for "
            "Llama, which do not compute the trained adapter (not with --outtype, --scale or --name)",
            "verify": "the --dialect that it was made with",
        },
        kind=Kind.WORD,
        commands=("convert", "lora", "verify"),
        group="output",
        choices=DIALECTS,
    )
    name: str | None = option(
        None,
        "model name to write, general.name",
        kind=Kind.TEXT,
        commands=("convert", "lora"),
        group="output",
        aliases=("--model-name",),
        metavar="NAME",
        key="general_name",
    )
    imatrix: Source | None = option(
        None,
        {
            "convert": "importance matrix from llama-imatrix: weights errors by the importance of each column",
            "quantize": "importance matrix from llama-imatrix: weights errors by the importance of each column",
            "verify": "the importance matrix that it was made with",
        },
        kind=Kind.SOURCE,
        commands=("convert", "quantize", "verify"),
        group="types",
        metavar="FILE",
    )
    tensor_type: Sequence[str] = option(
        (),
        "type of every tensor whose name the pattern matches anywhere; may be repeated, the first match counts",
        kind=Kind.TEXTS,
        commands=("convert", "quantize"),
        group="types",
        metavar="REGEX=TYPE",
    )
    output_tensor_type: str | None = option(
        None,
        "type of output.weight, or of the embedding if there is no output.weight",
        kind=Kind.TEXT,
        commands=("convert", "quantize"),
        group="types",
        metavar="TYPE",
    )
    token_embedding_type: str | None = option(
        None,
        "type of token_embd.weight",
        kind=Kind.TEXT,
        commands=("convert", "quantize"),
        group="types",
        metavar="TYPE",
    )
    leave_output_tensor: bool = option(
        False, "do not quantise output.weight", commands=("convert", "quantize"), group="types"
    )
    pure: bool = option(
        False, "use the same type for every quantised tensor", commands=("convert", "quantize"), group="types"
    )
    allow_requantize: bool = option(
        False,
        "also quantise tensors that are quantised already, which loses more",
        commands=("quantize",),
        group="types",
        key=None,  # jobs files have no quantize jobs
    )
    mmproj: str | Path | None = option(
        None,
        "file for the projector; default: mmproj-OUT, beside OUT",
        kind=Kind.DESTINATION,
        commands=("convert",),
        group="projector",
        metavar="PATH",
        key=None,  # a batch derives its name from each output
    )
    mmproj_outtype: str | None = option(
        None,
        "type of the projector, and of a detokenizer; default: the outtype if it is one of these, otherwise f16",
        kind=Kind.WORD,
        commands=("convert",),
        group="projector",
        choices=MMPROJ_OUTTYPES,
    )
    no_mmproj: bool = option(False, "write only the text model", commands=("convert",), group="projector")
    split: SplitOptions | None = None

    def __post_init__(self) -> None:
        if self.mmproj_outtype is not None:
            object.__setattr__(self, "mmproj_outtype", canonical(self.mmproj_outtype))
        if self.no_mmproj and self.asks_for_mmproj:
            raise UsageError("--no-mmproj writes no projector", hint="leave it out", code="option-conflict")
        object.__setattr__(self, "outtype", canonical(self.outtype or AUTO))
        self.check_words()
        for text in (self.name, self.pre):
            if text is not None and text != text.encode("utf-8", "replace").decode("utf-8"):
                raise UsageError(f"{text!r} is not UTF-8, as all text in a GGUF file is", code="not-utf8")

    @property
    def asks_for_mmproj(self) -> bool:
        """Whether an option for the projector is given."""
        return self.mmproj is not None or self.mmproj_outtype is not None

    @property
    def writes_others(self) -> bool:
        """Whether files other than the text model are written: not if only a later part of a split is written."""
        return not self.no_mmproj and self.parts.only_part in (None, 1)

    @property
    def mix(self) -> MixOptions:
        """The types of individual tensors that are requested in addition to the outtype.

        Raises:
            UsageError: A type or a pattern is invalid.
        """
        from streamconv.ggml.mixes import MixOptions, parse_override, parse_type

        output, embedding = (
            None if name is None else parse_type(name) for name in (self.output_tensor_type, self.token_embedding_type)
        )
        overrides = tuple(map(parse_override, self.tensor_type))
        return MixOptions(overrides, output, embedding, self.leave_output_tensor, self.pure)

    @property
    def parts(self) -> SplitOptions:
        return self.split or SplitOptions()


@dataclass(frozen=True, slots=True)
class RunOptions(Options):
    """How a call runs; these options do not change the bytes of an output.

    A run continues an unfinished run of the same conversion, unless `restart` discards its work.

    Attributes:
        progress: Called as progress(done, total) from the calling thread, both in bytes. `done` increases from 0 to
            `total`; in a run that also verifies its output it does so a second time, with the size of the compared
            data as `total`.
        cancel: Called between chunks; if it returns true, the run stops as after an interrupt.
        profile: Collects memory over time and the seconds of each phase.

    Raises:
        UsageError: A size or a number of threads is invalid, a word is not among the choices of its option, or options
            conflict.
    """

    force: bool = option(
        False,
        {
            **dict.fromkeys(MAKE, "replace an existing OUT, and files beside it, once the new file is complete"),
            "verify": "replace an existing plot",
        },
        group="output",
        changes_bytes=False,
    )
    modelfile: bool = option(
        False, "also write a Modelfile for Ollama beside OUT", commands=MAKE, group="output", changes_bytes=False
    )
    resume: bool = option(
        False,
        "continue an unfinished run of the same conversion; the default",
        commands=MAKE,
        group="run",
        key=None,  # of a batch as a whole
        changes_bytes=False,
    )
    restart: bool = option(
        False,
        "discard an unfinished run of the same conversion and start over",
        commands=MAKE,
        group="run",
        key=None,
        changes_bytes=False,
    )
    dry_run: bool = option(
        False,
        "print sizes, types and the memory proof; write nothing",
        commands=MAKE,
        group="run",
        key=None,
        changes_bytes=False,
    )
    verify: bool = option(
        False,
        "read the result back and compare it with the source",
        commands=MAKE,
        group="run",
        changes_bytes=False,
    )
    error: bool = option(
        False,
        "measure instead of comparing: the relative RMS error of each tensor against the source, worst first",
        commands=("verify",),
        key=None,
        changes_bytes=False,
    )
    plot: str | Path | None = option(
        None,
        "plot these errors to a PNG file; needs the plot extra",
        kind=Kind.DESTINATION,
        commands=("verify",),
        metavar="FILE",
        key=None,
        changes_bytes=False,
    )
    sha256: bool = option(
        False,
        "print the digest of the file, and write a manifest with one for each tensor",
        commands=MAKE,
        group="run",
        changes_bytes=False,
    )
    profile: Profile | None = option(
        None,
        "write memory over time and seconds by phase as JSON",
        kind=Kind.DESTINATION,
        commands=MAKE,
        group="run",
        metavar="FILE",
        key=None,
        changes_bytes=False,
    )
    max_memory: int | str | None = option(
        None,
        "limit on resident memory, such as 96MiB or 1.5G; default: 256MiB",
        kind=Kind.SIZE,
        group="run",
        metavar="SIZE",
        changes_bytes=False,
    )
    threads: int | None = option(
        None,
        "worker threads; default: one per core, at most 4",
        kind=Kind.COUNT,
        group="run",
        metavar="N",
        changes_bytes=False,
    )
    io: str | None = option(
        None,
        "how sources are read; default: mapped from local files, positioned from others",
        kind=Kind.WORD,
        commands=MAKE,
        group="run",
        choices=IO,
        changes_bytes=False,
    )
    progress: Callable[[int, int], None] | None = option(
        None, "called as progress(done, total), in bytes", flag=None, key=None, changes_bytes=False
    )
    cancel: Callable[[], bool] | None = option(
        None, "called between chunks; stops the run when it returns true", flag=None, key=None, changes_bytes=False
    )

    def __post_init__(self) -> None:
        self.check_words()
        limit = self.max_memory
        if limit is None:  # determined now, because it depends on the resident memory before the run
            limit = default_limit_nbytes()
        elif isinstance(limit, str):
            limit = parse_size(limit)
        object.__setattr__(self, "max_memory", limit)
        if self.threads is not None and self.threads < 1:
            hint = "a whole number from 1, or None for the cores"
            raise UsageError(f"threads is {self.threads}", hint=hint, code="threads-range")
        if self.resume and self.restart:
            raise UsageError(
                "resume continues an earlier run, restart discards it: they exclude each other", code="option-conflict"
            )

    @property
    def limit_nbytes(self) -> int:
        assert isinstance(self.max_memory, int)
        return self.max_memory

    @property
    def n_threads(self) -> int:
        return min(MAX_DEFAULT_WORKERS, _n_cores()) if self.threads is None else self.threads

    @property
    def stopwatch(self) -> Stopwatch:
        return self.profile or Stopwatch()

    def cancelled(self) -> Interrupted | None:
        """Return the error to raise if the caller requests that the run stops, else None."""
        if self.cancel is not None and self.cancel():
            return Interrupted("cancelled", hint="run it again to continue", code="cancelled")
        return None


GROUPS: Final = (SourceOptions, OutputOptions, SplitOptions, RunOptions)


def _n_cores() -> int:
    """Return the number of cores that this process may use; all cores on systems without affinity, such as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
