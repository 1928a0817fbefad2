"""The words of a recipe: dims, rows of tensors, keys, claims, refusals. Each is a value, and holds rules at most.

Shapes are written in dims, row-major: "(A+2*K)*D H" has (heads + 2 * key-value heads) * head size rows. Three dims have
a meaning here: L counts the layers ({i} in a name), E the experts ({e}), V the tokens; every recipe has L and V.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamconv.checkpoint.config import Config
from streamconv.gguf.format import Scalar
from streamconv.recipe.operation import Op

if TYPE_CHECKING:
    from streamconv.recipe.language import Model

U32, I32, F32, BOOL, STRING = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
)


Value = Scalar | Sequence[int] | Sequence[float] | Sequence[str]  # of a key


@dataclass(frozen=True, slots=True)
class Dim:
    """Where a dim's value comes from: config keys (or a rule over the config), else the shapes, else `default`.

    Of several keys the first that is stated counts. `default` is a number or an extent in other dims ("A", "H/A").
    `rule` names a rule in messages. `minimum` is 0 for a dim that counts what a model may lack.
    """

    config: str | tuple[str, ...] | Callable[[Config], int | None]
    default: int | str | None = None
    rule: str = ""
    minimum: int = 1

    def stated(self, config: Config) -> int | None:
        if callable(self.config):
            return self.config(config)
        keys = (self.config,) if isinstance(self.config, str) else self.config
        return next((value for key in keys if (value := config.integer(key, self.minimum)) is not None), None)

    @property
    def label(self) -> str:
        return self.rule if callable(self.config) else self.config if isinstance(self.config, str) else self.config[0]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the table: source name, target name, shape of the source. {i} is the layer, {e} the expert.

    `ops` are applied in their order, for a source with {e} to the stack of all experts [E, ...]. `only` ("axis=kind")
    limits the row to the layers of that kind. `required` may name a flag of the config: the tensor is then stored just
    where the flag is true, and either way where the config does not say (Recipe.flags). It may be a rule over the
    config: where that says no, the tensor is not part of the model, and is left out with a warning where it is stored.
    Rows with the same target are alternatives; rows with the same source take parts of it.

    `unless` names a source; where that is stored, the row is not used ("lm_head.weight", for a row of the embedding).

    `f32`: it stays F32 in every outtype, as llama.cpp keeps it; with `or_f16` in all but F16, where it is F16, too.
    `no_adapter`: why no adapter can change it although it
    is a matrix, as "it is a table of positions, for which llama.cpp asks no adapter".
    """

    source: str
    target: str
    shape: str
    ops: tuple[Op, ...] = ()
    only: str = ""
    required: bool | str | Callable[[Config], bool] = True
    f32: bool = False
    or_f16: bool = False
    no_adapter: str = ""
    unless: str = ""


@dataclass(frozen=True, slots=True)
class Computed:
    """A target made from the config, for each layer (or once), where no source holds it. None: the model has none."""

    target: str
    value: Callable[[Model], NDArray[np.float32] | None]
    only: str = ""
    f32: bool = True
    or_f16: ClassVar[bool] = False

    @property
    def ops(self) -> tuple[Op, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Alias:
    """What another program calls a source, or in which shape it stores it.

    `source` is its name there, `name` that of the rows. `shape` gives the rows' shape for a stored one, with the
    elements in the same order, and None for any other.
    """

    source: str
    name: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...] | None] | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A source that is known, and not needed. One that ends in "*" is every name that begins so.

    `beyond`: only those of layers past the stack's depth, as the config states it: "model.layers.{i}.*".
    """

    source: str
    reason: str
    beyond: bool = False

    @property
    def is_open(self) -> bool:
        return self.source.endswith("*")


@dataclass(frozen=True, slots=True)
class Key:
    """One metadata key. `value`: an extent in dims ("A", "D/2"), or a rule; None means that the key is not written.

    `default`: what llama.cpp takes where the key is missing, or a rule for that; of several values the first is its
    default, and the others mean the same. What it takes for the keys of every architecture is in defaults.py.
    """

    name: str
    value: str | Callable[[Model], Value | None] | None
    type: GGUFValueType = U32
    default: Scalar | tuple[Scalar, ...] | Callable[[Model], Scalar | None] | None = None


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A Key's value: a number for each layer, by its kind on `axis`; an extent in dims or a number for each kind."""

    axis: str
    by_kind: Mapping[str, str | int]

    def __call__(self, model: Model) -> list[int]:
        values = {kind: model.value(v) if isinstance(v, str) else v for kind, v in self.by_kind.items()}
        return [values[kind] for kind in model.kinds[self.axis]]


@dataclass(frozen=True, slots=True)
class Claim:
    """What the config's `key` says of the layers: the kind of each on `axis`, None where it says nothing."""

    key: str
    axis: str
    kinds: Callable[[Config, int], Sequence[str] | None]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What an architecture's models mean by special tokens, beside the tokenizer's files; by role (bos, eos, eot ...).

    texts: the token of a role that the files leave out, where the vocabulary has it.
    keys: the config's key that says a role's id, before any file does.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the GGUF architecture or its runtime cannot do: `what`, told of every model for which `applies`.

    `what` may have dims, keys of the config and `rope_type` in braces; a key that the config lacks is None.
    """

    what: str
    applies: Callable[[Model], bool]

    def of(self, model: Model) -> str | None:
        """The sentence for `model`; None where the model is fine."""
        if not self.applies(model):
            return None
        rope = {"rope_type": model.config.rope_type} if "{rope_type" in self.what else {}
        known = {**model.config.raw, **model.dims, **rope}
        return self.what.format_map(defaultdict(lambda: None, known))


@dataclass(frozen=True, slots=True)
class Caveat(Refusal):
    """What the runtime does otherwise in some uses of a model, and not in all: said as a warning under `code`."""

    code: str = "caveat"
