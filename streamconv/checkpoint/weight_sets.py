"""Which files in a folder are the model's weights: a checkpoint folder can hold more than one set of them.

The index decides. Without an index, two complete sets are an error, since neither names nor times show which one is
meant. transformers leaves such folders behind when a model is saved again with another shard size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import RunWarning, SourceError
from streamconv.files.store import Place

INDEX = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
WHOLE = "model.safetensors"  # transformers' name for weights in one file

_PREFIX = "model"  # transformers names shards PREFIX-00001-of-00002.safetensors
_FILE_NAME = re.compile(rb"[^\0/\\]{1,255}")  # no filesystem allows longer names
_NUMBERED_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

NamesOf = Callable[[Place], Collection[str]]


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The files that together hold the weights of one model, in order.

    Attributes:
        label: Its name in messages.
        paths: Its files, including the first missing one, but no further missing ones.
    """

    label: str
    paths: tuple[Place, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all files exist."""
        return self.first_missing is None

    @property
    def first_missing(self) -> Place | None:
        """The first file that does not exist; None if all do."""
        return next((path for path in self.paths if not path.exists()), None)

    @property
    def is_canonical(self) -> bool:
        """Whether transformers would look for these names."""
        match = _NUMBERED_SHARD.fullmatch(self.paths[0].name)
        return self.paths[0].name == WHOLE or (match is not None and match[1] == _PREFIX)


@dataclass(slots=True)
class Choice:
    """The set that will be read.

    Attributes:
        chosen: The set.
        index: The weight_map to check it against; empty if there is none.
        warnings: About sets that were left out.
    """

    chosen: WeightSet
    index: Mapping[str, str] = field(default_factory=dict)
    warnings: list[RunWarning] = field(default_factory=list)


def named_set(file: Place) -> WeightSet:
    """The set that a single .safetensors file names: the file itself, or all shards if it is the first of several.

    Raises:
        SourceError: `file` is, by its name, a later shard.
    """
    match = _NUMBERED_SHARD.fullmatch(file.name)
    if match is None or int(match[3]) <= 1:
        return WeightSet(file.name, (file,))
    if int(match[2]) != 1:
        what = f"is shard {int(match[2])} of {int(match[3])}, not a complete checkpoint"
        raise SourceError(what, file=file, hint=f"name the folder, {file.parent}, or the first shard", code="one-shard")
    return next(one for one in _find_sets(file.parent) if file in one.paths)


def indexed_set(index: Mapping[str, Any], file: Place) -> Choice:
    """The set that an index names.

    Args:
        index: Its parsed content.
        file: The index file.

    Raises:
        SourceError: It has no weight_map, or names a file outside its folder.
    """
    weight_map = _weight_map(index, file)
    paths = tuple(file.parent / name for name in sorted(set(weight_map.values())))
    return Choice(WeightSet(file.name, paths), weight_map)


def choose_weights(directory: Place, index: Mapping[str, Any] | None, names_of: NamesOf) -> Choice:
    """The set of weights in a folder.

    Args:
        directory: The checkpoint's folder.
        index: The content of its INDEX; None if there is no such file.
        names_of: Returns the names of the tensors in a file; none if it cannot be read.

    Raises:
        SourceError: There are no weights, the index names a file outside the folder, or, without an index, two complete
            sets have tensors with the same names (`weight-sets`).
    """
    sets = list(_find_sets(directory))
    if index is not None:
        choice = indexed_set(index, directory / INDEX)
        indexed = choice.chosen
        others = [one for one in sets if not set(one.paths) <= set(indexed.paths)]
        complete = [one for one in others if one.is_complete and one.is_canonical]
        if indexed.is_complete or not complete:
            choice.warnings += _left_out(indexed, others, names_of)
            return choice
        other = _without_index(directory, complete, names_of)
        what = f"{INDEX} names missing files, such as {indexed.first_missing}: {other.chosen.label} was used instead"
        other.warnings.append(RunWarning("weights-index-stale", what))
        return other
    if not sets:
        raise _no_weights(directory)
    return _without_index(directory, sets, names_of)


def _without_index(directory: Place, sets: Sequence[WeightSet], names_of: NamesOf) -> Choice:
    complete = [one for one in sets if one.is_complete]
    if not complete:
        return Choice(sets[0])  # opening its missing shard raises the error
    preferred = complete[0] if len(complete) == 1 else next((one for one in complete if one.is_canonical), None)
    if preferred is None:
        raise _several(directory, complete)
    rivals = [one for one in complete if one is not preferred and _share_names(preferred, one, names_of)]
    if rivals:
        raise _several(directory, [preferred, *rivals])
    rest = [one for one in sets if one is not preferred and one not in complete]
    return Choice(preferred, {}, list(_left_out(preferred, rest, names_of)))


def _left_out(chosen: WeightSet, others: Sequence[WeightSet], names_of: NamesOf) -> Iterator[RunWarning]:
    """A warning for each other set that has tensors with the same names."""
    for other in others:
        if _share_names(chosen, other, names_of):
            state = "" if other.is_complete else ", which is incomplete,"
            what = f"{other.label}{state} was left out: the weights are those of {chosen.label}"
            yield RunWarning("weights-left-out", f"{what} (to convert others, name their first file)")


def _share_names(one: WeightSet, other: WeightSet, names_of: NamesOf) -> bool:
    """Whether both sets have a tensor of the same name, not counting files that belong to both."""
    theirs = [path for path in other.paths if path not in one.paths and path.exists()]
    names = {name for path in theirs for name in names_of(path)}
    return bool(names) and any(not names.isdisjoint(names_of(path)) for path in one.paths if path.exists())


def _several(directory: Place, sets: Sequence[WeightSet]) -> SourceError:
    labels = ", ".join(one.label for one in sets)
    hint = f"name the first file of the one to convert, as {sets[0].paths[0]}, or remove the others"
    return SourceError(
        f"{len(sets)} sets of weights and no {INDEX} to choose between them: {labels}",
        file=directory,
        hint=hint,
        code="weight-sets",
    )


def _find_sets(directory: Place) -> Iterator[WeightSet]:
    """All sets in a folder, judged by file names; those with transformers' own names come first."""
    numbered: dict[tuple[str, str], list[int]] = {}
    sets = []
    for path in sorted(directory.glob("*.safetensors"), key=lambda path: path.name):
        match = _NUMBERED_SHARD.fullmatch(path.name)
        if match is not None and 1 <= int(match[2]) <= int(match[3]):
            numbered.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            sets.append(WeightSet(path.name, (path,)))
    sets += [_numbered(directory, prefix, count, found) for (prefix, count), found in numbered.items()]
    yield from sorted(sets, key=lambda one: not one.is_canonical)


def _numbered(directory: Place, prefix: str, count: str, found: Sequence[int]) -> WeightSet:
    """The shards `found`, in order, and the first missing one (only that: a name can claim 99,999 shards)."""
    missing = next((number for number, other in enumerate(found, 1) if number != other), len(found) + 1)
    numbers = [*found, missing] if missing <= int(count) else found
    paths = tuple(directory / f"{prefix}-{number:05d}-of-{count}.safetensors" for number in sorted(numbers))
    return WeightSet(f"{prefix}-*-of-{count}.safetensors", paths)


def _weight_map(index: Mapping[str, Any], file: Place) -> Mapping[str, str]:
    """The file name of each tensor; SourceError if there is no such map, or it names files outside the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("the index has no weight_map", file=file, hint="download it again", code="index")
    for tensor, name in weight_map.items():
        raw = name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b""
        if not _FILE_NAME.fullmatch(raw) or name in (".", ".."):
            what = f"the index names {name!r:.80}, which is not a file in the same folder"
            raise SourceError(what, file=file, tensor=tensor, code="index")
    return weight_map


def _no_weights(directory: Place) -> SourceError:
    if any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.pth")):
        return SourceError(
            "only pickled weights (pytorch_model.bin), which are never loaded here",
            file=directory,
            hint="get the safetensors version, or save it with transformers: model.save_pretrained(folder)",
            code="pickled",
        )
    return SourceError("no .safetensors file", file=directory, hint="download the weights as well", code="no-weights")
