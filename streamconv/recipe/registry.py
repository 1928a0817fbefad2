"""Find the recipe of a checkpoint or GGUF file: in recipe files, in architectures/, or in installed packages.

A recipe file (`--recipe`) and a package's entry point are code that is run; the user chose both, by naming the file or
installing the package. A file takes precedence over streamconv's own recipes; packages are used only for architectures
that streamconv does not have, so that installing one does not change other outputs.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.files.hub import find_source, source_failures
from streamconv.files.local import file_nbytes, read_start
from streamconv.files.store import Place
from streamconv.recipe.language import Output, Recipe
from streamconv.recipe.names import NameTable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

RecipeSource = str | Path | Recipe  # a Python file with RECIPE in it, or the recipe itself

GROUP: Final = "streamconv.architectures"  # the group of entry points, each of which is a Recipe
PAGE: Final = "docs/adding-an-architecture.md"
MAX_FILE_NBYTES: Final = 1 << 20
N_SUGGESTED: Final = 3

_of_call: ContextVar[tuple[Recipe, ...]] = ContextVar("_of_call", default=())


# ---------------------------------------------------------------- sources of recipes


def _module_names() -> list[str]:
    """Return the modules of architectures/ that define a recipe; others begin with an underscore."""
    package = importlib.import_module("streamconv.architectures")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if not name.startswith("_")]


def _recipe_in(module_name: str) -> Recipe:
    recipe: Recipe = importlib.import_module(f"streamconv.architectures.{module_name}").RECIPE
    return recipe


@cache
def own_recipes() -> tuple[Recipe, ...]:
    """Return the recipes in architectures/, sorted by file name."""
    return tuple(map(_recipe_in, _module_names()))


@dataclass(frozen=True, slots=True)
class Installed:
    """The recipes of installed packages.

    Attributes:
        recipes: The recipes that could be loaded.
        broken: A description of each entry point that could not be loaded, with the reason.
    """

    recipes: tuple[Recipe, ...]
    broken: tuple[str, ...]


@cache
def installed_recipes() -> Installed:
    """Return the recipes from entry points of the group `streamconv.architectures`."""
    from importlib.metadata import entry_points  # 15 ms, and streamconv has most architectures itself

    recipes, broken = [], []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            recipes.append(_recipe_of_package(entry))
        except (Exception, SystemExit) as error:  # any error of its code: it must not affect other architectures
            broken.append(f"{_package(entry)}'s {entry.name} ({entry.value}): {type(error).__name__}: {error}")
    return Installed(tuple(recipes), tuple(broken))


def _recipe_of_package(entry: EntryPoint) -> Recipe:
    recipe = entry.load()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"is {type(recipe).__name__}, not a Recipe")
    return replace(recipe, origin=_package(entry))


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module


@contextmanager
def using_recipes(given: Sequence[RecipeSource]) -> Iterator[None]:
    """Give these recipes precedence over all others inside the block.

    Raises:
        SourceError: A file cannot be read, or it does not define a recipe (`recipe-broken`).
    """
    token = _of_call.set((*_of_call.get(), *(one if isinstance(one, Recipe) else load_recipe(one) for one in given)))
    try:
        yield
    finally:
        _of_call.reset(token)


@source_failures()
def load_recipe(file: str | Path) -> Recipe:
    """Return the recipe that a Python file defines as RECIPE. The file's code is run.

    Raises:
        SourceError: It cannot be read; its code fails, or there is no recipe in it (`recipe-broken`).
    """
    place = find_source(str(file))
    if not place.is_file():
        raise SourceError(
            "no such recipe file", file=place, hint=f"{PAGE} describes its contents", code="source-missing"
        )
    code = bytes(read_start(place, min(file_nbytes(place), MAX_FILE_NBYTES)))
    digest = hashlib.sha256(code).hexdigest()
    module = ModuleType(f"streamconv_recipe_{digest[:16]}", "A recipe file.")
    module.__file__ = str(place)
    sys.modules[module.__name__] = module  # its classes look their module up there
    try:
        exec(compile(code, str(place), "exec", dont_inherit=True), vars(module))
        recipe = vars(module)["RECIPE"]
        if not isinstance(recipe, Recipe):
            raise TypeError(f"RECIPE is {type(recipe).__name__}, not a Recipe")
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise _broken(place, error) from None
    return replace(recipe, origin=f"{place.name} {digest}")


def _broken(place: Place, error: Exception | SystemExit) -> SourceError:
    """Return the error for a recipe file, with the line that caused it."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(place):
            line = trace.tb_lineno
        trace = trace.tb_next
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyError) and error.args == ("RECIPE",):
        what, line = "no RECIPE in it", None
    where = f"line {line}: " if line else ""
    return SourceError(f"{where}{what}", file=place, hint=f"{PAGE} describes its contents", code="recipe-broken")


def identity_of(recipe: Output) -> dict[str, str]:
    """Return what an external recipe adds to the identity of a run; empty for one in architectures/."""
    return {"recipe": recipe.origin} if isinstance(recipe, Recipe) and recipe.origin else {}


# ---------------------------------------------------------------- finding a recipe


def all_recipes() -> tuple[Recipe, ...]:
    """Return all recipes: those of the call, of architectures/ and of installed packages."""
    return (*_of_call.get(), *own_recipes(), *installed_recipes().recipes)


def _recipes(config: Config) -> Iterator[Recipe]:
    """Yield the recipes of the call, then those of architectures/.

    The file named after the config's model type comes first, so that the others usually need not be loaded.
    """
    yield from _of_call.get()
    model_type = config.text("model_type") or ""
    names = (model_type, model_type.replace("_", "").replace("-", ""))
    yield from (_recipe_in(name) for name in _module_names() if name in names)
    yield from own_recipes()


def find_recipe(config: Config) -> Recipe:
    """Return the recipe for a config.json.

    Raises:
        SourceError: There is none (`architecture-unsupported`), llama.cpp is known not to run the model
            (`architecture-unrunnable`), or several packages have one (`recipe-ambiguous`).
    """
    names = config.list_of("architectures", str) or []
    for recipe in _recipes(config):
        if recipe.is_for(config):
            return recipe
    found = [recipe for recipe in installed_recipes().recipes if recipe.is_for(config)]
    if len(found) > 1:
        origins = " and ".join(recipe.origin for recipe in found)
        what = f"several packages define the architecture {', '.join(names)}: {origins}"
        raise SourceError(what, file=config.file, hint="uninstall all but one", code="recipe-ambiguous")
    if found:
        return found[0]
    _refuse_unrunnable(config, names or [config.text("model_type") or ""])
    what = f"{', '.join(names) or 'a model without a name'} is not supported"
    if others := [recipe for recipe in own_recipes() if recipe.text_types and set(names) & set(recipe.hf_names)]:
        what = f"{what} with a text model of type {others[0].text_type(config)!r}"
    wrapped = [key for key in ("text_config", "vision_config", "audio_config") if key in config.raw]
    if wrapped:
        what += f" (a wrapper with {', '.join(wrapped)}: convert the text model's own checkpoint)"
    if broken := installed_recipes().broken:
        what += f"; could not be loaded: {'; '.join(broken)}"
    raise SourceError(what, file=config.file, hint=supported_hint(names), code="architecture-unsupported")


def _refuse_unrunnable(config: Config, names: Sequence[str]) -> None:
    """Raise SourceError for a class or model type that a recipe marks as not supported by llama.cpp."""
    for recipe in all_recipes():
        for pattern, reason in recipe.unrunnable.items():
            for name in names:
                if re.fullmatch(pattern, name):
                    hint = "run it with transformers"
                    raise SourceError(f"{name} {reason}", file=config.file, hint=hint, code="architecture-unrunnable")


def supported_hint(names: Sequence[str]) -> str:
    """Return a hint with the most similar supported names and the command that lists all."""
    known = {name.lower(): name for recipe in all_recipes() for name in (*recipe.hf_names, recipe.arch)}
    near = [known[low] for name in names for low in get_close_matches(name.lower(), known, n=N_SUGGESTED, cutoff=0.6)]
    like = f", such as {', '.join(dict.fromkeys(near[:N_SUGGESTED]))}" if near else ""
    return f"streamconv architectures lists the supported ones{like}"


def recipe_of(arch: str, tensors: Collection[str] = ()) -> Recipe | None:
    """Return the recipe of a GGUF architecture name; of several, the one that defines most of the file's `tensors`."""

    def n_known(recipe: Recipe) -> int:
        table = NameTable(row.target for row in recipe.tensors)
        return sum(table.find(name) is not None for name in tensors)

    for recipes in (_of_call.get(), own_recipes(), installed_recipes().recipes):
        if named := [recipe for recipe in recipes if recipe.arch == arch]:
            return max(named, key=n_known)
    return None
