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

    Attributes:
        config: A config key, several keys of which the first one in the config is used, or a rule.
        default: A number, or an extent in other dims ("A", "H/A"); None if there is no default.
        rule: The name of a rule in messages.
        minimum: The smallest valid value; 0 for the number of an optional part, such as experts.
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

    Rows with the same target are alternatives; rows with the same source take parts of it.

    Attributes:
        source: The name of the stored tensor, as a template.
        target: The name in the GGUF file, as a template.
        shape: The stored shape in dims, row-major; for a source with {e}, the shape of one expert.
        ops: The operations, in order; for a source with {e}, they apply to the stack of all experts [E, ...].
        only: "axis=kind" limits the row to layers of that kind.
        required: Whether the tensor must be stored; or a flag of the config: the tensor must be stored if the flag is
            true and must not be stored if it is false, and is optional if the config does not set it (Output.flags);
            or a rule over the config: if it returns false, the tensor is not part of the model, and is left out with
            a warning if it is stored.
        f32: The tensor stays F32 in every outtype, as in llama.cpp.
        or_f16: With `f32`, the tensor is F16 in an F16 file.
        no_adapter: The reason why no adapter can change it although it is a matrix, such as "it is a table of
            positions".
        unless: A source; if it is stored, the row is not used ("lm_head.weight", for a row of the embedding).
        also: Further sources of the same shape, which the first op takes together with `source`, in this order.
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
        """The templates of all sources of the row."""
        return (self.source, *self.also)


@dataclass(frozen=True, slots=True)
class Computed:
    """A target that is computed from the config and not stored, for each layer or once.

    Attributes:
        target: The name in the GGUF file, as a template.
        value: A rule that returns the values; None if a model does not have the tensor.
        only: "axis=kind" limits it to layers of that kind.
        f32: The tensor stays F32 in every outtype.
        or_f16: As in `Tensor`.
    """

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

    Attributes:
        source: The name that the other program uses, as a template.
        name: The source in the rows.
        shape: A function that converts a stored shape to that of the row, with the same order of elements; it returns
            None for any other shape.
    """

    source: str
    name: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...] | None] | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A known source that is not needed. One that ends in "*" matches every name with this prefix.

    Attributes:
        source: The name, as a template: "model.layers.{i}.*".
        reason: Why it is not needed.
        beyond: Whether it applies only to layers beyond the number of layers in the config.
    """

    source: str
    reason: str
    beyond: bool = False

    @property
    def is_open(self) -> bool:
        return self.source.endswith("*")


@dataclass(frozen=True, slots=True)
class Key:
    """One metadata key.

    Attributes:
        name: The key; {arch} stands for the name of the architecture.
        value: An extent in dims ("A", "D/2"), or a rule; None means that the key is not written.
        type: The GGUF type of the value, or of the elements of an array.
        default: The value that llama.cpp uses if the key is missing, or a rule for it. Of several values, the first is
            the default and the others are equivalent. Defaults common to all architectures are in defaults.py.
    """

    name: str
    value: str | Callable[[Model], Value | None] | None
    type: GGUFValueType = U32
    default: Scalar | tuple[Scalar, ...] | Callable[[Model], Scalar | None] | None = None


@dataclass(frozen=True, slots=True)
class PerLayer:
    """The value of a Key that has a number for each layer.

    Attributes:
        axis: The axis whose kinds determine the numbers.
        by_kind: For each kind, an extent in dims or a number.
    """

    axis: str
    by_kind: Mapping[str, str | int]

    def __call__(self, model: Model) -> list[int]:
        values = {kind: model.value(v) if isinstance(v, str) else v for kind, v in self.by_kind.items()}
        return [values[kind] for kind in model.kinds[self.axis]]


@dataclass(frozen=True, slots=True)
class Claim:
    """The kinds of the layers according to a config key.

    Attributes:
        key: The config key.
        axis: The axis of the kinds.
        kinds: A rule that returns the kind of each layer for a config and a number of layers; None if the config does
            not have the key.
    """

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
