"""Convert the tensor names and layouts of other programs to those that recipes use.

Training wrappers add segments to names, a model that was saved without its head lacks the `model.` prefix, mlx-lm uses
different names and shapes, and a tied embedding may be stored under the name of the head. The tensors of a model or an
adapter are renamed here, after the checkpoint is opened and before a recipe is bound to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from streamconv.errors import RunWarning, SourceError
from streamconv.files.store import Place
from streamconv.lazy.node import LazyTensor, Workspace, peak_nbytes, read
from streamconv.lazy.scratch import Scratch
from streamconv.recipe.language import Output, Stored
from streamconv.recipe.names import fill
from streamconv.recipe.ops import reshaped

# Segments that wrappers add to names: torch.compile, DataParallel, FSDP and its activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
PEFT_PREFIX = "base_model.model."
BODY = "model."  # transformers' prefix for the model without its head

COMPARED_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A stored tensor with another shape; the order of its elements is the same."""

    stored: Stored
    shape: tuple[int, ...]

    def lazy(self) -> LazyTensor:
        return reshaped(self.stored.lazy(), self.shape)


def unwrapped(name: str) -> str:
    """Return `name` without the segments of training wrappers and without PEFT's prefix, even if it is repeated."""
    name = ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    return name


class Speller:
    """Maps the names in a set of files, all written by the same program, to the recipe's names.

    Attributes:
        prefix: An unknown prefix that most names share; the recipe knows them without it. "" if there is none.
        is_bare: Whether names lack `model.`, as in a model that was saved without its head.
        is_prefixed: Whether names begin with `model.`.
        warnings: Warnings about the prefix, and about names both with and without `model.`.
    """

    def __init__(self, recipe: Output, names: Iterable[str], depths: Mapping[str, int] | None = None) -> None:
        self.recipe, self.depths = recipe, depths or {}
        self.prefix, self.is_bare, self.is_prefixed = "", False, False
        known: dict[str, str | None] = {name: self._known(unwrapped(name)) for name in names}
        self._found = {name: found for name, found in known.items() if found is not None}
        strange = [name for name in known if name not in self._found]
        prefix = self._common_prefix([unwrapped(name) for name in strange])
        more = {name: found for name in strange if (found := self._without(prefix, name)) is not None}
        if prefix and len(more) > len(self._found):  # else an unknown name may only end like a known one
            self.prefix = prefix
            self._found |= more
        for name, found in self._found.items():
            spelled = unwrapped(name).removeprefix(self.prefix)
            # The head is not part of the body, although a recipe without a head lists it as an alias of the embedding.
            has_body = found.startswith(BODY) and recipe.canonical(spelled) != recipe.head
            self.is_bare |= has_body and not spelled.startswith(BODY)
            self.is_prefixed |= has_body and spelled.startswith(BODY)

    def spell(self, name: str) -> str | None:
        """Return the recipe's name for one of the given names, or None."""
        return self._found.get(name)

    def find(self, name: str) -> str | None:
        """Return the recipe's name for any other name from the same program, or None."""
        return self._known(unwrapped(name)) or (self._without(self.prefix, name) if self.prefix else None)

    @cached_property
    def warnings(self) -> list[RunWarning]:
        found = []
        if self.prefix:
            found.append(
                RunWarning("name-prefix", f"the names of tensors begin with {self.prefix!r}, which was removed")
            )
        if self.is_bare and self.is_prefixed:
            what = f"some names of tensors begin with {BODY!r}, others do not"
            found.append(RunWarning("names-mixed", what))
        return found

    def _without(self, prefix: str, name: str) -> str | None:
        name = unwrapped(name)
        return self._known(name.removeprefix(prefix)) if name.startswith(prefix) else None

    def _known(self, name: str) -> str | None:
        """Return the recipe's name for a name that may lack `model.`, or may be one of mlx-lm's; None if unknown."""
        recipe = self.recipe
        for candidate in (name, BODY + name):
            if recipe.is_of_another(candidate):
                return candidate
            if recipe.find(candidate) is not None or recipe.drop_of(candidate, self.depths) is not None:
                return recipe.canonical(candidate)
            found = recipe.alias_names.find(recipe.canonical(candidate))
            if found is not None:
                alias = next(alias for alias in recipe.aliases if alias.source == found.template)
                return fill(alias.name, found.i, found.e)
        return None

    def _common_prefix(self, names: Sequence[str]) -> str:
        """Return the shortest prefix without which the recipe knows the names; "" if they have none in common.

        Names that the recipe does not know without any of their prefixes are not considered.
        """
        common: set[str] | None = None
        for name in names:
            prefixes = set(self._prefixes(name))
            if prefixes:
                common = prefixes if common is None else common & prefixes
        return min(common or {""}, key=len)

    def _prefixes(self, name: str) -> Iterator[str]:
        """Yield the prefixes of `name` without which the recipe knows it."""
        start = 0
        while (dot := name.find(".", start)) >= 0:
            start = dot + 1
            if self._known(name[start:]) is not None:
                yield name[:start]


@dataclass(slots=True)
class Spelled:
    """The tensors of a checkpoint, renamed.

    Attributes:
        tensors: By the recipe's names; tensors that the recipe does not know keep their names.
        warnings: Warnings about the names.
        is_bare: Whether the model was saved without its head (names lack `model.`).
    """

    tensors: dict[str, Stored]
    warnings: list[RunWarning] = field(default_factory=list)
    is_bare: bool = False


def spell(
    recipe: Output,
    tensors: Mapping[str, Stored],
    *,
    folder: Place,
    shared: Mapping[str, str] | None = None,
    is_tied: bool = False,
    depths: Mapping[str, int] | None = None,
) -> Spelled:
    """Return the tensors of a checkpoint with the names and shapes that the recipe uses.

    Args:
        recipe: The architecture.
        tensors: The tensors by stored name.
        folder: The folder of the checkpoint, for errors.
        shared: Names of tensors that were not stored because they share the memory of another tensor, with the name of
            that tensor; safetensors records them in a file's metadata.
        is_tied: Whether the config says that the head is tied to the embedding.
        depths: The number of layers of each of the recipe's stacks that the config gives.

    Raises:
        SourceError: Two stored names mean the same tensor, but have different values (`name-collision`).
    """
    speller = Speller(recipe, tensors, depths)
    result = Spelled({}, speller.warnings, speller.is_bare)
    origin: dict[str, str] = {}
    for stored_name, stored in tensors.items():
        name = speller.spell(stored_name) or stored_name
        if name in result.tensors:
            if not has_same_numbers(result.tensors[name], stored):
                what = f"{origin[name]} and {stored_name} both mean {name}, but have different values"
                hint = "remove one of them: the file was saved twice, with a training wrapper and without"
                raise SourceError(what, file=folder, hint=hint, code="name-collision")
            continue
        origin[name] = stored_name
        result.tensors[name] = _in_shape(recipe, name, stored)
    _share(recipe, speller, result.tensors, shared or {}, is_tied)
    return result


def _in_shape(recipe: Output, name: str, stored: Stored) -> Stored:
    """Return a tensor in the recipe's shape if an alias converts the stored shape, else unchanged."""
    found = recipe.find(name)
    for alias in recipe.aliases:
        if found is not None and alias.name == found.template and alias.shape is not None:
            shape = alias.shape(stored.shape)
            if shape is not None and shape != stored.shape:
                return Reshaped(stored, shape)
    return stored


def _share(
    recipe: Output, speller: Speller, tensors: dict[str, Stored], shared: Mapping[str, str], is_tied: bool
) -> None:
    """Add the other name of each tensor that was stored once: shared tensors, and a tied embedding."""
    spelled = {_either(speller, recipe, one): _either(speller, recipe, other) for one, other in shared.items()}
    embedding, head = recipe.embedding, recipe.head
    if is_tied and embedding not in tensors and head in tensors:
        spelled.setdefault(embedding, head)
    for missing, kept in spelled.items():
        if missing in tensors or kept not in tensors or recipe.find(missing) is None:
            continue
        if missing == head and is_tied:
            continue  # a tied model has no separate head
        tensors[missing] = tensors.pop(kept) if (missing, kept) == (embedding, head) and is_tied else tensors[kept]


def _either(speller: Speller, recipe: Output, name: str) -> str:
    return Speller(recipe, [name], speller.depths).spell(name) or name


def has_same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes. Reads both."""
    ours, theirs = one.lazy(), other.lazy()
    if ours.spec != theirs.spec:
        return False
    n_rows = max(1, COMPARED_NBYTES // ours.spec.row_nbytes)
    work = Workspace(Scratch(max(peak_nbytes(ours, n_rows), peak_nbytes(theirs, n_rows))))
    for start in range(0, ours.spec.n_rows, n_rows):
        rows = range(start, min(start + n_rows, ours.spec.n_rows))
        pair = [np.empty(len(rows) * ours.spec.row_nbytes, np.uint8) for _ in range(2)]
        for tensor, out in zip((ours, theirs), pair, strict=True):
            read(tensor, rows, out, work)
        if not np.array_equal(pair[0], pair[1]):
            return False
    return True
