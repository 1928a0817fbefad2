"""Open a base: a GGUF file, or a folder with config.json and, if present, its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.quantisation import quantised_names
from streamconv.errors import SourceError
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, Source, find_path, find_source, is_repo_id, source_failures
from streamconv.files.store import Place
from streamconv.files.strict_json import MAX_CONFIG_NBYTES, load_object
from streamconv.lora.base import N_LAYERS, BaseModel
from streamconv.lora.config import stated_base
from streamconv.lora.gguf_base import COPIED_KEYS, base_of_gguf
from streamconv.recipe.dims import MAX_LAYERS, parse_extent, solve_dims, stated_dims
from streamconv.recipe.language import Model, Recipe
from streamconv.recipe.recognise import bound, open_checkpoint, recipe_of_checkpoint, recognise_architecture
from streamconv.recipe.words import Key, PerLayer


@source_failures()
def open_base(source: Source, budget: Budget) -> BaseModel:
    """Open the base at `source`.

    Args:
        source: A GGUF file, the first part of a split, or a folder with config.json.
        budget: The memory that reading it may take.

    Raises:
        SourceError: The base cannot be read, or its architecture has no recipe.
    """
    path = find_source(source)
    if not path.is_dir():
        return base_of_gguf(path, budget)
    if not (path / CONFIG).is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"name the file itself, as {path / ggufs[0]}" if ggufs else "give the base's GGUF, or its folder"
        raise SourceError(f"no {CONFIG}", file=path, hint=hint, code="config-missing")
    return _from_folder(path, budget)


def stated_source(config: Config) -> Source:
    """Return the base that an adapter's configuration names, from the local Hugging Face cache.

    Raises:
        SourceError: The configuration names none, or it is not in the cache.
    """
    name = stated_base(config.raw)
    if name is not None and Path(name).is_absolute() and Path(name).is_dir():
        return name
    if name is None or not is_repo_id(name):  # such as a path on the machine on which it was trained
        what = "does not name its base by a repo id"
        raise SourceError(what, file=config.file, hint="give --base", code="base-missing")
    try:
        return str(find_path(name))
    except SourceError as error:
        error.hint = f"{error.hint}, or give --base"
        raise


def stated_source_of(adapter: Source) -> Source:
    """Like `stated_source`, for the adapter at the path `adapter`."""
    place = find_source(adapter)
    file = (place if place.is_dir() else place.parent) / ADAPTER_CONFIG
    return stated_source(Config(load_object(file, MAX_CONFIG_NBYTES), file))


# ---------------------------------------------------------------- a Hugging Face folder


def _from_folder(path: Place, budget: Budget) -> BaseModel:
    config = Config(load_object(path / CONFIG, MAX_CONFIG_NBYTES), path / CONFIG)
    recipe = recognise_architecture(config)
    if not any(path.glob("*.safetensors")):
        return _from_config(path, recipe, config)
    with open_checkpoint(path, budget) as checkpoint:
        if any(quantised_names(checkpoint.tensors)):
            # A base for QLoRA: quantised shapes on disk, so the shapes follow from config.json.
            return _from_config(path, recipe, config)
        model = bound(checkpoint, recipe_of_checkpoint(checkpoint))
        targets = frozenset(target.name for target in model.targets)
        base = _of_model(path, model, model.is_tied, targets)
        base.warnings += checkpoint.warnings
        return base


def _from_config(path: Place, recipe: Recipe, config: Config) -> BaseModel:
    config = config.within(recipe.config_root)
    model = Model(recipe, config, solve_dims(recipe, stated_dims(recipe, config)))
    if not 1 <= model.dims.get(N_LAYERS, 0) <= MAX_LAYERS:
        name = recipe.dims[N_LAYERS].label
        raise SourceError(
            f"{name} is {model.dims.get(N_LAYERS)}, which is not a valid number of layers",
            file=config.file,
            code="layer-count",
        )
    for claim in recipe.claims:
        kinds = claim.kinds(config, model.n_layers)
        if kinds is not None and len(kinds) != model.n_layers:
            what = f"{claim.key} lists {len(kinds)} layers, but there are {model.n_layers}"
            raise SourceError(what, file=config.file, code="config-contradiction")
        if kinds is not None and model.kinds.setdefault(claim.axis, list(kinds)) != list(kinds):
            raise SourceError(
                f"{claim.key} contradicts another field of the config about the layers",
                file=config.file,
                code="config-contradiction",
            )
    return _of_model(path, model, recipe.is_tied_by(config), None)


def _of_model(path: Place, model: Model, is_tied: bool, targets: frozenset[str] | None) -> BaseModel:
    copied = tuple(key for key in model.recipe.keys if key.name in COPIED_KEYS and _has_value(key, model))
    return BaseModel(
        path=path,
        model=model,
        is_tied=is_tied,
        keys=replace(model, recipe=replace(model.recipe, keys=copied)).keys(),
        targets=targets,
    )


def _has_value(key: Key, model: Model) -> bool:
    """Whether the value of `key` is known without the model's weights."""
    if isinstance(key.value, PerLayer):
        return key.value.axis in model.kinds
    return isinstance(key.value, str) and parse_extent(key.value).value(model.dims) is not None
