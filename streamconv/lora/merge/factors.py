"""Add products of LoRA factors to the weights that they change, with DoRA's magnitudes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.checkpoint.config import MAX_NUMBER
from streamconv.files.store import Place
from streamconv.lazy.arithmetic import AddProduct, ColumnMagnitudes, RowMagnitudes
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import Stack, matrix_of, transposed
from streamconv.lora.base import N_VOCAB, BaseModel
from streamconv.lora.config import LoraConfig, MlxConfig, Problem
from streamconv.lora.merge.experts import single_rows, unstacked
from streamconv.lora.merge.weights import Finding, Step, Weights, finding
from streamconv.lora.merge.whole import REPLACING
from streamconv.lora.resolve import LoraModule, resolve
from streamconv.lora.specs import Adapter
from streamconv.recipe.language import Model
from streamconv.recipe.names import fill
from streamconv.recipe.operation import factors_through
from streamconv.recipe.words import Tensor

AT_RUNTIME = "apply the adapter at runtime instead (streamconv lora)"

# These rule out a GGUF adapter, but not a merge; this module checks whether they can be merged.
_MERGEABLE = frozenset(("dora", "tokens", *REPLACING))


@dataclass(frozen=True, slots=True)
class _Product:
    """A change of the stored tensor `name`: scale * left @ right."""

    name: str
    left: LazyTensor
    right: LazyTensor


@dataclass(frozen=True, slots=True)
class _Magnitudes:
    """The norms that DoRA gives a changed matrix: one per row, or one per column for PEFT's embeddings."""

    vector: LazyTensor
    by_column: bool

    def of(self, tensor: LazyTensor) -> LazyTensor:
        return (ColumnMagnitudes if self.by_column else RowMagnitudes)(tensor, self.vector)


def base_of(directory: Place, weights: Weights) -> BaseModel:
    """Return the base as its adapters see it: the head of a tied base counts as a separate matrix."""
    model, recipe = weights.model, weights.recipe
    head = {row.target for row in recipe.tensors if row.source == recipe.head}
    return BaseModel(
        path=directory,
        model=replace(model, dims=model.dims | {N_VOCAB: weights.n_vocab}),
        is_tied=False,
        keys=(),
        targets=frozenset(head | {target.name for target in model.targets}),
        is_merged=True,
    )


def add_products(weights: Weights, base: BaseModel, adapter: Adapter, config: LoraConfig, *, is_single: bool) -> Step:
    """Add the adapter's products to the weights. `is_single`: there is no other adapter."""
    resolved = resolve(adapter.file, base, config)
    magnitudes, of_magnitudes = _magnitudes(adapter, config, resolved.modules, is_single=is_single)
    findings = [Finding(adapter, problem) for problem in resolved.problems if problem.code not in _MERGEABLE]
    if config.invocation_tokens:
        what = "an activated LoRA is switched on by tokens at runtime, which a merge cannot express"
        findings.append(finding(adapter, "alora", what))
    findings += of_magnitudes
    singles = single_rows(weights.recipe)
    weights = unstacked(weights, resolved.modules, singles)
    made: dict[str, LazyTensor] = {}
    origins = []
    for module in resolved.modules:
        if _is_one(weights, module, singles) and _stored_stack(weights, module) is None:
            what = f"the base stores experts' gate and up as one tensor, and the adapter has one of them; {AT_RUNTIME}"
            findings.append(finding(adapter, "experts", what, module.name))
            continue
        for product in _products(weights, module, singles):
            before = made.get(product.name) or weights.now(product.name)
            fault = _fault(weights, adapter, module, product, before)
            if fault is not None:
                findings.append(Finding(adapter, fault))
                continue
            changed = _changed(before, product, module.scale * adapter.weight)
            norms = magnitudes.get(module.name)
            made[product.name] = changed if norms is None else norms.of(changed)
        origins.append(f"{module.name} {module.slot.order} {module.scale!r} {module.turned}")
    return Step(weights.changed(adapter, made), findings, resolved.warnings, origins)


def _fault(
    weights: Weights, adapter: Adapter, module: LoraModule, product: _Product, before: LazyTensor
) -> Problem | None:
    """Why a product cannot be added to `before`."""
    name, scale = product.name, module.scale * adapter.weight
    whole, n_rows = weights.wholes.get(name), product.left.spec.n_rows
    if whole is not None and whole.is_trained and whole.adapter is not adapter:
        return Problem("twice", f"{whole.adapter.label} replaces {name}", (module.name,))
    if not abs(scale) <= MAX_NUMBER:
        return Problem("scale", f"its scale would be {scale:g}, which exceeds float32", (module.name,))
    if n_rows != before.spec.n_rows:  # the vocabulary was enlarged, but the frozen rows are missing
        what = f"its factors are for {n_rows} rows, but {name} has {before.spec.n_rows}"
        return Problem("vocabulary", what, (module.name,))
    return None


def _changed(before: LazyTensor, product: _Product, scale: float) -> LazyTensor:
    """`before` with the product added; if it is a stack, each matrix gets the product of the same number."""
    left, right = product.left, product.right
    if len(before.spec.shape) == 2:
        return AddProduct(before, left, right, scale)
    n, n_rows, _ = before.spec.shape
    n_left, n_right = left.spec.shape[-2], right.spec.shape[-2]
    return Stack(
        [
            AddProduct(matrix_of(before, e, n_rows), matrix_of(left, e, n_left), matrix_of(right, e, n_right), scale)
            for e in range(n)
        ]
    )


def _products(weights: Weights, module: LoraModule, singles: Mapping[str, Tensor]) -> Iterator[_Product]:
    """A product for each stored tensor that the module changes; experts are split up if the recipe supports that."""
    model, slot, (layer, number, expert) = weights.model, module.slot, module.slot.order
    row = model.recipe.tensors[number]
    if _is_one(weights, module, singles):
        name = _stored_stack(weights, module)
        assert name is not None
        yield _Product(name, module.b, module.a)
    elif slot.n_experts and slot.expert is None:
        yield from _products_of_stack(model, module, singles)
    elif slot.n_experts:
        yield _Product(fill(singles[row.target].source, layer, expert), module.b, module.a)
    elif slot.is_embedding:
        yield _Product(row.source, transposed(module.a), transposed(module.b))
    else:
        yield _Product(fill(row.source, layer, expert), module.b, module.a)


def _is_one(weights: Weights, module: LoraModule, singles: Mapping[str, Tensor]) -> bool:
    """Whether a module changes all experts of a layer at once, and the recipe has no rows for single ones."""
    slot = module.slot
    is_stack = bool(slot.n_experts) and slot.expert is None
    return is_stack and weights.recipe.tensors[slot.order[1]].target not in singles


def _stored_stack(weights: Weights, module: LoraModule) -> str | None:
    """The stored tensor with all experts of a layer in the module's layout, or None.

    An adapter may use the name of another row that has the same target, shape and operations.
    """
    layer, number, _ = module.slot.order
    named = weights.recipe.tensors[number]
    for row in weights.recipe.tensors:
        name = fill(row.source, layer, 0)
        if name in weights.stored and (row.target, row.shape, row.ops) == (named.target, named.shape, named.ops):
            return name
    return None


def _products_of_stack(model: Model, module: LoraModule, singles: Mapping[str, Tensor]) -> Iterator[_Product]:
    """Like `_products`, for all experts of a layer, in every tensor into which their stack is split."""
    for landing in module.slot.landings:
        layer, number, _ = landing.order
        row = model.recipe.tensors[number]
        single = singles[row.target]
        apart = row.ops[: len(row.ops) - len(single.ops)]  # the operations that split the stack into single experts
        a, b = factors_through(apart, module.a, module.b, model)
        n_out, rank = b.spec.shape[-2:]
        for e in range(module.slot.n_experts):
            yield _Product(fill(single.source, layer, e), matrix_of(b, e, n_out), matrix_of(a, e, rank))


def _magnitudes(
    adapter: Adapter, config: LoraConfig, modules: Sequence[LoraModule], *, is_single: bool
) -> tuple[dict[str, _Magnitudes], list[Finding]]:
    """DoRA's magnitudes by module, and problems with them."""
    tensors = adapter.file.by_module("dora")
    findings = []
    if tensors and not config.is_dora:
        what = "has DoRA magnitudes, but its configuration says plain LoRA"
        findings.append(finding(adapter, "dora", what))
    if tensors and (adapter.weight != 1 or not is_single):
        what = "DoRA can be merged only as the sole adapter and with weight 1, since its norms cover the whole sum"
        findings.append(finding(adapter, "dora", what))
    found: dict[str, _Magnitudes] = {}
    for module in modules:
        by_column = module.slot.is_embedding and not isinstance(config, MlxConfig)
        n = module.b.spec.shape[-2] if by_column or not module.slot.is_embedding else module.a.spec.shape[-1]
        tensor = tensors.pop(module.name, None)
        if tensor is not None and module.slot.n_experts and module.slot.expert is None:
            what = "has magnitudes for all experts at once, whose meaning no trainer defines"
            findings.append(finding(adapter, "dora", what, module.name))
        elif tensor is not None and tensor.shape == (n,):
            found[module.name] = _Magnitudes(tensor.lazy(), by_column)
        elif tensor is not None:
            what = f"has magnitudes {list(tensor.shape)}, but needs {[n]}"
            findings.append(finding(adapter, "dora", what, module.name))
        elif config.is_dora:
            findings.append(finding(adapter, "dora", "the magnitudes of DoRA are missing", module.name))
    if tensors:
        findings.append(finding(adapter, "dora", "has magnitudes, but no factors", *tensors))
    return found, findings
