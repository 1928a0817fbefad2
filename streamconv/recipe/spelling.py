"""How other programs spell a model's names and lay its tensors out, brought to the way in which recipes are written.

Training wrappers stand before names or inside them, a model that was saved without its head has no `model.`, mlx-lm has
names and shapes of its own, a tied model may have kept the other one of its two names. Models and adapters go through
here, between the checkpoint and the recipe: what comes out is a mapping under the recipe's names, and warnings.
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

# What wrappers put before a name, or into it: torch.compile, DataParallel, FSDP and its activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
PEFT_PREFIX = "base_model.model."
BODY = "model."  # transformers' name of what a model is without its head

COMPARED_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A stored tensor seen under another shape, its elements in the same order."""

    stored: Stored
    shape: tuple[int, ...]

    def lazy(self) -> LazyTensor:
        return reshaped(self.stored.lazy(), self.shape)


def unwrapped(name: str) -> str:
    """`name` without the segments of training wrappers, and without PEFT's prefix, however often it stands there."""
    name = ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    return name


class Speller:
    """Finds the recipe's name for each of the names of one file set, which one program wrote.

    Attributes:
        prefix: An unknown beginning that names have in common, without which they are the recipe's; "" for none.
        is_bare: Whether names lack `model.`, as of a model that was saved without its head.
    """

    def __init__(self, recipe: Output, names: Iterable[str], depths: Mapping[str, int] | None = None) -> None:
        self.recipe, self.depths = recipe, depths or {}
        self.prefix, self.is_bare, self.is_prefixed = "", False, False
        known: dict[str, str | None] = {name: self._known(unwrapped(name)) for name in names}
        self._found = {name: found for name, found in known.items() if found is not None}
        strange = [name for name in known if name not in self._found]
        prefix = self._common_prefix([unwrapped(name) for name in strange])
        more = {name: found for name in strange if (found := self._without(prefix, name)) is not None}
        if prefix and len(more) > len(self._found):  # else it may be a tensor whose name ends as another's
            self.prefix = prefix
            self._found |= more
        for name, found in self._found.items():
            spelled = unwrapped(name).removeprefix(self.prefix)
            # A head stands outside of the body, though a recipe without one has it as another name of the embedding.
            has_body = found.startswith(BODY) and recipe.canonical(spelled) != recipe.head
            self.is_bare |= has_body and not spelled.startswith(BODY)
            self.is_prefixed |= has_body and spelled.startswith(BODY)

    def spell(self, name: str) -> str | None:
        """The recipe's name for `name`, None where it has none."""
        return self._found.get(name)

    def find(self, name: str) -> str | None:
        """The recipe's name for one more name of the same program's, None where it has none."""
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
        """The recipe's name for one that may lack `model.`, or have it twice, or be mlx-lm's."""
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
        """The shortest beginning that all of the names have, and without which all that ever fit are known."""
        common: set[str] | None = None
        for name in names:
            prefixes = set(self._prefixes(name))
            if prefixes:
                common = prefixes if common is None else common & prefixes
        return min(common or {""}, key=len)

    def _prefixes(self, name: str) -> Iterator[str]:
        """The beginnings of `name` without which the recipe knows it."""
        start = 0
        while (dot := name.find(".", start)) >= 0:
            start = dot + 1
            if self._known(name[start:]) is not None:
                yield name[:start]


@dataclass(slots=True)
class Spelled:
    """The tensors of a checkpoint under the recipe's names; those that it has no name for keep theirs."""

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
    """The tensors of a checkpoint under the names and in the shapes that the recipe has for them.

    Args:
        recipe: The architecture.
        tensors: By stored name.
        folder: What errors name.
        shared: Names that stand for another tensor's numbers, as safetensors notes them in a file's metadata.
        is_tied: Whether the config says that the head is the embedding.
        depths: Of the recipe's stacks, as far as the config gives them.

    Raises:
        SourceError: Two names mean one tensor, and have other numbers (`name-collision`).
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
    """A tensor in the shape that the recipe has, where an alias knows the stored one."""
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
    """Give tensors that were stored once their other name: what the file says of them, and a tied embedding."""
    spelled = {_either(speller, recipe, one): _either(speller, recipe, other) for one, other in shared.items()}
    embedding, head = recipe.embedding, recipe.head
    if is_tied and embedding not in tensors and head in tensors:
        spelled.setdefault(embedding, head)
    for missing, kept in spelled.items():
        if missing in tensors or kept not in tensors or recipe.find(missing) is None:
            continue
        if missing == head and is_tied:
            continue  # a tied model has no head of its own
        tensors[missing] = tensors.pop(kept) if (missing, kept) == (embedding, head) and is_tied else tensors[kept]


def _either(speller: Speller, recipe: Output, name: str) -> str:
    return Speller(recipe, [name], speller.depths).spell(name) or name


def has_same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are the same bytes under the same dtype and shape."""
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
