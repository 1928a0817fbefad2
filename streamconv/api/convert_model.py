"""Convert a Hugging Face checkpoint to a GGUF file: open -> plan -> stream -> seal. Start reading here.

The checkpoint's headers list the tensors, the architecture's recipe maps them to those of the output, and the layout
gives the offset of every byte; `run` then computes these bytes, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from gguf.constants import GGMLQuantizationType, Keys

from streamconv.api.run import run
from streamconv.budget import Budget, too_small
from streamconv.check.tensors import comparer_nbytes, listed_nbytes
from streamconv.checkpoint.folder import Checkpoint
from streamconv.engine.job import Job
from streamconv.engine.layout import MODULES_NBYTES, PlacedTensor, least_run_nbytes, make_layout, memory_failures
from streamconv.engine.split import make_parts
from streamconv.errors import RunWarning, UsageError
from streamconv.files.hub import Source, find_source, model_name, source_failures
from streamconv.files.local import noting_files
from streamconv.files.store import Place
from streamconv.ggml.blocks import BLOCK_TYPES
from streamconv.ggml.imatrix import ImportanceMatrix
from streamconv.ggml.mix_rules import requires_importance
from streamconv.ggml.mixes import MIXES, MixOptions, ModelFacts
from streamconv.ggml.outtypes import OUTTYPES
from streamconv.ggml.policy import (
    MixPolicy,
    OuttypePolicy,
    StoredTypes,
    TensorRole,
    TypePolicy,
    facts_of,
    resolve_auto,
)
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.gguf.names import written_name
from streamconv.lazy import dtype
from streamconv.lazy.leaves import sources
from streamconv.lora.specs import Adapter, AdapterSpec, Merged, open_adapters
from streamconv.metadata.modelcard import read_general
from streamconv.metadata.vocab import Vocabulary, read_vocabulary, vocabulary_nbytes
from streamconv.metadata.vocab.choice import Tokenizers, choose_vocabulary
from streamconv.options import MMPROJ_OUTTYPES, OutputOptions, RunOptions, SplitOptions, public
from streamconv.output.destination import output_path
from streamconv.recipe.bind import bind_outputs
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.recognise import open_checkpoint, recipe_of_checkpoint, recognise
from streamconv.recipe.registry import RecipeSource, identity_of, using_recipes
from streamconv.report import Report
from streamconv.timing import Profile

MIN_PART_NBYTES = 1_000_000  # a smaller limit probably lacks its unit

# Memory of a stored tensor as a node, and of an output tensor with its nodes, names and entry. Measured: 340 and 750.
SOURCE_NBYTES = 400
TARGET_NBYTES = 900
FACTOR_NBYTES = 4 << 10  # a stored factor, with its module and nodes. Measured: 470, while matched 1,900


@public("convert")
@noting_files()
@memory_failures()
def convert(
    src: Source,
    dst: str | Path | None = None,
    *,
    adapters: Sequence[AdapterSpec] = (),
    recipes: Sequence[RecipeSource] = (),
    pre: str | None = None,
    tokenizer: str = "auto",
    outtype: str = "auto",
    dialect: str = "llama.cpp",
    name: str | None = None,
    imatrix: Source | None = None,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    leave_output_tensor: bool = False,
    pure: bool = False,
    mmproj: str | Path | None = None,
    mmproj_outtype: str | None = None,
    no_mmproj: bool = False,
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
    """Convert a checkpoint to one or several GGUF files. Nothing is printed.

    Args:
        src: a folder, a .safetensors file, the id of a repo in the Hugging Face cache, or a `Store`.
        dst: the file to write; by default named by GGUF's convention, in the current directory.
        {options}

    Returns:
        A report on the written files; with `dry_run`, on the planned ones, with the proof that they fit in memory.

    Raises:
        StreamconvError: with a stable `code`; `dst` is then unchanged.
        Exception: exceptions from `progress` or `cancel`, and KeyboardInterrupt, pass through unchanged.
    """
    options, wanted = RunOptions.of(locals()), OutputOptions.of(locals())
    with using_recipes(recipes):
        budget = Budget(options.limit_nbytes, compares=options.verify)
        with open_model_job(src, dst, wanted, budget, adapters) as job:
            return run(job, options, budget)


@contextmanager
def open_model_job(
    src: Source,
    dst: str | Path | None,
    wanted: OutputOptions,
    budget: Budget,
    adapters: Sequence[AdapterSpec] = (),
    stored: StoredTypes | None = None,
) -> Iterator[Job]:
    """Yield the job of a checkpoint with adapters merged into it, while their files are open."""
    with (
        open_imatrix(wanted.imatrix, budget) as imatrix,
        open_adapters(adapters, budget) as opened,
        open_checkpoint(find_source(src), budget) as source,
        _open_folders(source, wanted, budget) as folders,
    ):
        yield plan_model(source, dst, wanted, budget, opened, stored, imatrix, folders=folders)


@contextmanager
def _open_folders(checkpoint: Checkpoint, wanted: OutputOptions, budget: Budget) -> Iterator[dict[str, Checkpoint]]:
    """The models in folders of a checkpoint that are written beside its own, by role."""
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(open_checkpoint(folder, budget))
            for role, folder in _folders(checkpoint, wanted).items()
        }


@source_failures()
def _folders(checkpoint: Checkpoint, wanted: OutputOptions) -> dict[str, Place]:
    if not wanted.writes_others:
        return {}
    named = {role: checkpoint.directory / name for role, name in recipe_of_checkpoint(checkpoint).folders.items()}
    return {role: folder for role, folder in named.items() if folder.is_dir()}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint bound to its recipe, without and with adapters merged into it."""

    recipe: Recipe
    bound: Model
    merged: Merged


@source_failures()
def prepare(checkpoint: Checkpoint, budget: Budget, adapters: Sequence[Adapter] = ()) -> Prepared:
    """Return the part of a job that does not depend on its options. No weights are read."""
    recipe = recipe_of_checkpoint(checkpoint)
    budget.reserve("plan", SOURCE_NBYTES * len(checkpoint.tensors), file=checkpoint.directory)
    bound = recognise(checkpoint, recipe)
    n_factors = sum(len(adapter.file.shard.tensors) for adapter in adapters)
    planned = TARGET_NBYTES * len(bound.targets) + FACTOR_NBYTES * n_factors
    budget.reserve("plan", planned, file=checkpoint.directory)
    if not adapters:
        return Prepared(recipe, bound, Merged(bound, Tokenizers(checkpoint.directory)))
    from streamconv.lora.merge import merge

    outputs = bind_outputs(recipe, bound, bound.stored)
    return Prepared(recipe, bound, merge(checkpoint, bound, adapters, outputs))


@source_failures()
def plan_model(
    checkpoint: Checkpoint,
    dst: str | Path | None,
    wanted: OutputOptions,
    budget: Budget,
    adapters: Sequence[Adapter] = (),
    stored: StoredTypes | None = None,
    imatrix: ImportanceMatrix | None = None,
    prepared: Prepared | None = None,
    folders: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> Job:
    """Plan the output: everything that determines its bytes. Reads headers and vocabulary, but no weights.

    Args:
        checkpoint: the open checkpoint.
        dst: the file to write, or None for the default name.
        wanted: the options of the output.
        budget: the memory that the run may take.
        adapters: the adapters to merge.
        stored: the types in the file to compare with, which replace the outtype.
        imatrix: the importance matrix, if there is one.
        prepared: the result of `prepare`, to plan several outtypes of one checkpoint.
        folders: models in folders of the checkpoint that are written beside it, by role.
    """
    config = checkpoint.config
    prepared = prepared or prepare(checkpoint, budget, adapters)
    recipe, bound, merged = prepared.recipe, prepared.bound, prepared.merged
    model = merged.model
    outtype = auto_outtype(checkpoint, bound) if wanted.outtype == "auto" else wanted.outtype
    policy = stored or policy_of(model, outtype, wanted.mix, has_importance=imatrix is not None)
    roles, facts = _roles_and_facts(model)
    tensors = _place(model, wanted.dialect, policy.choose(roles, facts), imatrix)
    others = _further_outputs(checkpoint, prepared, wanted)
    budget.reserve("plan", TARGET_NBYTES * sum(len(other.targets) for other in others), file=checkpoint.directory)
    told = imatrix.check({target.name: target.tensor.spec.shape for target in model.targets}) if imatrix else []
    if stored is None:
        require_importance(policy.outtype, tensors)
    general = read_general(
        checkpoint.directory,
        arch=model.recipe.arch,
        name=wanted.name,
        specs=[(target.name, target.tensor.spec) for target in model.targets],
        merged=merged.directories,
    )
    vocabulary = _bounded_vocabulary(merged, recipe, wanted, tensors, budget)
    file_type = KeyValue.u32("general.file_type", policy.file_type)
    keys = [*general.keys, file_type, *model.keys(), *vocabulary.keys, *(imatrix.metadata() if imatrix else ())]
    path = output_path(
        dst, general.file_name(policy.outtype), name=model_name(checkpoint.directory), outtype=policy.outtype
    )
    beside = stored or OuttypePolicy(
        wanted.mmproj_outtype or (policy.outtype if policy.outtype in MMPROJ_OUTTYPES else "f16")
    )
    # If the caller named neither, both are named by GGUF's convention.
    named = path if dst else Path(general.file_name(beside.outtype))
    parts = make_parts(path, keys, tensors, wanted.parts)
    return Job(
        command="convert",
        keys=keys,
        parts=parts,
        role=recipe.role,
        companions=[
            *(_plan_companion(checkpoint, other, merged, named, wanted, beside) for other in others),
            *(_plan_folder(role, one, named, wanted, budget, beside, stored) for role, one in folders.items()),
        ],
        architecture=model.recipe.arch,
        dialect=wanted.dialect,
        outtype=policy.outtype,
        shards=(*checkpoint.shards, *merged.shards),
        configs=(config, *(adapter.file.config for adapter in adapters)),
        options={
            "outtype": policy.outtype,
            "dialect": wanted.dialect,
            "types": str(wanted.mix),
            "imatrix": imatrix.fingerprint if imatrix else "",
            **merged.options,
            **identity_of(recipe),
        },
        defaults=model.defaults(),
        warnings=[
            *checkpoint.warnings,
            *model.warnings,
            *merged.warnings,
            *general.warnings,
            *vocabulary.warnings,
            *_missing_tokens(others, vocabulary),
            *policy.warnings(roles, facts),
            *told,
            *_small_parts(wanted.parts, len(parts)),
        ],
        changed_by={tensor.target: merged.changed_by(tensor.rows) for tensor in tensors} if adapters else {},
    )


def _further_outputs(checkpoint: Checkpoint, prepared: Prepared, wanted: OutputOptions) -> list[Model]:
    """The outputs beside the model's file. UsageError if one is requested that the checkpoint has no tensors for."""
    recipe, model, merged = prepared.recipe, prepared.merged.model, prepared.merged
    if merged.outputs and wanted.no_mmproj:
        what = f"the adapters also change the {' and '.join(merged.outputs)}, which is not written"
        model.warnings.append(RunWarning("adapter-in-part", what))
    if not wanted.writes_others:
        return []
    stored = prepared.bound.stored
    for output in recipe.outputs:
        if (changed := merged.outputs.get(output.role)) is not None:  # with the recipe's own names
            stored = {name: tensor for name, tensor in stored.items() if not output.find(name)} | dict(changed)
    others = bind_outputs(recipe, model, stored)
    if not others and wanted.asks_for_mmproj:
        what = f"the checkpoint ({recipe.arch}) has no tensors of a projector"
        raise UsageError(what, file=checkpoint.directory, hint="omit --mmproj and --mmproj-outtype", code="mmproj-none")
    for output in recipe.outputs:
        if all(other.recipe is not output for other in others):
            what = f"no {output.role} was written: the checkpoint has no tensors for it"
            model.warnings.append(RunWarning("mmproj-none", what))
    return others


def _plan_companion(
    checkpoint: Checkpoint, model: Model, merged: Merged, beside: Path, wanted: OutputOptions, policy: TypePolicy
) -> Job:
    """The job of a further output, named after the file `beside` unless the caller gave a path."""
    output = model.recipe
    roles, facts = _roles_and_facts(model)
    tensors = _place(model, wanted.dialect, policy.choose(roles, facts))
    specs = [(target.name, target.tensor.spec) for target in model.targets]
    general = read_general(
        checkpoint.directory,
        arch=output.arch,
        name=wanted.name,
        specs=specs,
        kind=output.general_type,
        merged=merged.directories if output.role in merged.outputs else (),
    )
    keys = [*general.keys, KeyValue.u32("general.file_type", policy.file_type), *model.keys()]
    path = beside.with_name(f"{output.role}-{beside.name}")
    if wanted.mmproj is not None:
        path = output_path(wanted.mmproj, "", name=model_name(checkpoint.directory), outtype=policy.outtype)
    return Job(
        command="convert",
        keys=keys,
        parts=make_parts(path, keys, tensors, SplitOptions()),
        architecture=output.arch,
        dialect=wanted.dialect,
        outtype=policy.outtype,
        shards=(*checkpoint.shards, *merged.shards),
        configs=(checkpoint.config,),
        options={"outtype": policy.outtype, "dialect": wanted.dialect, **merged.options},
        defaults=model.defaults(),
        warnings=[*model.warnings, *policy.warnings(roles, facts)],
        role=output.role,
        changed_by={one.target: merged.changed_by(one.rows) for one in tensors}
        if output.role in merged.outputs
        else {},
    )


def _plan_folder(
    role: str,
    folder: Checkpoint,
    beside: Path,
    wanted: OutputOptions,
    budget: Budget,
    policy: TypePolicy,
    stored: StoredTypes | None,
) -> Job:
    """The job of a model in a folder of the checkpoint, named after the file `beside`; few options are about it."""
    own = OutputOptions(outtype=policy.outtype, dialect=wanted.dialect)
    job = plan_model(folder, beside.with_name(f"{role}-{beside.name}"), own, budget, stored=stored)
    return replace(job, role=role)


def _missing_tokens(others: Sequence[Model], vocabulary: Vocabulary) -> Iterator[RunWarning]:
    """Warnings for tokens that the runtime needs when it uses a further output, but that the vocabulary lacks."""
    tokens = next((entry.value for entry in vocabulary.keys if entry.key == Keys.Tokenizer.LIST), None)
    for other in others:
        missing = [
            text for text in other.recipe.tokens if isinstance(tokens, PackedArray) and not tokens.has_string(text)
        ]
        if missing:
            what = f"the vocabulary lacks {', '.join(missing)}, which the runtime puts around"
            yield RunWarning("tokens-missing", f"{what} the embeddings from the {other.recipe.role}")


def _small_parts(options: SplitOptions, count: int) -> Iterator[RunWarning]:
    """A warning if a bare number of bytes was probably meant in another unit."""
    size = options.max_nbytes
    if size is not None and size < MIN_PART_NBYTES and count > 1:
        message = f"--split-max-size {size} is {size:,} bytes: {count} files; {size}M would be megabytes"
        yield RunWarning("split-small", message)


def auto_outtype(checkpoint: Checkpoint, model: Model) -> str:
    """Return the outtype that `auto` stands for. Tensors that the recipe drops do not count."""
    used = {source.name for target in model.targets for source in sources(target.tensor)}
    return resolve_auto(tensor.lazy().spec for name, tensor in checkpoint.tensors.items() if name in used)


def policy_of(model: Model, outtype: str, options: MixOptions, *, has_importance: bool = False) -> TypePolicy:
    """Return the type policy for `outtype`, which must not be auto."""
    if OUTTYPES[outtype].is_mix or (outtype == "q8_0" and options != MixOptions()):
        return MixPolicy(outtype, _lossless(model), options, has_importance)
    if options.leave_output:
        what = f"outtype {outtype} does not quantise anything"
        raise UsageError(what, hint="omit --leave-output-tensor", code="option-conflict")
    return OuttypePolicy(outtype, options)


def _lossless(model: Model) -> str:
    """The plain outtype that holds all weights exactly."""
    dtypes = {target.tensor.spec.dtype for target in model.targets if model.role(target).is_weight}
    return "bf16" if dtypes == {dtype.BF16} else "f16" if dtypes == {dtype.F16} else "f32"


def require_importance(outtype: str, tensors: Sequence[PlacedTensor]) -> None:
    """Raise UsageError for a type that llama-quantize makes only with an importance matrix."""
    mix = MIXES.get(outtype)
    for one in tensors if mix else ():
        if mix and one.weights is None and requires_importance(mix, one.target, one.type):
            what = f"{one.type.name} in a {outtype} file needs an importance matrix"
            raise UsageError(
                what, tensor=one.target, hint="pass --imatrix FILE, or use --outtype q2_k", code="imatrix-missing"
            )


@contextmanager
def open_imatrix(source: Source | None, budget: Budget) -> Iterator[ImportanceMatrix | None]:
    if source is None:
        yield None
        return
    with ImportanceMatrix.open(find_source(source), budget) as imatrix:
        yield imatrix


def _roles_and_facts(model: Model) -> tuple[list[TensorRole], ModelFacts]:
    """What a policy chooses the types of a model's tensors by."""
    return [model.role(target) for target in model.targets], facts_of(model.recipe.arch, model.keys())


def _place(
    model: Model, dialect: str, types: Sequence[GGMLQuantizationType], imatrix: ImportanceMatrix | None = None
) -> list[PlacedTensor]:
    """The model's tensors with their names and types in the file."""
    return [
        PlacedTensor(
            written_name(target.name, dialect),
            target.tensor,
            tuple(source.name for source in sources(target.tensor)),
            type_,
            imatrix.columns(target.name, target.tensor.spec.shape) if imatrix and type_ in BLOCK_TYPES else None,
        )
        for target, type_ in zip(model.targets, types, strict=True)
    ]


def _bounded_vocabulary(
    merged: Merged,
    recipe: Recipe,
    wanted: OutputOptions,
    tensors: Sequence[PlacedTensor],
    budget: Budget,
) -> Vocabulary:
    """The tokenizer's keys, read after a proof that parsing and the later steps fit in memory; else BudgetError."""
    model = merged.model
    if not recipe.has_tokenizer:
        return Vocabulary((KeyValue.string(Keys.Tokenizer.MODEL, "none"),), ())
    n_vocab = model.dims["V"]

    def read(directory: Place, over: Place | None) -> Vocabulary:
        kept, extra = vocabulary_nbytes(directory, n_vocab, over)
        # The additional memory for parsing is released before workers start.
        steps = make_layout([], tensors).steps
        comparing = comparer_nbytes(steps) + listed_nbytes(steps) + MODULES_NBYTES if budget.compares else 0
        needed = budget.held + kept + max(extra, least_run_nbytes(steps), comparing)
        if needed > budget.allowed:
            raise too_small(budget.allowed, needed, directory)
        # If several tokenizers are read, the largest one counts: only one is written.
        held = budget.terms.get("vocabulary", 0)
        budget.reserve("vocabulary", max(0, kept - held), file=directory)
        with budget.lend("reading the vocabulary", extra, file=directory):
            return read_vocabulary(
                directory,
                over=over,
                config=model.config.raw,
                n_vocab=n_vocab,
                default_pre=recipe.default_pre,
                pre=wanted.pre,
                special=recipe.special_tokens,
                templates=recipe.templates,
            )

    return choose_vocabulary(merged.tokenizers, wanted.tokenizer, read)
