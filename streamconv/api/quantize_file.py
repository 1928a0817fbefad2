"""Convert a GGUF file, or a split set, to another type, as llama-quantize does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gguf.constants import GGMLQuantizationType, GGUFValueType

from streamconv.api.convert_model import SOURCE_NBYTES, TARGET_NBYTES, open_imatrix, require_importance
from streamconv.api.run import run
from streamconv.budget import Budget
from streamconv.engine.job import Job
from streamconv.engine.layout import PlacedTensor, memory_failures
from streamconv.engine.split import make_parts
from streamconv.errors import RunWarning, SourceError, UsageError
from streamconv.files.hub import Source, find_source
from streamconv.files.local import noting_files
from streamconv.ggml.blocks import BLOCK_TYPES
from streamconv.ggml.dequantise import Dequantise, is_decodable
from streamconv.ggml.element_types import TYPES
from streamconv.ggml.imatrix import ImportanceMatrix
from streamconv.ggml.mix_rules import choice_warnings, choose_types
from streamconv.ggml.mixes import MIXES, MixedTensor, ModelFacts
from streamconv.ggml.outtypes import AUTO, OUTTYPES
from streamconv.ggml.policy import StoredTypes, outtype_hint
from streamconv.gguf.entries import Span, refuse
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.gguf.reader import GGUFFile
from streamconv.gguf.shard import GGUFShard
from streamconv.gguf.splits import GGUFSet
from streamconv.lazy.dtype import FLOATS
from streamconv.lazy.leaves import Source as StoredRows
from streamconv.lazy.node import LazyTensor, TensorSpec
from streamconv.options import OutputOptions, RunOptions, SplitOptions, public
from streamconv.output.destination import output_path
from streamconv.report import Report
from streamconv.timing import Profile

# Keys that describe only the input file.
_DROPPED = ("split.", "quantize.imatrix.", "general.file_type", "general.quantization_version", "general.alignment")
_TYPE_ENDING = re.compile(rf"[-.](?:{'|'.join(OUTTYPES)})$", re.IGNORECASE)
_VERSION = 2  # general.quantization_version, GGML_QNT_VERSION


@public("quantize")
@noting_files()
@memory_failures()
def quantize(
    src: Source,
    dst: str | Path | None = None,
    *,
    outtype: str = "auto",
    imatrix: Source | None = None,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    leave_output_tensor: bool = False,
    pure: bool = False,
    allow_requantize: bool = False,
    split: SplitOptions | None = None,
    force: bool = False,
    modelfile: bool = False,
    resume: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    sha256: bool = False,
    profile: Profile | None = None,
    max_memory: int | str | None = None,
    threads: int | None = None,
    io: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Report:
    """Convert a GGUF file to another type. Nothing is printed.

    Args:
        src: the GGUF file, or the first part of a split.
        dst: the file to write; by default named after `src`, with the outtype.
        {options}

    Returns:
        A report on the written file; with `dry_run`, on the planned one, with the proof that it fits in memory.

    Raises:
        StreamconvError: with a stable `code`; `dst` is then unchanged.
        Exception: exceptions from `progress` or `cancel`, and KeyboardInterrupt, pass through unchanged.
    """
    options, wanted = RunOptions.of(locals()), OutputOptions.of(locals())
    if wanted.outtype == AUTO:
        raise UsageError("no outtype was given", hint="name one with --outtype, such as q4_k_m", code="word-unknown")
    if wanted.outtype not in MIXES:
        raise UsageError(
            f"outtype {outtype!r} is not one of {', '.join(MIXES)}",
            hint=outtype_hint(outtype, MIXES),
            code="word-unknown",
        )
    budget = Budget(options.limit_nbytes, compares=options.verify)
    with open_imatrix(imatrix, budget) as importance, GGUFSet.open(find_source(src), budget) as files:
        return run(plan_quantized(files, dst, wanted, budget, importance), options, budget)


def plan_quantized(
    files: GGUFSet,
    dst: str | Path | None,
    wanted: OutputOptions,
    budget: Budget,
    imatrix: ImportanceMatrix | None = None,
    stored: StoredTypes | None = None,
) -> Job:
    """Plan the output: everything that determines its bytes. No weights are read.

    Args:
        files: the parts of the input.
        dst: the file to write, or None for the default name.
        wanted: the options of the output.
        budget: the memory that the run may take.
        imatrix: the importance matrix, if there is one.
        stored: the types in the file to compare with, which replace the outtype.

    Raises:
        SourceError: a file is damaged, or has a type that is quantised again only with `allow_requantize`.
    """
    own, facts = read_model(files)
    first = files.files[0]
    shards = {file.path: GGUFShard(file) for file in files.files}
    keys = list(_keys(first, budget))
    warnings: list[RunWarning] = []
    if stored is not None:
        outtype, file_type, types = stored.outtype, stored.file_type, {one.name: stored.of(one) for one in own}
    else:
        outtype, file_type = wanted.outtype, int(MIXES[wanted.outtype].file_type)
        choices = choose_types(MIXES[outtype], own, facts, options=wanted.mix, has_importance=imatrix is not None)
        types = {name: choice.type for name, choice in choices.items()}
        warnings += choice_warnings(choices, wanted.mix)
    warnings += imatrix.check({one.name: one.shape for one in own}) if imatrix else ()
    budget.reserve("plan", (SOURCE_NBYTES + TARGET_NBYTES) * len(own), file=first.path)
    tensors = []
    for one in own:
        file, tensor = files.tensors[one.name]
        type_ = types[one.name]
        spec = TensorSpec(one.shape, TYPES[one.type].dtype)
        rows: LazyTensor = StoredRows(one.name, shards[file.path], tensor.offset, spec)
        if type_ != one.type and spec.dtype not in FLOATS:
            if not is_decodable(one.type):
                raise _not_numbers(one, file)
            if stored is None and not wanted.allow_requantize:
                raise _requantised(one, file)
            rows = Dequantise(rows, one.type)
        weights = imatrix.columns(one.name, one.shape) if imatrix and type_ in BLOCK_TYPES else None
        tensors.append(PlacedTensor(one.name, rows, (one.name,), type_, weights))
    if stored is None:
        require_importance(outtype, tensors)
    keys += [KeyValue.u32("general.quantization_version", _VERSION), KeyValue.u32("general.file_type", file_type)]
    keys += imatrix.metadata() if imatrix else ()
    name = _model_name(Path(str(first.path)).stem)
    path = output_path(dst, f"{name}-{outtype.upper()}.gguf", name=name, outtype=outtype)
    return Job(
        command="quantize",
        keys=keys,
        parts=make_parts(path, keys, tensors, wanted.parts),
        architecture=facts.architecture,
        dialect=wanted.dialect,
        outtype=outtype,
        shards=tuple(shards.values()),
        configs=(),
        options={
            "outtype": outtype,
            "types": str(wanted.mix),
            "imatrix": imatrix.fingerprint if imatrix else "",
        },
        warnings=warnings,
    )


def read_model(files: GGUFSet) -> tuple[list[MixedTensor], ModelFacts]:
    """A model's tensors and facts, as its files state them. SourceError where they are damaged, or not a model's."""
    refuse(files.problems)
    first = files.files[0]
    if first.scalar("general.architecture", str) is None or first.scalar("general.type", str) == "adapter":
        raise SourceError("is not a model", file=first.path, hint="give the model's own GGUF file", code="not-a-model")
    tensors = [
        MixedTensor(name, one.shape, _type_of(one.type, file, name)) for name, (file, one) in files.tensors.items()
    ]
    return tensors, ModelFacts.of_keys(lambda name: entry.value if (entry := first.keys.get(name)) else None)


def _model_name(stem: str) -> str:
    """A file's name without its type and part number: Name for Name-BF16-00001-of-00003."""
    return _TYPE_ENDING.sub("", re.sub(r"-\d{5}-of-\d{5}$", "", stem)) or stem


def _type_of(type_: GGMLQuantizationType | None, file: GGUFFile, name: str) -> GGMLQuantizationType:
    if type_ is None:
        raise SourceError("has an unknown type", file=file.path, tensor=name, code="type-unknown")
    return type_


def _requantised(one: MixedTensor, file: GGUFFile) -> SourceError:
    """The error for a tensor that is already quantised."""
    message = f"is already {one.type.name}; quantising it again loses more than quantising the original"
    hint = "quantise the F16 or BF16 file, or pass --allow-requantize"
    return SourceError(message, file=file.path, tensor=one.name, hint=hint, code="requantize")


def _not_numbers(one: MixedTensor, file: GGUFFile) -> SourceError:
    """The error for a matrix of a type that only stays as it is, such as integers."""
    message = f"is {one.type.name}, which cannot be converted to another type"
    hint = "only floating-point and quantised weights can be quantised"
    return SourceError(message, file=file.path, tensor=one.name, hint=hint, code="type-unreadable")


def _keys(file: GGUFFile, budget: Budget) -> Iterator[KeyValue]:
    """The keys that are kept; arrays are copied as bytes."""
    kept = [key for key in file.keys.values() if not key.name.startswith(_DROPPED)]
    needed = 2 * sum(key.value.nbytes for key in kept if isinstance(key.value, Span))  # and once more in the header
    budget.reserve("keys", needed, file=file.path)
    for key in kept:
        if not isinstance(key.value, Span):
            yield KeyValue(key.name, key.type, key.value)
        elif key.type == GGUFValueType.STRING:
            yield KeyValue.string(key.name, str(key.value.first(1)[0]))
        else:
            payload = bytearray(key.value.nbytes)
            file.file.read_into(key.value.offset, payload)
            yield KeyValue.array(key.name, PackedArray(key.value.element, key.value.length, payload))
