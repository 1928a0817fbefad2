"""The tensors of a checkpoint by the templates of their names, each with gguf's identification of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS
from gguf.tensor_mapping import TensorNameMap

from streamconv.recipe.names import match_name


@dataclass(frozen=True, slots=True)
class Source:
    """All tensors of one template.

    Attributes:
        template: The name, with {i} for the layer and {e} for the expert.
        tensor: The GGUF tensor that the gguf package maps the name to; None if it does not know the name.
        shapes: The different shapes, in the order of the checkpoint.
        layers: The layers that have such a tensor.
        n_experts: The number of experts; 0 if the template has no {e}.
    """

    template: str
    tensor: MODEL_TENSOR | None
    shapes: tuple[tuple[int, ...], ...]
    layers: frozenset[int]
    n_experts: int

    @property
    def order(self) -> int:
        return 1 if "{i}" in self.template else 0 if self.tensor == MODEL_TENSOR.TOKEN_EMBD else 2


def collect(shapes: Mapping[str, tuple[int, ...]], arch: str) -> tuple[list[Source], list[str]]:
    """Group the tensors of a checkpoint by template.

    Args:
        shapes: The shapes by name.
        arch: gguf's name of the architecture.

    Returns:
        The sources, embedding first; and the templates that recipes cannot express, with braces or a third number.
    """
    members: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)  # names with their numbers, by template
    unsayable: dict[str, None] = {}
    for name in shapes:
        template, numbers = match_name(name)
        if len(numbers) > 2 or set("{}") & set(name):
            unsayable[template] = None
        else:
            members[template][name] = numbers
    tables = _name_tables(arch)
    sources = [
        Source(
            template,
            _meaning(template, tables),
            tuple(dict.fromkeys(shapes[name] for name in named)),
            frozenset(numbers[0] for numbers in named.values() if numbers),
            max((numbers[1] + 1 for numbers in named.values() if len(numbers) > 1), default=0),
        )
        for template, named in members.items()
    ]
    return sorted(sources, key=lambda source: source.order), [*unsayable]


def count_layers(sources: Iterable[Source]) -> int:
    return 1 + max((i for source in sources for i in source.layers), default=-1)


def kinds_of_layers(sources: Sequence[Source], n_layers: int) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Find the kinds of layers: two groups of templates, where each layer has the tensors of exactly one group.

    Returns:
        The two kinds of each axis; and by template the kind of the layers that have it, such as "axis1=conv".
    """
    groups: dict[frozenset[int], list[str]] = defaultdict(list)
    for source in sources:
        if source.layers and len(source.layers) < n_layers:
            groups[source.layers].append(source.template)
    axes: dict[str, tuple[str, str]] = {}
    only: dict[str, str] = {}
    for layers, templates in groups.items():
        rest = n_layers - len(layers)  # not a set of all layers: an index can be 999,999
        others = next((groups[one] for one in groups if len(one) == rest and one.isdisjoint(layers)), None)
        if others is None or templates[0] in only:
            continue
        axis = f"axis{len(axes) + 1}"
        axes[axis] = _telling_part(templates, others), _telling_part(others, templates)
        for kind, members in zip(axes[axis], (templates, others), strict=True):
            only |= dict.fromkeys(members, f"{axis}={kind}")
    return axes, only


def _telling_part(templates: Sequence[str], others: Iterable[str]) -> str:
    """Return the first part of these names that does not occur in the others."""
    common = {part for other in others for part in other.split(".")}
    parts = (part for template in templates for part in template.split("."))
    return next((part for part in parts if part not in common and part.isidentifier()), "other")


def gguf_arch(model_type: str) -> str:
    """Return gguf's name for a model type, or the model type itself if gguf does not know it."""
    known = {name.replace("-", ""): name for name in MODEL_ARCH_NAMES.values()}
    return known.get(model_type.replace("_", "").replace("-", ""), model_type)


def _name_tables(arch: str) -> Mapping[str, MODEL_TENSOR]:
    """Return gguf's tables of source names without their endings; the tensors of this architecture take precedence."""
    found = next((key for key, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    own = set() if found is None else set(MODEL_TENSORS[found])
    tables: dict[str, MODEL_TENSOR] = {}
    arch_tables = TensorNameMap.arch_block_mappings_cfg.values()
    for table in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg, *arch_tables):
        for tensor, names in table.items():
            for name in names:
                if name not in tables or (tensor in own and tables[name] not in own):
                    tables[name] = tensor
    return tables


def _meaning(template: str, tables: Mapping[str, MODEL_TENSOR]) -> MODEL_TENSOR | None:
    """Return the GGUF tensor for a source; gguf's tables list experts by the name of their stack."""
    stem = template.removesuffix(".weight").removesuffix(".bias").replace("{e}.", "").replace("{i}", "{bid}")
    return tables.get(stem) or tables.get(stem.removeprefix("model."))
