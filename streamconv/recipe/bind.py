"""Holding a recipe against a checkpoint: every source tensor accounted for, or every disagreement listed at once.

Owns: settling each layer's kind, choosing the sources of each target, and making its lazy tensor. Does not own: what a
recipe says (language.py), how large its dims are (dims.py), what is done with the targets (engine/).
Invariants: a source that no row takes is an error, and so is a row that finds nothing, a second source of one target, a
shape that disagrees, a gap in {i} or {e}. A value that the config states must agree with the tensors; one that is
absent or null yields to them. Work is bounded by the number of tensors stored, not by what a config claims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from streamconv.checkpoint.config import Config
from streamconv.errors import RunWarning, SourceError
from streamconv.lazy.arithmetic import widened
from streamconv.lazy.leaves import Resident
from streamconv.lazy.views import Stack
from streamconv.recipe.dims import Equation, extents, parse_extent, parse_shape, solve_dims, stated_dims
from streamconv.recipe.language import Model, Output, Recipe, Stored, Target
from streamconv.recipe.mismatch import cause, closest, listed
from streamconv.recipe.names import NONE, fill, has_experts, match_name, stack_of
from streamconv.recipe.ops import first_fault
from streamconv.recipe.words import Caveat, Computed, Tensor

MAX_LAYERS = 10_000  # no checkpoint has more; bounds what a hostile config can make us list
MAX_NAMES_SHOWN = 4
MAX_PROBLEMS_SHOWN = 6
MAX_SHAPES_SHOWN = 2  # a config of another size makes all of them wrong


def bind(
    recipe: Output,
    config: Config,
    stored: Mapping[str, Stored],
    main: Model | None = None,
    *,
    is_body: bool = False,
) -> Model:
    """The recipe with every dim, kind and tensor of a checkpoint; SourceError listing all disagreements at once.

    `main`: of a further output, the model that it comes with. `is_body`: the model was saved without its head, so that
    one that is not tied is incomplete.
    """
    return _Binding(recipe, config, stored, main, is_body).bind()


def bind_outputs(recipe: Recipe, model: Model, stored: Mapping[str, Stored]) -> list[Model]:
    """The further outputs of a checkpoint whose `model` is bound: those that it has tensors of, or must have."""
    found = []
    for output in recipe.outputs:
        own = {name: tensor for name, tensor in stored.items() if output.find(name) or output.drop_of(name, {})}
        if own or output.is_required:
            found.append(bind(output, model.config, own, model))
    return found


@dataclass(frozen=True, slots=True)
class _Choice:
    """How one target will be made: the row that gives it, and the sources it takes."""

    name: str
    row: Tensor | Computed
    sources: tuple[str, ...]


class Problem(NamedTuple):
    """One of the reasons why a checkpoint cannot be bound to a recipe."""

    code: str
    message: str


class _Binding:
    """One run of `bind`; exists to collect problems."""

    def __init__(
        self, recipe: Output, config: Config, stored: Mapping[str, Stored], main: Model | None, is_body: bool
    ) -> None:
        self.is_body = is_body
        self.recipe, self.config, self.stored, self.main = recipe, recipe.config_of(config), stored, main
        self.problems: list[Problem] = []
        self.missing: list[str] = []
        self.unknown: list[str] = []
        self.sizes: dict[str, None] = {}  # what the config says of dims, against the tensors' shapes
        self.forbidden: dict[str, list[str]] = {}  # flag of the config -> tensors that it denies
        self.unsaid: dict[str, list[str]] = {}  # flag that the config lacks -> tensors that it would ask for
        self.dims: dict[str, int] = {}
        # template -> layer -> expert -> source name; what a name has no number for is NONE
        self.found: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        self.rows_of: dict[str, list[Tensor]] = defaultdict(list)
        for row in recipe.tensors:
            self.rows_of[row.source].append(row)

    def bind(self) -> Model:
        self._match_names()
        self._solve()
        model = Model(self.recipe, self.config, self.dims, main=self.main)
        self._settle_kinds(model)
        choices = list(self._choices(model))
        self._check_accounts(choices)
        self._check_head(model)
        for flag, names in self.unsaid.items():
            what = f"no {flag} in config.json, and there are {listed(names)}: written, where transformers ignores them"
            model.warnings.append(RunWarning("flag-missing", what))
        refusals = []
        if model.dims.keys() >= self.recipe.dims.keys():
            for one in (*self.recipe.refusals, *self.recipe.caveats):
                told = one.of(model)
                if told is not None and isinstance(one, Caveat):
                    model.warnings.append(RunWarning(one.code, told))
                elif told is not None:
                    refusals.append(Problem("unrunnable", told))
        if self.problems or refusals:
            raise self._error(refusals)
        model.targets += [target for choice in choices if (target := self._make(model, choice))]
        return model

    def _match_names(self) -> None:
        unknown = []
        stated = stated_dims(self.recipe, self.config)
        depths = {stack: stated[dim] for stack, dim in self.recipe.stacks.items() if dim in stated}
        for name in self.stored:
            if self.recipe.drop_of(name, depths) is not None:
                continue
            found = self.recipe.find(name)
            if found is None:
                if not self.recipe.is_of_another(name):
                    unknown.append(name)
            elif found.template in self.rows_of:
                other = self.found[found.template][found.i].setdefault(found.e, name)
                if other is not name:
                    self._problem("tensor-twice", f"{other} and {name} are the same tensor")
        if unknown:
            self.unknown = unknown

    # -- dims

    def _solve(self) -> None:
        """All dims, layers and experts counted; where config and shapes disagree is a problem."""
        stated = stated_dims(self.recipe, self.config)
        counted = dict(stated)
        for stack, count in self.recipe.stacks.items():
            if count not in self.recipe.dims:
                continue
            layers = (max(by) for template, by in self.found.items() if by and stack_of(template) == stack)
            counted.setdefault(count, 1 + max(layers, default=NONE))
            if not self.recipe.dims[count].minimum <= counted[count] <= MAX_LAYERS:
                raise SourceError(
                    f"{counted[count]} layers are not a model", file=self.config.file.parent, code="layer-count"
                )
        if n_experts := 1 + max((e for by in self.found.values() for es in by.values() for e in es), default=NONE):
            counted.setdefault("E", n_experts)
        self.dims = solve_dims(self.recipe, counted, self._equations())
        for name, dim in self.recipe.dims.items():
            if name not in self.dims:
                self._problem("dim-unknown", f"{dim.label} is not in config.json and does not follow from the tensors")
        for template in self.found:
            self._check_shapes(self.rows_of[template], list(self._names(template)), stated)

    def _names(self, template: str) -> Iterator[str]:
        return (name for by_expert in self.found[template].values() for name in by_expert.values())

    def _equations(self) -> Iterator[Equation]:
        for template in self.found:
            for row in self.rows_of[template]:
                extents_ = parse_shape(row.shape)
                for shape in dict.fromkeys(self.stored[name].shape for name in self._names(template)):
                    if len(shape) == len(extents_):
                        yield from map(Equation, extents_, shape)

    def _check_shapes(self, rows: Sequence[Tensor], names: Sequence[str], stated: Mapping[str, int]) -> None:
        """The rows of one source against all tensors of its name; the first that disagrees stands for all."""
        for row in rows:
            expected = extents(row.shape, self.dims)
            if expected is None:
                continue
            wrong = [name for name in names if self.stored[name].shape != expected]
            if wrong:
                self._note_sizes(row, self.stored[wrong[0]].shape, stated)
                used = dict.fromkeys(name for one in parse_shape(row.shape) for name in one.names if name in stated)
                origin = ", ".join(f"{self.recipe.dims[f].label}={stated[f]}" for f in used)
                self._problem(
                    "shape-mismatch",
                    f"{wrong[0]} has shape {list(self.stored[wrong[0]].shape)}, expected {list(expected)}"
                    + (f" from {origin}" if origin else "")
                    + (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""),
                )
                return
            if (fault := self._op_fault(row, expected, len(names))) is not None:
                self._problem("op-shape", f"{names[0]} {fault}")
                return

    def _note_sizes(self, row: Tensor, shape: tuple[int, ...], stated: Mapping[str, int]) -> None:
        """Note the dims of a row that the config states otherwise than a tensor of this shape."""
        for extent, found in zip(parse_shape(row.shape), shape, strict=len(parse_shape(row.shape)) == len(shape)):
            if extent.text in stated and len(shape) == len(parse_shape(row.shape)) and stated[extent.text] != found:
                said = f"{self.recipe.dims[extent.text].label}={stated[extent.text]}"
                self.sizes[f"{said}, the tensors {found}"] = None

    def _op_fault(self, row: Tensor, shape: tuple[int, ...], n_names: int) -> str | None:
        """What is wrong with sources of `shape` for the row's operations, where all their dims are known."""
        if any(name not in self.dims for op in row.ops for text in op.dims() for name in parse_extent(text).names):
            return None
        stacked = (min(self.dims.get("E", 1), n_names), *shape) if has_experts(row.source) else shape
        return first_fault(row.ops, stacked, Model(self.recipe, self.config, self.dims, main=self.main))

    # -- kinds

    def _settle_kinds(self, model: Model) -> None:
        """Each layer's kind on each axis, by the tensors it has; checked against what the config claims."""
        for axis, kinds in self.recipe.axes.items():
            evidence: dict[str, set[int]] = {kind: set() for kind in kinds}
            for row in self.recipe.tensors:
                if row.only.startswith(f"{axis}="):
                    evidence[row.only.partition("=")[2]].update(self.found.get(row.source, ()))
            n_layers = model.depth(self.recipe.stack_of_axis(axis))
            present = [[kind for kind in kinds if i in evidence[kind]] for i in range(n_layers)]
            self._report_layers([i for i, p in enumerate(present) if not p], f"no tensors of {' or '.join(kinds)}")
            self._report_layers([i for i, p in enumerate(present) if len(p) > 1], f"tensors of {' and '.join(kinds)}")
            settled = [p[0] if p else "" for p in present]
            model.kinds[axis] = settled
        for claim in self.recipe.claims:
            settled = model.kinds[claim.axis]
            if (claimed := claim.kinds(self.config, len(settled))) is not None:
                self._check_claim(claim.key, claimed, settled)

    def _report_layers(self, layers: Sequence[int], what: str) -> None:
        if layers:
            self._problem("layer-tensors", f"layer{'s' if len(layers) > 1 else ''} {_listed(layers)} with {what}")

    def _check_claim(self, key: str, claimed: Sequence[str], settled: Sequence[str]) -> None:
        if len(claimed) != len(settled):
            self._problem(
                "config-contradiction",
                f"{key} in config.json is of {len(claimed)} layers, and there are {len(settled)}",
            )
        wrong = [i for i, (theirs, ours) in enumerate(zip(claimed, settled, strict=False)) if ours and theirs != ours]
        if wrong:
            i = wrong[0]
            self._problem(
                "config-contradiction",
                f"{key} in config.json makes layer {i} {claimed[i]!r}, its tensors are those of {settled[i]!r}"
                + (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""),
            )

    # -- targets

    def _choices(self, model: Model) -> Iterator[_Choice]:
        """What makes each target, in the recipe's order; targets of the layers that stand together layer by layer."""
        by_target: dict[str, list[Tensor | Computed]] = {}
        rows: tuple[Tensor | Computed, ...] = (*self.recipe.tensors, *self.recipe.computed)
        for row in rows:
            by_target.setdefault(row.target, []).append(row)
        for stack, targets in groupby(by_target, stack_of):
            if stack is None:
                for target in targets:
                    yield from self._choose(by_target[target], None)
            else:
                yield from self._choices_of_layers(model, stack, {target: by_target[target] for target in targets})

    def _choices_of_layers(
        self, model: Model, stack: str, by_target: Mapping[str, Sequence[Tensor | Computed]]
    ) -> Iterator[_Choice]:
        layers_of = [[(row, set(model.layers(row))) for row in rows] for rows in by_target.values()]
        for i in range(model.depth(stack)):
            for rows in layers_of:
                yield from self._choose([row for row, layers in rows if i in layers], i)

    def _choose(self, rows: Sequence[Tensor | Computed], i: int | None) -> Iterator[_Choice]:
        """The one row that gives a target (of layer `i`); more than one, or none where one must, is a problem."""
        tensors = [row for row in rows if isinstance(row, Tensor)]
        stored = [
            (row, names) for row in tensors if (names := self.found.get(row.source, {}).get(NONE if i is None else i))
        ]
        if len(stored) > 1:
            firsts = _listed([next(iter(names.values())) for _, names in stored])
            self._problem("tensor-sources", f"{fill(rows[0].target, i)} has {len(stored)} sources: {firsts}")
        if stored:
            row, names = stored[0]
            yield _Choice(fill(row.target, i), row, self._in_order(row, i, names))
            return
        if tensors and self._is_due(tensors[0]):
            self.missing.append(fill(tensors[0].source, i, 0))
        for computed in rows:
            if isinstance(computed, Computed):
                yield _Choice(fill(computed.target, i), computed, ())

    def _is_due(self, row: Tensor) -> bool:
        return self.config.flag(row.required) is True if isinstance(row.required, str) else row.required

    def _in_order(self, row: Tensor, i: int | None, by_expert: Mapping[int, str]) -> tuple[str, ...]:
        """The sources of one target, experts by number; a gap between them is noted."""
        if isinstance(row.required, str):
            self._check_flag(row.required, list(by_expert.values()))
        n_experts = self.dims.get("E", 0) if has_experts(row.source) else 0
        present = {e: name for e, name in sorted(by_expert.items()) if e < n_experts or not n_experts}
        if len(present) < n_experts:
            gap = next((e for e, found in enumerate(present) if e != found), len(present))
            self.missing.append(fill(row.source, i, gap))
        return tuple(present.values())

    def _check_flag(self, flag: str, names: Sequence[str]) -> None:
        """Note tensors that a flag of the config denies, and those that transformers would leave out without it."""
        stated = self.config.flag(flag)
        if stated is False:
            self.forbidden.setdefault(flag, []).extend(names)
        elif stated is None and self.recipe.flags.get(flag) is False:
            self.unsaid.setdefault(flag, []).extend(names)

    def _check_accounts(self, choices: Sequence[_Choice]) -> None:
        """Every tensor found is taken by a target, and every tensor that must be there was found."""
        if self.unknown:
            known = [match_name(name)[0] for name in self.missing] or [row.source for row in self.recipe.tensors]
            shown = listed(self.unknown, closest(self.unknown, known))
            self._problem("tensors-unknown", f"unknown tensors: {shown}")
        if self.missing:
            self._problem("tensors-missing", f"missing tensors: {listed(self.missing)}")
        for flag, names in self.forbidden.items():
            self._problem(
                "config-contradiction", f"config.json says that {flag} is false, and there are {listed(names)}"
            )
        taken = {source for choice in choices for source in choice.sources}
        left = [name for template in self.found for name in self._names(template) if name not in taken]
        if left:
            counting = {*self.recipe.stacks.values(), "E"} & self.dims.keys()
            counts = [f"{dim.label}={self.dims[n]}" for n, dim in self.recipe.dims.items() if n in counting]
            self._problem(
                "tensors-misplaced", f"tensors with no place in the model ({', '.join(counts)}): {listed(left)}"
            )

    def _check_head(self, model: Model) -> None:
        """A head that is stored is always written; a config that promises one must have it."""
        if not self.recipe.head:
            return
        has_head = self.recipe.head in self.found
        stated = self.recipe.stated_tie(self.config)
        tied = self.recipe.tied_by_default if stated is None else stated
        if not has_head and not tied and (stated is not None or self.is_body):
            self._problem(
                "head-missing", f"the config says untied and there is no {self.recipe.head}: an incomplete checkpoint"
            )
        elif not has_head and not tied:
            model.warnings.append(
                RunWarning("head-missing", f"no {self.recipe.head} in the checkpoint: written as a tied model")
            )
        elif has_head and stated:
            model.warnings.append(
                RunWarning("head-on-tied", "the config says tied and a head is stored: it is written", self.recipe.head)
            )

    def _make(self, model: Model, choice: _Choice) -> Target | None:
        """The node chain of one target; None where a computed one has no value."""
        row = choice.row
        if isinstance(row, Computed):
            array = row.value(model)
            return None if array is None else Target(choice.name, Resident(array), row)
        lazy = [self.stored[name].lazy() for name in choice.sources]
        if has_experts(row.source):
            if len({tensor.spec.dtype for tensor in lazy}) > 1:
                lazy = [widened(tensor) for tensor in lazy]
            lazy = [Stack(lazy)]
        return Target(choice.name, model.made(row, lazy[0]), row)

    def _problem(self, code: str, message: str) -> None:
        self.problems.append(Problem(code, message))

    def _error(self, refusals: Sequence[Problem]) -> SourceError:
        problems = [*refusals, *self.problems]
        shapes = [problem for problem in problems if problem.code == "shape-mismatch"]
        chosen = [problem for problem in problems if problem not in shapes[MAX_SHAPES_SHOWN:]][:MAX_PROBLEMS_SHOWN]
        shown = "; ".join(problem.message for problem in chosen)
        if len(problems) > len(chosen):
            shown += f"; and {len(problems) - len(chosen)} more"
        listed_problems = [problem._asdict() for problem in problems]
        folder, what = self.config.file.parent, f"cannot be converted as {self.recipe.arch}"
        if not self.problems:
            hint = "llama.cpp would compute another model: run it with transformers"
            return SourceError(
                f"{what}: {shown}", file=folder, hint=hint, problems=listed_problems, code="model-unrunnable"
            )
        names = self.config.whole.list_of("architectures", str) or []
        likely, hint = cause({problem.code for problem in self.problems}, [*self.sizes], self.recipe.arch, names)
        return SourceError(
            f"{what}: {likely}{': ' if likely else ''}{shown}",
            file=folder,
            hint=hint,
            problems=listed_problems,
            code="checkpoint-mismatch",
        )


def _listed(items: Sequence[object]) -> str:
    """A few of the items, and how many more there are."""
    more = f" and {len(items) - MAX_NAMES_SHOWN} more" if len(items) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(str, items[:MAX_NAMES_SHOWN])) + more
