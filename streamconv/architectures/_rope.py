"""RoPE's settings in config.json and llama.cpp's keys for them: shared by architectures, not an architecture itself.

Sources: transformers' modeling_rope_utils.py; llama_model_base::load_hparams in llama.cpp's src/llama-model.cpp, and
llama-context.cpp, for how the runtime interprets the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamconv.recipe import F32, STRING, Caveat, Config, Key, Model, Refusal, Scalar

YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # fixed in the runtime, unless it reads keys for them
LLAMA3_FACTORS = "rope_freqs.weight"
DYNAMIC = "dynamic"  # modeling_rope_utils.py: _compute_dynamic_ntk_parameters; its base is theta up to the context
PLAIN_UP_TO_CONTEXT = (
    "RoPE scaling 'dynamic' was written as plain RoPE, which it is up to the trained context; beyond that, the "
    "runtime gives other results"
)

ModelKey = Callable[[Model], Scalar | None]


@dataclass(frozen=True)
class Rope:
    """RoPE of one architecture.

    Attributes:
        theta: transformers' default for the base.
        context: transformers' default for the context length, in tokens.
        scalings: The kinds of scaling that the runtime supports for this architecture, besides none.
        partial: transformers' default for the rotated share of each head; None: the runtime rotates whole heads.
        kind: The kind of layers that use this RoPE, if configs have settings for each kind.
        rounded: Whether configs with YaRN and `truncate` false are refused: the runtime always rounds YaRN's range.
        betas: Whether the runtime reads YaRN's betas for this architecture.
    """

    theta: float
    context: int
    scalings: tuple[str, ...] = ("linear", "yarn")
    partial: float | None = None
    kind: str | None = None
    rounded: bool = True
    betas: bool = False

    # -- settings in the config

    def of(self, config: Config) -> Config:
        """The section of a config with these settings."""
        return config.rope if self.kind is None else config.rope_of(self.kind)

    def stated_type(self, config: Config) -> str:
        """The kind of scaling that a config sets, "default" for none."""
        return self.of(config).text("rope_type") or self.of(config).text("type") or "default"

    def type(self, config: Config) -> str:
        """The kind of scaling up to the trained context, "default" for none or "dynamic", which has no effect there."""
        return "default" if self.is_dynamic(config) else self.stated_type(config)

    def is_dynamic(self, config: Config) -> bool:
        """Whether positions are scaled only beyond the trained context, by the length of the text."""
        return self.stated_type(config) == DYNAMIC and DYNAMIC not in self.scalings

    def base(self, config: Config) -> float:
        return self.of(config).positive("rope_theta") or config.positive("rope_theta") or self.theta

    def context_length(self, config: Config) -> int:
        return config.integer("max_position_embeddings") or self.context

    def trained_context(self, config: Config) -> int:
        """The context length before scaling, in the order in which transformers looks for it."""
        name = "original_max_position_embeddings"
        return config.integer(name) or self.of(config).integer(name) or self.context_length(config)

    def factor(self, config: Config) -> float:
        """The factor by which linear scaling and YaRN stretch positions; by default, the ratio of context lengths."""
        return self.of(config).positive("factor") or self.context_length(config) / self.trained_context(config)

    def yarn_attention(self, config: Config) -> float | None:
        """The config's attention factor divided by the runtime's own, 1 + ln(factor) / 10; None if not set.

        llama.cpp's converter writes `yarn_attn_factor`, which llama-context.cpp reads and then overwrites.
        """
        factor = self.factor(config)
        wanted = self.of(config).positive("attention_factor")
        scale, scale_all = self.of(config).number("mscale"), self.of(config).number("mscale_all_dim")
        if wanted is None and scale and scale_all:
            wanted = yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all)
        return None if wanted is None else wanted / yarn_magnitude(factor, 1.0)

    def rotated(self, model: Model) -> int:
        """The number of elements of each head that are rotated."""
        config = model.config
        share = self.of(config).positive("partial_rotary_factor") or config.positive("partial_rotary_factor")
        share = share or config.positive("rope_pct")  # its name before transformers supported these models
        return int(model.dims["D"] * (share or self.partial or 1.0))

    def llama3_factors(self, model: Model) -> NDArray[np.float32] | None:
        """The divisor of each RoPE frequency, [head size / 2]; None if the scaling is not Llama 3's.

        Computed in llama.cpp's order of float32 operations. Only the power is computed in float64 and then rounded,
        since torch's float32 power differs between machines. Bit-identical to llama.cpp for the published models.
        """
        config = model.config
        if self.type(config) != "llama3":
            return None
        f32 = np.float32
        factor = self.of(config).positive("factor") or 8.0
        low, high = self.llama3_range(config)
        context = self.trained_context(config)
        exponents = np.arange(0, model.dims["D"], 2, dtype=f32) / f32(model.dims["D"])
        with np.errstate(all="ignore"):  # for malicious configs; the factors of real models are far from any limit
            frequencies = 1 / np.power(self.base(config), exponents.astype(np.float64)).astype(f32)
            wavelengths = 1 / frequencies * f32(2 * math.pi)
            smooth = (1 / wavelengths * f32(context) - f32(low)) / f32(high - low)
            blended = 1 / ((1 - smooth) / f32(factor) + smooth)
        slow = np.where(wavelengths > f32(context / low), f32(factor), blended)
        return np.where(wavelengths < f32(context / high), f32(1), slow)

    def llama3_range(self, config: Config) -> tuple[float, float]:
        """low_freq_factor and high_freq_factor; llama.cpp's converter has these defaults, transformers has none."""
        said = self.of(config)
        return said.positive("low_freq_factor") or 1.0, said.positive("high_freq_factor") or 4.0

    def is_llama3_empty(self, model: Model) -> bool:
        low, high = self.llama3_range(model.config)
        return self.type(model.config) == "llama3" and low >= high

    def is_not(self, key: str, fixed: float) -> Callable[[Model], bool]:
        """A function that returns whether a model's YaRN sets `key` to a value other than `fixed`, the runtime's."""
        return lambda m: self.type(m.config) == "yarn" and self.of(m.config).positive(key) not in (None, fixed)

    def for_scaling(self, *types: str, value: Callable[[Config], Scalar | None]) -> ModelKey:
        """A function that returns the value of a key for models with one of these kinds of scaling, else None."""
        return lambda model: value(model.config) if self.type(model.config) in types else None

    # -- keys of the GGUF file

    def keys(self) -> tuple[Key, ...]:
        """The keys for the context length, the number of rotated elements, the base and the scaling."""
        scaling, beta = "{arch}.rope.scaling.", "{arch}.rope.scaling.yarn_"
        return (
            Key("{arch}.context_length", lambda model: self.context_length(model.config)),
            Key("{arch}.rope.dimension_count", "D" if self.partial is None else self.rotated),
            Key("{arch}.rope.freq_base", lambda model: self.base(model.config), F32),
            Key(scaling + "type", self.for_scaling("linear", "yarn", value=self.type), STRING),
            Key(scaling + "factor", self.for_scaling("linear", "yarn", value=self.factor), F32),
            Key(scaling + "original_context_length", self.for_scaling("yarn", value=self.trained_context)),
            Key(scaling + "attn_factor", self.for_scaling("yarn", value=self.yarn_attention), F32),
            *(
                Key(beta + key, self.for_scaling("yarn", value=lambda c, key=key: self.of(c).positive(key)), F32)  # type: ignore[misc]
                for key in YARN_BETAS
            ),
        )

    def refusals(self) -> tuple[Refusal, ...]:
        """The RoPE settings that the runtime does not support."""
        named = "{rope_type!r}" if self.kind is None else f"of {self.kind}"
        return (
            Refusal(
                f"RoPE scaling {named} is not supported by the GGUF architecture",
                lambda m: self.type(m.config) not in ("default", *self.scalings),
            ),
            Caveat(PLAIN_UP_TO_CONTEXT, lambda m: self.is_dynamic(m.config), code="rope-dynamic"),
            Refusal("low_freq_factor of RoPE must be below high_freq_factor", self.is_llama3_empty),
            # llama.cpp has keys for these, but reads them only for other architectures.
            *(
                Refusal(f"{key} of YaRN is not {fixed:g}, which is fixed in the runtime", self.is_not(key, fixed))
                for key, fixed in (() if self.betas else YARN_BETAS.items())
            ),
            Refusal(
                "truncate of YaRN is false, but the runtime rounds its range",
                lambda m: (
                    self.rounded and self.type(m.config) == "yarn" and self.of(m.config).flag("truncate") is False
                ),
            ),
            Refusal(
                "partial_rotary_factor is not 1, but the runtime rotates whole heads",
                lambda m: (
                    self.partial is None
                    and bool({c.number("partial_rotary_factor") for c in (m.config, self.of(m.config))} - {None, 1.0})
                ),
            ),
            Refusal(
                "heads of {D} cannot be split into the two halves that RoPE rotates", lambda m: self.rotated(m) % 2 != 0
            ),
        )


def yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 1.0 + 0.1 * scale * math.log(factor)
