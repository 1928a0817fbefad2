"""Errors for a checkpoint that does not match its recipe: the likely cause, then one example of each kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from streamconv.checkpoint.config import Config
from streamconv.errors import SourceError
from streamconv.recipe.names import match_name

MAX_NAMES_SHOWN = 4
MAX_PROBLEMS_SHOWN = 6
MAX_SHAPES_SHOWN = 2  # a config of another size makes all of them wrong
MAX_KINDS_SHOWN = 4
MIN_LIKENESS = 0.7  # of two names, as difflib measures it, for one to be shown as what the other may mean
MAX_COMPARED = 64  # kinds of names: comparing is quadratic


class Problem(NamedTuple):
    """One of the reasons why a checkpoint cannot be bound to a recipe."""

    code: str
    message: str


def first_few(items: Sequence[object]) -> str:
    """Return the first few items as text, and the number of others."""
    more = f" and {len(items) - MAX_NAMES_SHOWN} more" if len(items) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(str, items[:MAX_NAMES_SHOWN])) + more


def kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their template: one with every number left open."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(match_name(name)[0], []).append(name)
    return found


def listed(names: Iterable[str], closest: Mapping[str, str] | None = None) -> str:
    """Return one name of each kind and the number of others, with the closest known names."""
    by_kind = kinds(names)
    shown = []
    for template, of_kind in [*by_kind.items()][:MAX_KINDS_SHOWN]:
        notes = [f"and {len(of_kind) - 1} more"] if len(of_kind) > 1 else []
        notes += [f"closest is {closest[template]}"] if closest and template in closest else []
        shown.append(f"{of_kind[0]} ({', '.join(notes)})" if notes else of_kind[0])
    rest = sum(len(of_kind) for of_kind in [*by_kind.values()][MAX_KINDS_SHOWN:])
    return ", ".join(shown) + (f" and {rest} more of {len(by_kind) - MAX_KINDS_SHOWN} other kinds" if rest else "")


def closest(unknown: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Return, by kind of unknown name, the most similar known name, if one is similar enough."""
    found = {}
    templates = list(dict.fromkeys(known))
    for template in [*kinds(unknown)][:MAX_COMPARED]:
        if alike := get_close_matches(template, templates[: MAX_COMPARED * 4], n=1, cutoff=MIN_LIKENESS):
            found[template] = alike[0]
    return found


def cause(codes: Collection[str], sizes: Sequence[str], arch: str, class_names: Sequence[str]) -> tuple[str, str]:
    """Return the likely cause of problems with these codes, and a hint.

    Args:
        codes: Of all problems.
        sizes: What the config says of dims that the tensors' shapes contradict, as "hidden_size=64, the tensors 96".
        arch: The recipe's.
        class_names: As the config names the model.
    """
    named = " and ".join(class_names) or arch
    if sizes:
        what = f"config.json and the tensors belong to different models: config.json has {'; '.join(sizes[:3])}"
        return what, "use the config.json with which the tensors were saved"
    if {"tensors-unknown", "tensors-missing"} <= set(codes):
        what = f"the names of its tensors are not those of {named}"
        return what, "config.json must belong to this checkpoint and name its class"
    if "tensors-unknown" in codes:
        return f"it has tensors that {named} does not have", "it may be another architecture, or an extended model"
    if codes and set(codes) <= {"tensors-missing", "head-missing"}:
        return "it is incomplete", "download or copy the missing files again, or save the complete model again"
    return "", "config.json must belong to this checkpoint"


def mismatch(
    arch: str, config: Config, problems: Sequence[Problem], sizes: Sequence[str], refusals: Sequence[Problem]
) -> SourceError:
    """Return the error for a checkpoint that disagrees with its recipe, or that the runtime does not support.

    Args:
        sizes: What the config says of dims that the tensors' shapes contradict.
        refusals: Features that the runtime does not support; they are listed first.
    """
    all_problems = [*refusals, *problems]
    listed_problems = [problem._asdict() for problem in all_problems]
    folder, what, shown = config.file.parent, f"cannot be converted as {arch}", _in_short(all_problems)
    if not problems:
        hint = "llama.cpp would compute something else: run it with transformers"
        return SourceError(
            f"{what}: {shown}", file=folder, hint=hint, problems=listed_problems, code="model-unrunnable"
        )
    names = config.whole.list_of("architectures", str) or []
    likely, hint = cause({problem.code for problem in problems}, sizes, arch, names)
    return SourceError(
        f"{what}: {likely}{': ' if likely else ''}{shown}",
        file=folder,
        hint=hint,
        problems=listed_problems,
        code="checkpoint-mismatch",
    )


def _in_short(problems: Sequence[Problem]) -> str:
    shapes = [problem for problem in problems if problem.code == "shape-mismatch"]
    chosen = [problem for problem in problems if problem not in shapes[MAX_SHAPES_SHOWN:]][:MAX_PROBLEMS_SHOWN]
    more = f"; and {len(problems) - len(chosen)} more" if len(problems) > len(chosen) else ""
    return "; ".join(problem.message for problem in chosen) + more
