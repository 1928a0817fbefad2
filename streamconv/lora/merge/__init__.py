"""Merge adapters into a checkpoint. The result is a table of tensors that any recipe can bind.

Each step takes `Weights` and returns new ones, with findings that rule out the merge: whole weights that replace the
base's (whole.py), products of factors (factors.py), rows of tokens (token_rows.py), embedding and head (ends.py).

Merging uses the checkpoint's own names, rows and shapes, before any operation of a recipe. The result is the adapted
model as PEFT runs it; everything that cannot be merged exactly is refused in one error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from streamconv.checkpoint.folder import Checkpoint
from streamconv.errors import SourceError
from streamconv.lora.config import Problem, read_lora_config
from streamconv.lora.merge.ends import find_tokenizers, merged_config, outgrown, settle_ends
from streamconv.lora.merge.factors import add_products, base_of
from streamconv.lora.merge.outputs import merge_output, shares_of
from streamconv.lora.merge.token_rows import replace_rows
from streamconv.lora.merge.weights import Finding, Step, Weights
from streamconv.lora.merge.whole import replace_whole
from streamconv.lora.resolve import SAVE_ENDS, base_hint, other_base, refuse_all
from streamconv.lora.specs import Adapter, Merged
from streamconv.recipe.bind import bind
from streamconv.recipe.language import Model


def merge(checkpoint: Checkpoint, model: Model, adapters: Sequence[Adapter], outputs: Sequence[Model] = ()) -> Merged:
    """Merge adapters into `model`, which is bound to `checkpoint`. No weights are read.

    (One exception: if two adapters both have an enlarged frozen embedding, these are compared.)

    Args:
        outputs: Further outputs, such as a projector, into which the adapters' shares are merged.

    Raises:
        SourceError: Something cannot be merged; the error lists everything.
    """
    shares = [shares_of(adapter, outputs) for adapter in adapters]
    own = [share.of_model for share in shares if share.of_model is not None]
    step, origins = _merged(checkpoint, model, own)
    tokenizers, findings = find_tokenizers(step.weights, checkpoint.directory, own)
    for share in shares:  # with nothing of an output, it must not say that it has
        findings += [
            Finding(share.of_model, problem)
            for output in outputs
            if share.of_model is not None and output.recipe.role not in share.of_outputs
            for problem in share.of_model.file.unsaved(output.recipe, is_tied=False)
        ]
    beside = {
        output.recipe.role: merge_output(output, of_output)
        for output in outputs
        if (
            of_output := [
                one for share in shares for role, one in share.of_outputs.items() if role == output.recipe.role
            ]
        )
    }
    others = [one for share in shares for one in share.of_outputs.values()]
    steps = (step, *beside.values())
    _refuse([*own, *others], [*findings, *(one for each in steps for one in each.findings)])
    merged = bind(model.recipe, merged_config(step.weights), step.weights.table, modules=model.modules)
    of_beside = [origin for each in beside.values() for origin in each.origins]
    return Merged(
        merged,
        tokenizers,
        tuple(adapters),
        {
            f"adapter {number}": _identity(adapter, [*origins.get(id(share.of_model), ()), *of_beside])
            for number, (adapter, share) in enumerate(zip(adapters, shares, strict=True), 1)
        },
        tuple(warning for each in steps for warning in each.warnings),
        {role: each.weights.table for role, each in beside.items()},
    )


def _merged(checkpoint: Checkpoint, model: Model, adapters: Sequence[Adapter]) -> tuple[Step, dict[int, Sequence[str]]]:
    """The model's weights with the adapters merged, and the inputs that determined the bytes, by an adapter's id()."""
    step = Step(Weights.of(model))
    for adapter in adapters:
        step = step.then(replace_whole(step.weights, adapter))
    base = base_of(checkpoint.directory, step.weights)
    origins: dict[int, Sequence[str]] = {}
    tying = []
    for adapter in adapters:
        config = read_lora_config(adapter.file.config)
        products = add_products(step.weights, base, adapter, config, is_single=len(adapters) == 1)
        rows = replace_rows(products.weights, adapter, config)
        step = step.then(products, rows)
        origins[id(adapter)] = [*products.origins, *rows.origins]
        tying += [adapter] if config.ties_ends else []
    step = step.then(settle_ends(step.weights, tying))
    if not any(finding.problem.code == "vocabulary" for finding in step.findings):  # which reports it already
        step = step.then(Step(step.weights, list(outgrown(step.weights))))
    return step, origins


def _identity(adapter: Adapter, origins: Sequence[str]) -> str:
    """The properties of an adapter that determine the bytes of an output."""
    digest = hashlib.sha256("\n".join(origins).encode()).hexdigest()
    return f"{adapter.weight!r} {adapter.file.shard.fingerprint} {digest}"


def _refuse(adapters: Sequence[Adapter], findings: Sequence[Finding]) -> None:
    """Raise SourceError with all findings, grouped by adapter."""
    errors = []
    for adapter in adapters:
        problems = [one.problem for one in findings if one.adapter is adapter]
        try:
            refuse_all(
                f"cannot be merged{other_base(problems, adapter.file)}",
                problems,
                adapter.file.directory,
                SAVE_ENDS if _lacks_rows(problems) else base_hint(problems),
                code="adapter-unmergeable",
            )
        except SourceError as error:
            errors.append(error)
    if errors:
        first, *others = errors
        what = first.message + "".join(f"; and {error.file}: {error.message}" for error in others)
        hint = None if others else first.hint
        listed = [one for error in errors for one in error.problems]
        raise SourceError(what, file=first.file, hint=hint, problems=listed, code="adapter-unmergeable")


def _lacks_rows(problems: Sequence[Problem]) -> bool:
    """Whether only the rows of an enlarged vocabulary are missing."""
    return bool(problems) and all(problem.code == "vocabulary" for problem in problems)
