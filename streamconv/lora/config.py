"""Read the adapter_config.json of PEFT or MLX: the scale of each module, and features that GGUF cannot represent.

For every module, W' = W + s * B @ A with the s used in training, or there is a problem: no default that could give a
different s is used silently.

Sources: PEFT 0.21.2, tuners/lora/{config,layer,variants}.py and get_pattern_key in utils/other.py; mlx-lm,
tuner/lora.py and tuner/utils.py.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from streamconv.checkpoint.config import Config
from streamconv.errors import RunWarning, SourceError

# PEFT's defaults for absent keys, as PEFT itself uses them when it loads such a file.
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8.0

# Initialisations that do not change the base; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its weights when
# the adapter is loaded. An adapter that was converted to plain LoRA when it was saved has `true`.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Keys that PEFT 0.21.2 writes, and those that only Ollama reads (ollama.py). Other keys may come from a version that
# computes something else.
KNOWN_KEYS = frozenset(
    (
        "num_key_value_heads",
        *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path"),
        *("bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "invocation_string", "kasa_config", "layer_replication"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout"),
        *("lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
        *("target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
        *("use_rslora", "velora_config"),
    )
)

MAX_KINDS_SHOWN = 12  # kinds of modules shown in one problem; a layer has fewer
MAX_PATTERN_LENGTH = 500
MAX_CHOICES = 1 << 18  # for one module and all patterns of a configuration: tens of milliseconds
LONGEST_NAME, LONGEST_RUN = 64, 8  # of a module's name; of one repeated letter, or of digits, in it

T = TypeVar("T")


_CONFIG_REASONS: Final = {
    "arrow": "Arrow (arrow_config) computes more than B @ A",
    "kasa": "KaSA (kasa_config) computes more than B @ A",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an adapter cannot be converted. `code` is stable; without `modules`, the whole adapter is concerned."""

    code: str
    message: str
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.modules:
            return self.message
        kinds: dict[str, list[str]] = {}  # one example for each kind of module
        for module in self.modules:
            kind = re.sub(r"\.\d+(?=\.)", ".*", module) if self.code == "no-module" else ""
            kinds.setdefault(kind, []).append(module)
        firsts = [f"{of[0]} and {len(of) - 1} more" if len(of) > 1 else of[0] for of in kinds.values()]
        more = f" and {len(firsts) - MAX_KINDS_SHOWN} other kinds" if len(firsts) > MAX_KINDS_SHOWN else ""
        return f"{', '.join(firsts[:MAX_KINDS_SHOWN])}{more}: {self.message}"


@dataclass(slots=True)
class LoraConfig(ABC):
    """The interface of both configurations. `fixed_scale` is the s of every module if the user passed --scale."""

    config: Config
    fixed_scale: float | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    is_dora: bool = False
    invocation_tokens: tuple[int, ...] = ()  # of an activated LoRA (aLoRA), which is on only after them
    target_parameters: tuple[str, ...] = ()  # stacked parameters that have factors
    token_rows: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # by module, numbers of rows that were trained as a whole
    ties_ends: bool = False  # whether a change of a tied model's embedding also changes its head

    @abstractmethod
    def scale(self, module: str, rank: int) -> float:
        """Return the s of `module`, whose factors have rank `rank`."""

    @abstractmethod
    def rank(self, module: str) -> int | None:
        """Return the rank of `module` in the configuration, or None."""

    def module_problems(self, module: str) -> Iterator[Problem]:
        """Yield the reasons why this module is not plain LoRA."""
        return iter(())

    def replicated_layers(self, n_layers: int) -> bool:
        """Return whether the adapter is for a model with replicated layers."""
        return False

    def _read(self, read: Callable[[str], T | None], key: str) -> T | None:
        """Return `read(key)`, or add a problem and return None if the value is malformed."""
        try:
            return read(key)
        except SourceError as error:
            self.problems.append(Problem("config", error.message))
            return None


def stated_base(raw: Mapping[str, Any]) -> str | None:
    """Return the name of the base model from the configuration (PEFT's key, or MLX's)."""
    names = (raw.get("base_model_name_or_path"), raw.get("model"))
    return next((name for name in names if isinstance(name, str) and name), None)


def read_lora_config(config: Config, scale: float | None = None) -> LoraConfig:
    """Parse an adapter_config.json. Never raises: the result's `problems` lists malformed and unsupported values.

    Args:
        config: Its contents.
        scale: The s of every module, if the user passed one.
    """
    if "peft_type" not in config.raw and isinstance(config.raw.get("lora_parameters"), dict):
        return MlxConfig(config, scale)
    result = PeftConfig(config, scale)
    if not config.raw.keys() & {"peft_type", "r", "lora_alpha"} and scale is None:
        result.problems.append(
            Problem("config", "adapter_config.json is neither from PEFT nor from MLX: it has no scale")
        )
    return result


@dataclass(slots=True)
class _Pattern:
    """A value for all modules that match a regular expression of the configuration."""

    key: str
    regex: re.Pattern[str]
    value: float


@dataclass(slots=True)
class PeftConfig(LoraConfig):
    """PEFT: s = alpha / r, or alpha / sqrt(r) for rsLoRA, both by the module's name."""

    is_rslora: bool = False
    has_ranks: bool = False
    default_rank: int = DEFAULT_RANK
    default_alpha: float = DEFAULT_ALPHA
    _ranks: list[_Pattern] = field(default_factory=list)
    _alphas: list[_Pattern] = field(default_factory=list)
    _n_choices: float = 0
    _block_diagonal: tuple[str, ...] = ()
    _layer_ranges: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.default_rank = self._read(config.integer, "r") or DEFAULT_RANK
        self._ranks = list(self._patterns("rank_pattern"))
        self.has_ranks = self.fixed_scale is None and not self.problems
        self.is_dora = self._read(config.flag, "use_dora") or False
        self.is_rslora = self._read(config.flag, "use_rslora") or False
        self.token_rows = self._read(self._token_rows, "trainable_token_indices") or {}
        self.ties_ends = self._read(config.flag, "ensure_weight_tying") or bool(self.token_rows)
        targets = self._read(lambda key: config.list_of(key, str), "target_parameters") or ()
        self.target_parameters = tuple(targets)
        alpha = self._read(config.number, "lora_alpha")
        self.default_alpha = DEFAULT_ALPHA if alpha is None else alpha
        if alpha is None and self.fixed_scale is None:
            self.warnings.append(
                RunWarning("alpha-default", f"no lora_alpha: PEFT's default {DEFAULT_ALPHA:g} was used")
            )
        self._alphas = list(self._patterns("alpha_pattern"))
        self._block_diagonal = tuple(self._bd_lora())
        self._layer_ranges = self._read(self._pairs, "layer_replication") or []
        self.invocation_tokens = tuple(self._invocation_tokens())
        self.problems += self._variants()
        unknown = sorted(key for key, value in config.raw.items() if key not in KNOWN_KEYS and value)
        if unknown:
            message = f"adapter_config.json has unknown keys, which were ignored: {', '.join(unknown)}"
            self.warnings.append(RunWarning("unknown-config", message))

    def scale(self, module: str, rank: int) -> float:
        if self.fixed_scale is not None:
            return self.fixed_scale
        return _first(self._alphas, module, self.default_alpha) / (math.sqrt(rank) if self.is_rslora else rank)

    def rank(self, module: str) -> int | None:
        return int(_first(self._ranks, module, self.default_rank)) if self.has_ranks else None

    def module_problems(self, module: str) -> Iterator[Problem]:
        if any(part in module for part in self._block_diagonal):
            yield Problem("bd-lora", "BD-LoRA: a factor is block-diagonal", (module,))

    def replicated_layers(self, n_layers: int) -> bool:
        layers: list[int] = []
        for first, last in self._layer_ranges:
            if not 0 <= first <= last <= n_layers or len(layers) > n_layers:
                return True
            layers += range(first, last)
        return bool(self._layer_ranges) and layers != list(range(n_layers))

    def _pairs(self, key: str) -> list[list[int]] | None:
        pairs = self.config.list_of(key, list)
        if not all(len(pair) == 2 and all(type(bound) is int for bound in pair) for pair in pairs or ()):
            raise self.config.wrong(key, "a list of pairs of layers")
        return pairs

    def _patterns(self, key: str) -> Iterator[_Pattern]:
        """The patterns under `key` in file order, compiled as PEFT does."""
        section = self._read(self.config.section, key) or Config({}, self.config.file)

        def number(pattern: str) -> float:
            value = section.integer(pattern) if key == "rank_pattern" else section.number(pattern)
            if value is None:
                raise section.wrong(pattern, "a number")
            return value

        for pattern in section.raw:
            value = self._read(number, pattern)
            try:
                regex = _compiled(pattern)
                cost = n_choices(pattern)
                if self._n_choices + cost > MAX_CHOICES:
                    raise ValueError("is too complex a pattern for a module's name")
                self._n_choices += cost
            except ValueError as error:
                self.problems.append(Problem("pattern", f"{key}: {pattern[:60]!r} {error}"))
            else:
                if value is not None:
                    yield _Pattern(pattern, regex, value)

    def _bd_lora(self) -> Iterator[str]:
        """Substrings of the names of modules with a block-diagonal factor (BdLoraLinearVariant)."""
        section = self._read(self.config.section, "use_bdlora")
        if section is not None and self._read(section.integer, "nblocks") != 1:
            for key in ("target_modules_bd_a", "target_modules_bd_b"):
                yield from self._read(lambda key: section.list_of(key, str), key) or ()

    def _invocation_tokens(self) -> list[int]:
        tokens = self._read(self._token_ids, "alora_invocation_tokens") or []
        if not tokens and self.config.raw.get("invocation_string"):
            message = "invocation_string without alora_invocation_tokens: add the ids of its tokens to the config"
            self.problems.append(Problem("invocation", message))
        return tokens

    def _token_rows(self, key: str) -> dict[str, tuple[int, ...]]:
        """The rows by module; a plain list means the embedding (LoraConfig.trainable_token_indices)."""
        value = self.config.raw.get(key)
        by_module = {"embed_tokens": value} if isinstance(value, list) else value or {}
        if not isinstance(by_module, dict) or not all(_are_rows(rows) for rows in by_module.values()):
            raise self.config.wrong(key, "a list of token ids, or such a list by module")
        return {module: tuple(rows) for module, rows in by_module.items()}

    def _token_ids(self, key: str) -> list[int] | None:
        tokens = self.config.list_of(key, int)
        if not all(0 <= token < 1 << 32 for token in tokens or ()):
            raise self.config.wrong(key, "a list of token ids")
        return tokens

    def _variants(self) -> Iterator[Problem]:
        """Problems for kinds of LoRA that compute something else, whatever their tensors are called."""
        raw = self.config.raw
        peft_type = self._read(self.config.text, "peft_type")
        if peft_type not in (None, "LORA"):
            yield Problem("peft-type", f"peft_type is {peft_type}, not LORA")
        init = raw.get("init_lora_weights", True)
        init = init.lower() if isinstance(init, str) else init
        if init is not None and not any(init is known or init == known for known in HARMLESS_INITS):
            yield Problem(
                "init",
                f"init_lora_weights is {str(init)[:40]!r}: loading it changes the base's weights; "
                "save it with path_initial_model_for_weight_conversion, as plain LoRA",
            )
        for code, message in _CONFIG_REASONS.items():
            if raw.get(f"{code}_config") is not None:
                yield Problem(code, message)


def _are_rows(value: object) -> bool:
    """Whether `value` is a list of distinct row numbers."""
    is_list = isinstance(value, list) and all(type(row) is int and 0 <= row < 1 << 31 for row in value)
    return is_list and isinstance(value, list) and len(set(value)) == len(value)


@dataclass(slots=True)
class MlxConfig(LoraConfig):
    """MLX: s = lora_parameters.scale, as mlx-lm computes since 2024-06-02."""

    _scale: float = 0.0
    _rank: int | None = None

    def __post_init__(self) -> None:
        self.ties_ends = True  # the shared matrix is also the head: LoRAEmbedding.as_linear, and fuse
        parameters = self.config.section("lora_parameters") or Config({}, self.config.file)
        kind = self._read(self.config.text, "fine_tune_type")
        self.is_dora = kind == "dora" or (kind is None and bool(self._read(self.config.flag, "use_dora")))
        if kind == "full":
            self.problems.append(
                Problem(
                    "full", "fine_tune_type is full, so these are whole weights: convert the fine-tuned model instead"
                )
            )
        elif kind not in (None, "lora", "dora"):
            self.problems.append(Problem("fine-tune-type", f"fine_tune_type is {kind[:40]!r}, neither lora nor dora"))
        self._rank = self._read(parameters.integer, "rank")
        alpha, n_problems = self._read(parameters.number, "alpha"), len(self.problems)
        scale = self._read(parameters.number, "scale")
        if self.fixed_scale is not None:
            self._scale = self.fixed_scale
        elif scale is None and len(self.problems) == n_problems:
            self.problems.append(Problem("scale", "lora_parameters has no scale: pass it with --scale"))
        elif scale is not None:
            self._scale = scale
            self._check_alpha(scale, alpha, is_new=kind is not None)

    def _check_alpha(self, scale: float, alpha: float | None, *, is_new: bool) -> None:
        if not alpha or not self._rank or alpha == self._rank:
            return
        older = scale * alpha / self._rank
        why = "fine_tune_type shows that" if is_new else "since June 2024"
        message = (
            f"scale {scale:g} was used and alpha {alpha:g} ignored: {why} mlx-lm computes with scale only; "
            f"for an adapter trained with scale * alpha / rank, pass --scale {older:g}"
        )
        self.warnings.append(RunWarning("mlx-alpha", message))

    def scale(self, module: str, rank: int) -> float:
        return self._scale

    def rank(self, module: str) -> int | None:
        return None if self.fixed_scale is not None else self._rank


def _first(patterns: list[_Pattern], module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name, as in PEFT's get_pattern_key."""
    return next((pattern.value for pattern in patterns if pattern.regex.match(module)), default)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile `pattern` as PEFT does; ValueError with the reason if it is invalid."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError("is too long a pattern for a module's name")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None


# The parts of a regular expression whose contents could be mistaken for other parts.
_SYNTAX = re.compile(
    r"(?P<wide>\\[wWsSD1-9]|\[(?!0-9\])\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<narrow>\\.|\[0-9\])"
    r"|(?P<group>\(\?(?:[:=!]|<[=!]|P<\w+>))",
    re.DOTALL,
)
_QUANTIFIED = re.compile(r"(.)(?:(\?)|[*+]|\{\d*,?\d*\})[?+]?", re.DOTALL)


def n_choices(pattern: str) -> float:
    """Return an upper bound on the paths that a backtracking match of `pattern` can try on a module's name.

    It is the product of the repetitions of each quantifier and the alternatives of each group; infinity if a group is
    repeated.
    """
    marks = {"wide": ".", "narrow": "a", "group": "("}
    bare = f"({_SYNTAX.sub(lambda match: marks[match.lastgroup or ''], pattern)})"
    choices, alternatives = 1.0, [1]
    for atom, optional in _QUANTIFIED.findall(bare):
        if atom == ")" and not optional:
            return math.inf
        choices *= 2 if optional else LONGEST_NAME if atom == "." else LONGEST_RUN
    for character in bare:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")":
            choices *= alternatives.pop()
    return math.inf if "(?" in bare else choices * math.prod(alternatives)
