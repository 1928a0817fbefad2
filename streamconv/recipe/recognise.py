"""Recognise a checkpoint: find its architecture, map its names and shapes to those of the recipe, and bind it.

Errors say what an unsupported checkpoint is, with a hint: another architecture and the most similar supported one,
unmerged adapters, value heads, empty shards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.folder import Checkpoint
from streamconv.checkpoint.modules import DENSE, MODULES
from streamconv.checkpoint.quantisation import check_quantisation
from streamconv.errors import RunWarning, SourceError
from streamconv.files.hub import CONFIG, model_name
from streamconv.files.local import read_start
from streamconv.files.store import Place
from streamconv.files.strict_json import MAX_CONFIG_NBYTES, load_object
from streamconv.recipe.bind import bind
from streamconv.recipe.dims import stated_dims
from streamconv.recipe.language import Model, Recipe, Stored
from streamconv.recipe.names import match_name
from streamconv.recipe.registry import PAGE, all_recipes, find_recipe
from streamconv.recipe.spelling import Spelled, Speller, spell

# Tensors that PEFT and mlx-lm store in addition to the weight that they adapt.
_ADAPTER = re.compile(
    r"\.(base_layer|original_module|modules_to_save|lora_([ABab]|embedding_[AB]|magnitude_vector)"
    r"|token_adapter|trainable_tokens_\w+|(vera|oft|boft|hada|lokr|ia3|ln_tuning|hra)_\w+)(\.|$)"
)
_ANY = re.compile("")
CARD, MAX_CARD_NBYTES = "README.md", 64 << 10
_RERANKER = re.compile(rb"^(#+ +|base_model: *|- +)[\"']?(\S*/)?qwen3(-vl)?-reranker", re.IGNORECASE | re.MULTILINE)
_FLAT = re.compile(r"(^|\.)(_?flat_param(_\d+)?|_fsdp_wrapped_module)(\.|$)")  # torch.distributed.fsdp
_VALUE_HEAD = re.compile(r"(^|\.)(v_head|value_head|reward_head|summary)(\.|$)")
_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|classification_head)(\.|$)")


def open_checkpoint(source: Place, budget: Budget | None = None) -> Checkpoint:
    """Open the checkpoint at `source` and read its headers.

    Raises:
        SourceError: As for Checkpoint.open; an unsupported architecture is reported first, whatever else is wrong.
    """
    try:
        return Checkpoint.open(source, budget=budget)
    except SourceError:
        with suppress(OSError):  # a folder that may not be searched: the first error says so
            folder = source if source.is_dir() else source.parent
            if (folder / CONFIG).is_file():
                recognise_architecture(Config(load_object(folder / CONFIG, MAX_CONFIG_NBYTES), folder / CONFIG))
        raise


def recipe_of_checkpoint(checkpoint: Checkpoint) -> Recipe:
    """Like `recognise_architecture`, but for a reranker return the recipe for reranking.

    Raises:
        SourceError: llama.cpp does not rank with this architecture (`module-unsupported`).
    """
    recipe = recognise_architecture(checkpoint.config, checkpoint.tensors)
    if checkpoint.modules.answers is None:
        return recipe
    if recipe.reranker is None:
        what = f"a reranker that compares the logits of two tokens, which llama.cpp does not support for {recipe.arch}"
        hint = f"run it with sentence-transformers, or remove {MODULES} to convert it as a text model"
        raise SourceError(what, file=checkpoint.directory / MODULES, hint=hint, code="module-unsupported")
    return replace(recipe.reranker, origin=recipe.origin) if recipe.origin else recipe.reranker


def recognise(checkpoint: Checkpoint, recipe: Recipe) -> Model:
    """Return the checkpoint's model, with warnings about everything that is not used as stored.

    Raises:
        SourceError: It is quantised, or it does not hold what `recipe` asks for.
    """
    warnings = check_quantisation(checkpoint.config, checkpoint.tensors)
    model = bound(checkpoint, recipe)
    model.warnings[:0] = warnings
    return model


def bound(checkpoint: Checkpoint, recipe: Recipe) -> Model:
    """Bind the checkpoint to `recipe` without checking whether it is quantised.

    Raises:
        SourceError: The checkpoint disagrees with the recipe.
    """
    config, folder = checkpoint.config, checkpoint.directory
    _refuse_modules(recipe, checkpoint)
    spelled = spelled_tensors(checkpoint, recipe)
    _refuse_foreign(recipe, spelled, folder)
    is_body = spelled.is_bare or bool(set(_class_names(config)) & set(recipe.bodies))
    model = bind(recipe, config, spelled.tensors, is_body=is_body, modules=checkpoint.modules)
    model.warnings[:0] = [*spelled.warnings, *_doubts(model, recipe, checkpoint)]
    return replace(model, stored=spelled.tensors)


def spelled_tensors(checkpoint: Checkpoint, recipe: Recipe) -> Spelled:
    """Return the checkpoint's tensors with the recipe's names and shapes."""
    config = recipe.config_of(checkpoint.config)
    stated = stated_dims(recipe, config)
    return spell(
        recipe,
        checkpoint.tensors,
        folder=checkpoint.directory,
        shared={one: other for shard in checkpoint.shards for one, other in shard.metadata.items()},
        is_tied=recipe.is_tied_by(config),
        depths={stack: stated[dim] for stack, dim in recipe.stacks.items() if dim in stated},
    )


def recognise_architecture(config: Config, names: Collection[str] = ()) -> Recipe:
    """Return the recipe for a config.

    Args:
        config: The model's config.json.
        names: The names of its tensors, for the error: it names the most similar supported architecture.

    Raises:
        SourceError: There is none (`architecture-unsupported`).
    """
    try:
        recipe = find_recipe(config)
    except SourceError as error:
        if error.code != "architecture-unsupported":
            raise
        _refuse_heads_of_known(config, names)
        nearest = _nearest(names, config)
        hint = f"{error.hint}; {PAGE} explains how to add one, streamconv draft FOLDER writes a first draft"
        what = f"{error.message}{nearest}"
        raise SourceError(what, file=error.file, hint=hint, code="architecture-unsupported") from None
    return recipe


def _class_names(config: Config) -> list[str]:
    return config.list_of("architectures", str) or []


def _of_model_type(config: Config) -> list[Recipe]:
    model_type = config.raw.get("model_type")
    return [recipe for recipe in all_recipes() if recipe.model_type == model_type]


def _refuse_heads_of_known(config: Config, names: Collection[str]) -> None:
    """Raise SourceError for a known model type whose class is unknown because of a value or classification head."""
    if _of_model_type(config):
        _refuse_heads(list(names), config.file.parent)


def _nearest(names: Collection[str], config: Config) -> str:
    """Return a phrase that names the supported architecture with the most similar tensor names; "" without names."""
    if not names:
        return ""
    said = {recipe.hf_names for recipe in _of_model_type(config)}
    found = []
    for recipe in all_recipes():  # several may have the same arch
        strange = [
            name for name, known in zip(names, map(Speller(recipe, names).spell, names), strict=True) if not known
        ]
        n_required = sum(row.required is True for row in recipe.tensors)
        found.append((len(strange), recipe.hf_names not in said, n_required, recipe.arch, strange))
    # If several are equally similar, prefer one for the model type in the config, then one with few other tensors.
    n_strange, _, _, arch, strange = min(found)
    if 2 * n_strange > len(names):
        return "; no supported one is similar"
    others = dict.fromkeys(match_name(name)[0] for name in strange)
    unknown = f", but others do not, such as {', '.join(list(others)[:3])}" if others else ""
    count = f"{len(names) - n_strange} of {len(names)}" if others else f"all {len(names)}"
    return f"; the most similar one is {arch}: {count} tensors have its names{unknown}"


def _refuse_modules(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raise SourceError if the runtime does not support the sentence-transformers modules after the model."""
    modules = checkpoint.modules
    if modules.fault is not None:
        raise modules.fault
    for name, tensor in modules.tensors.items():
        if recipe.find(name) is None:
            what = f"a dense layer's {name.removeprefix(DENSE)}, which llama.cpp does not support for {recipe.arch}"
            hint = "run it with sentence-transformers"
            raise SourceError(what, file=tensor.shard.path, hint=hint, code="module-unsupported")


def _doubts(model: Model, recipe: Recipe, checkpoint: Checkpoint) -> Iterator[RunWarning]:
    """Warn about properties of a retrieval model that its files do not define."""
    config, modules = checkpoint.config, checkpoint.modules
    own = config.section("auto_map") if modules.is_given and config.flag("is_causal") is None else None
    if own is not None and f"{recipe.arch}.attention.causal" not in [*map(attrgetter("key"), model.keys())]:
        code = own.raw.get("AutoModel") or next(iter(own.raw.values()))
        what = f"config.json names custom code ({code!s:.80}), which may not use a causal mask; one is assumed"
        yield RunWarning("own-code", f"{what}: set is_causal to false in config.json if there is none")
    if recipe.reranker is not None and not modules.is_given and _is_called_reranker(checkpoint):
        what = "a reranker by its name, but without modules.json, which names its answers: converted as a text model"
        yield RunWarning("reranker-text", f"{what} (download modules.json and 1_LogitScore as well)")


def _is_called_reranker(checkpoint: Checkpoint) -> bool:
    """Whether the folder, the config or the model card names a reranker, as what this model is or was made from."""
    card = checkpoint.directory / CARD
    names = (model_name(checkpoint.directory), checkpoint.config.raw.get("_name_or_path"))
    is_named = any("reranker" in str(one).lower() for one in names)
    return is_named or (card.is_file() and bool(_RERANKER.search(read_start(card, MAX_CARD_NBYTES))))


def _refuse_foreign(recipe: Recipe, spelled: Spelled, folder: Place) -> None:
    """Raise SourceError for tensors that show that the checkpoint is not a plain model, with the reason."""
    unknown = [name for name in spelled.tensors if recipe.find(name) is None and not recipe.is_of_another(name)]
    if found := _some(_ADAPTER, unknown):
        what = f"the model has layers of an adapter (LoRA or similar) that were not merged: {found}"
        hint = (
            "merge them first (PEFT's model.merge_and_unload(), then save; mlx_lm.fuse), "
            "or save the adapter and pass it with --adapter"
        )
        raise SourceError(what, file=folder, hint=hint, code="unmerged-lora")
    if found := _some(_FLAT, unknown):
        what = f"the model was saved while FSDP held its tensors flat or wrapped: {found}"
        hint = "save it whole: FULL_STATE_DICT, or accelerate merge-weights FOLDER OUT"
        raise SourceError(what, file=folder, hint=hint, code="flat-tensors")
    packed = [name for name in unknown if name.endswith(".weight") and _is_known(recipe, name.removesuffix(".weight"))]
    if packed:
        what = f"the names of packed experts end in .weight, unlike those of transformers: {_some(_ANY, packed)}"
        hint = "save the model again with transformers (save_pretrained), or rename the tensors"
        raise SourceError(what, file=folder, hint=hint, code="packed-experts-name")
    _refuse_heads(unknown, folder)
    empty = list(_empty(spelled.tensors))
    if empty:
        what = f"{len(empty)} of {len(spelled.tensors)} tensors are empty, such as {empty[0]}, since ZeRO-3 or FSDP"
        hint = "gather them when saving (stage3_gather_16bit_weights_on_model_save), or run DeepSpeed's zero_to_fp32.py"
        raise SourceError(f"{what} had partitioned them", file=folder, hint=hint, code="empty-tensors")


def _is_known(recipe: Recipe, name: str) -> bool:
    return bool(recipe.find(name) or recipe.alias_names.find(recipe.canonical(name)))


def _refuse_heads(unknown: Sequence[str], folder: Place) -> None:
    """Raise SourceError for a value head or a classification head."""
    if found := _some(_VALUE_HEAD, unknown):
        what = f"the model has a value head, as trained by TRL, which a GGUF text model does not have: {found}"
        hint = "save the model inside it: model.pretrained_model.save_pretrained(folder)"
        raise SourceError(what, file=folder, hint=hint, code="value-head")
    if found := _some(_CLASSIFIER, unknown):
        what = f"the model has a classification or scoring head, which a GGUF text model does not have: {found}"
        hint = "convert the model from which it was made, or save only its body: model.model.save_pretrained(folder)"
        raise SourceError(what, file=folder, hint=hint, code="classification-head")


def _some(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    """Return the first name that matches `pattern` and the number of others; "" if none matches."""
    found = [name for name in names if pattern.search(name)]
    return f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}" if found else ""


def _empty(tensors: Mapping[str, Stored]) -> Iterator[str]:
    return (name for name, tensor in tensors.items() if 0 in tensor.shape)
