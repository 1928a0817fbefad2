"""The vocabulary of recipes: dims, rows of tensors, keys, claims, refusals. Each is a plain value.

Shapes are written in dims, row-major: "(A+2*K)*D H" has (heads + 2 * key-value heads) * head size rows. Three dims have
a fixed meaning: L is the number of layers ({i} in a name), E of experts ({e}), V of tokens; every recipe has L and V.
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
    """The source of a dim's value: config keys (or a rule over the config), else the shapes, else `default`.

    The first key that the config has is used. `default` is a number or an extent in other dims ("A", "H/A"). `rule` is
    the name of a rule in messages. `minimum` is 0 for the number of something that a model may not have.
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

    `ops` are applied in order; for a source with {e}, to the stack of all experts [E, ...]. `only` ("axis=kind")
    limits the row to layers of that kind. `required` may name a flag of the config: the tensor must be stored if the
    flag is true and must not if it is false; if the config does not have it, both are fine (Recipe.flags). It may also
    be a rule over the config: if that is false, the tensor is not part of the model, and is left out with a warning if
    it is stored. Rows with the same target are alternatives; rows with the same source take parts of it.

    `unless` names a source; if that is stored, the row is not used ("lm_head.weight", for a row of the embedding).
    `also`: further sources of the same shape, which the first of `ops` takes together with `source`, in this order.

    `f32`: the tensor stays F32 in every outtype, as in llama.cpp; with `or_f16`, it is F16 in an F16 file.
    `no_adapter`: why no adapter can change it although it is a matrix, such as "it is a table of positions".
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
    also: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of all that the row is made of."""
        return (self.source, *self.also)


@dataclass(frozen=True, slots=True)
class Computed:
    """A target computed from the config, for each layer or once, not stored in any source. None: the model has none."""

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
    """The name, or the shape, that another program uses for a source.

    `source` is its name there, `name` the one in the rows. `shape` maps a stored shape to that of the rows, with the
    elements in the same order, or returns None for any other shape.
    """

    source: str
    name: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...] | None] | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A known source that is not needed. One that ends in "*" matches every name with this prefix.

    `beyond`: only layers beyond the depth of the stack that the config states: "model.layers.{i}.*".
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

    `default`: the value that llama.cpp uses if the key is missing, or a rule for it; of several values, the first is
    the default and the others are equivalent. Defaults common to all architectures are in defaults.py.
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
    """The kinds of the layers on `axis` according to the config's `key`; None if the config does not have it."""

    key: str
    axis: str
    kinds: Callable[[Config, int], Sequence[str] | None]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Special tokens that an architecture defines besides the tokenizer files, by role (bos, eos, eot ...).

    Attributes:
        texts: The token of a role that the files omit, used if the vocabulary has it.
        keys: The config key with the id of a role, which takes precedence over all files.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A model feature that the GGUF architecture or its runtime does not support: `what`, if `applies` to the model.

    `what` may have dims, keys of the config and `rope_type` in braces; a key that the config lacks is None.
    """

    what: str
    applies: Callable[[Model], bool]

    def of(self, model: Model) -> str | None:
        """Return the sentence for `model`, or None if it does not apply."""
        if not self.applies(model):
            return None
        rope = {"rope_type": model.config.rope_type} if "{rope_type" in self.what else {}
        known = {**model.config.raw, **model.dims, **rope}
        return self.what.format_map(defaultdict(lambda: None, known))


@dataclass(frozen=True, slots=True)
class Caveat(Refusal):
    """A difference of the runtime in some uses of a model, reported as a warning with `code`."""

    code: str = "caveat"
