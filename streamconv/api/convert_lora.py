"""Convert a LoRA adapter to a GGUF adapter: open -> match with the base -> plan -> stream -> seal.

Chooses the keys and tensors to write, and one alpha for all modules. With s = alpha / rank, as llama.cpp computes it,
s * lora_b @ lora_a is always the trained change of the base's tensor, in that tensor's row order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUFValueType

from streamconv.api.run import run
from streamconv.budget import Budget
from streamconv.engine.job import Job
from streamconv.engine.layout import PlacedTensor, memory_failures
from streamconv.engine.split import make_parts
from streamconv.errors import RunWarning, UsageError
from streamconv.files.hub import Source, model_name, source_failures
from streamconv.files.local import noting_files
from streamconv.ggml.mixes import ModelFacts
from streamconv.ggml.outtypes import AUTO, OUTTYPES
from streamconv.ggml.policy import OuttypePolicy, StoredTypes, TensorRole, TypePolicy
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.gguf.names import LLAMA_CPP, OLLAMA_LEGACY
from streamconv.lazy.leaves import sources
from streamconv.lora.base import BaseModel
from streamconv.lora.config import read_lora_config
from streamconv.lora.files import LoraFile
from streamconv.lora.fold import MAX_SCALE, Pair, fold
from streamconv.lora.ollama import legacy_adapter, legacy_problems
from streamconv.lora.open_base import open_base, stated_source
from streamconv.lora.resolve import LoraModule, Resolved, refuse, resolve
from streamconv.metadata.modelcard import read_general
from streamconv.options import OutputOptions, RunOptions, find, not_a_choice, public
from streamconv.output.destination import output_path
from streamconv.recipe.registry import RecipeSource, identity_of, using_recipes
from streamconv.report import Report
from streamconv.timing import Profile

FACTOR_NBYTES = 4 << 10  # memory of a stored factor, with its module, its nodes and its entry in the file


@public("lora")
@noting_files()
@memory_failures()
def convert_adapter(
    adapter: Source,
    base: Source | None = None,
    dst: str | Path | None = None,
    *,
    scale: float | None = None,
    recipes: Sequence[RecipeSource] = (),
    outtype: str = "auto",
    dialect: str = LLAMA_CPP,
    name: str | None = None,
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
    """Convert a PEFT or MLX adapter to a GGUF adapter for a base model. Nothing is printed.

    Args:
        adapter: the folder with adapter_config.json and the weights, or the file of weights.
        base: a GGUF file or a Hugging Face folder; its weights are not read. By default the base that the adapter's
            configuration names, from the Hugging Face cache.
        dst: the file to write; by default named by GGUF's convention, in the current directory.
        {options}

    Returns:
        A report on the written file; with `dry_run`, on the planned one, with the proof that it fits in memory.

    Raises:
        StreamconvError: with a stable `code`; `dst` is then unchanged.
        Exception: exceptions from `progress` or `cancel`, and KeyboardInterrupt, pass through unchanged.
    """
    options, wanted = RunOptions.of(locals()), OutputOptions.of(locals())
    if wanted.outtype != AUTO and OUTTYPES[wanted.outtype].is_mix:
        raise not_a_choice(find("outtype"), outtype, command="lora")
    _check_legacy(dialect, {"--outtype": None if outtype == "auto" else outtype, "--scale": scale, "--name": name})
    with using_recipes(recipes):
        budget = Budget(options.limit_nbytes, compares=options.verify)
        with open_adapter_job(adapter, base, dst, wanted, budget, scale) as job:
            return run(job, options, budget)


@contextmanager
def open_adapter_job(
    adapter: Source,
    base: Source | None,
    dst: str | Path | None,
    wanted: OutputOptions,
    budget: Budget,
    scale: float | None = None,
    stored: StoredTypes | None = None,
) -> Iterator[Job]:
    """Yield the job that writes an adapter as a separate file, while its weights are open."""
    with LoraFile.open(adapter, budget) as source:
        facts = open_base(stated_source(source.config) if base is None else base, budget)
        budget.reserve("plan", FACTOR_NBYTES * len(source.shard.tensors), file=source.directory)
        yield plan_adapter(source, facts, dst, wanted, scale, stored)


@source_failures()
def plan_adapter(
    source: LoraFile,
    base: BaseModel,
    dst: str | Path | None,
    wanted: OutputOptions,
    scale: float | None,
    stored: StoredTypes | None = None,
) -> Job:
    """Plan the output: everything that determines its bytes. Factors are read only to check that a fold is exact.

    Args:
        source: the open adapter.
        base: the open base.
        dst: the file to write, or None for the default name.
        wanted: the options of the output.
        scale: the scale of every module, if the user passed one.
        stored: the types in the file to compare with, which replace the outtype.

    Raises:
        SourceError: the adapter cannot be converted; the error lists all problems.
        UsageError: the options contradict each other.
    """
    _check_legacy(wanted.dialect, {"--scale": scale})
    if scale is not None and not abs(scale) <= MAX_SCALE:
        raise UsageError(f"--scale {scale} must be a number of at most {MAX_SCALE:g}", code="scale-range")
    config = read_lora_config(source.config, scale)
    resolved = resolve(source, base, config)
    resolved.problems += source.unsaved(base.recipe, is_tied=bool(base.is_tied))
    if wanted.dialect == OLLAMA_LEGACY:
        return _plan_legacy(source, base, resolved, dst, wanted, stored)
    return _plan(source, base, resolved, dst, wanted, stored, config.invocation_tokens)


def _plan(
    source: LoraFile,
    base: BaseModel,
    resolved: Resolved,
    dst: str | Path | None,
    wanted: OutputOptions,
    stored: StoredTypes | None,
    invocation_tokens: Sequence[int],
) -> Job:
    folded = fold(resolved.sound, base.model)
    refuse([*resolved.problems, *folded.problems], source, base)
    # gguf's heuristics for names such as my-1B-lora need the size of the matrices that an adapter changes.
    specs = [(pair.target, pair.changed) for pair in folded.pairs]
    general = read_general(source.directory, arch=base.recipe.arch, name=wanted.name, specs=specs, kind="adapter")
    policy = stored or (None if wanted.outtype == "auto" else OuttypePolicy(wanted.outtype))
    tensors = _place([factor for pair in folded.pairs for factor in _factors(pair)], base.recipe.arch, policy)
    outtype = wanted.outtype if wanted.outtype != "auto" else _outtype(tensors)
    path = output_path(dst, general.file_name(outtype, "LoRA"), name=model_name(source.directory), outtype=outtype)
    keys = [*general.keys, *_adapter_keys(folded.alpha, invocation_tokens), *base.keys]
    return Job(
        command="lora",
        role="adapter",
        keys=keys,
        parts=make_parts(path, keys, tensors, wanted.parts),
        architecture=base.recipe.arch,
        dialect=LLAMA_CPP,
        outtype=outtype,
        shards=(source.shard,),
        configs=(source.config,),
        base=base.path,
        base_template=base.template,
        options={
            "outtype": wanted.outtype,
            "dialect": LLAMA_CPP,
            "base and scales": _digest(folded.pairs),
            **identity_of(base.model.recipe),
        },
        warnings=[*resolved.warnings, *general.warnings, *_switched_off(resolved.modules)],
    )


def _plan_legacy(
    source: LoraFile,
    base: BaseModel,
    resolved: Resolved,
    dst: str | Path | None,
    wanted: OutputOptions,
    stored: StoredTypes | None,
) -> Job:
    """The job of an ollama-legacy file, which accepts no options that Ollama's converter lacks."""
    refuse([*resolved.problems, *legacy_problems(base, resolved.sound, source.config)], source, base)
    legacy = legacy_adapter(base, resolved.modules, source.factors, source.config)
    general = read_general(source.directory, arch=base.recipe.arch, name=None, specs=(), kind="adapter")
    own = [PlacedTensor(one.target, one.tensor, (one.source,), one.type) for one in legacy.tensors]
    tensors = _place(own, base.recipe.arch, stored)
    path = output_path(dst, general.file_name("f16", "LoRA"), name=model_name(source.directory), outtype="f16")
    return Job(
        command="lora",
        role="adapter",
        keys=legacy.keys,
        parts=make_parts(path, legacy.keys, tensors, wanted.parts),
        architecture=base.recipe.arch,
        dialect=OLLAMA_LEGACY,
        outtype=_outtype(tensors) if stored else "f16",
        shards=(source.shard,),
        configs=(source.config,),
        base=base.path,
        base_template=base.template,
        options={"dialect": OLLAMA_LEGACY, "heads": str(base.dims.get("A")), **identity_of(base.model.recipe)},
        warnings=[*resolved.warnings, *legacy.warnings],
    )


def _check_legacy(dialect: str, options: Mapping[str, object]) -> None:
    """Raise UsageError for an option that Ollama's converter does not have."""
    given = [option for option, value in options.items() if value is not None]
    if dialect == OLLAMA_LEGACY and given:
        raise UsageError(
            f"{given[0]} cannot be combined with --dialect {OLLAMA_LEGACY}, which writes exactly what Ollama wrote",
            code="option-conflict",
        )


def _outtype(tensors: Sequence[PlacedTensor]) -> str:
    """The one type of all tensors, or "mixed"."""
    types = {tensor.type.name.lower() for tensor in tensors}
    return types.pop() if len(types) == 1 else "mixed"


def _factors(pair: Pair) -> Iterator[PlacedTensor]:
    """Both factors of a pair, each in a type that holds it exactly."""
    for target, tensor, own_type in (
        (f"{pair.target}.lora_a", pair.a, pair.a_type),
        (f"{pair.target}.lora_b", pair.b, pair.b_type),
    ):
        yield PlacedTensor(target, tensor, tuple(source.name for source in sources(tensor)), own_type)


def _place(tensors: Sequence[PlacedTensor], arch: str, policy: TypePolicy | None) -> list[PlacedTensor]:
    """The tensors in the types that `policy` chooses; without one, in their own."""
    if policy is None:
        return list(tensors)
    types = policy.choose([TensorRole(one.target, one.rows.spec.shape) for one in tensors], ModelFacts(arch))
    return [replace(one, type=type_) for one, type_ in zip(tensors, types, strict=True)]


def _switched_off(modules: Sequence[LoraModule]) -> Iterator[RunWarning]:
    off = [module for module in modules if module.scale == 0]
    if off:
        where = f"{off[0].name} and {len(off) - 1} more" if len(off) > 1 else off[0].name
        message = f"the scale of {where} is 0 (off): written as zeros, since llama.cpp treats alpha 0 as full strength"
        yield RunWarning("scale-zero", message)


def _digest(pairs: Sequence[Pair]) -> str:
    """A digest of the properties of base and configuration that determine bytes but appear in no header."""
    return hashlib.sha256("\n".join(pair.origin for pair in pairs).encode()).hexdigest()


def _adapter_keys(alpha: float, invocation_tokens: Sequence[int]) -> Iterator[KeyValue]:
    """The keys of an adapter that llama.cpp's runtime reads, besides its architecture."""
    yield KeyValue.string("adapter.type", "lora")
    yield KeyValue.f32("adapter.lora.alpha", alpha)
    if invocation_tokens:
        array = PackedArray.of_numbers(GGUFValueType.UINT32, invocation_tokens)
        yield KeyValue.array("adapter.alora.invocation_tokens", array)
