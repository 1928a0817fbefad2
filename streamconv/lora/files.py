"""An adapter on disk: its configuration and its safetensors file, whose tensors are assigned to modules.

Every tensor of the file is a factor, has no effect, or is reported as a problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import Shard, SourceTensor
from streamconv.errors import SourceError
from streamconv.files import sniff as magic
from streamconv.files.hub import ADAPTER_CONFIG, CONFIG, Source, find_source, source_failures
from streamconv.files.local import local_path
from streamconv.files.store import Place
from streamconv.files.strict_json import MAX_CONFIG_NBYTES, load_object
from streamconv.lora.config import Problem
from streamconv.recipe.language import Output
from streamconv.recipe.spelling import has_same_numbers, unwrapped

WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")  # of PEFT, of MLX
NUMBERED = "*[0-9]_adapters.safetensors"  # MLX's checkpoints, as 0000100_adapters.safetensors

A, B, UNUSED = "a", "b", "unused"
TOKEN_ADAPTER = ".token_adapter."  # the wrapper for trainable_token_indices

_NAME = r"(?:\.[^.]+)?"  # "default" or another name: PEFT drops it on saving

# The ends of names, first match first.
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        (A, rf"(.+)\.(?:lora_A{_NAME}\.weight|lora_embedding_A{_NAME}|lora_a)"),
        (B, rf"(.+)\.(?:lora_B{_NAME}\.weight|lora_embedding_B{_NAME}|lora_b)"),
        # Copies of the frozen base that PEFT saves beside trained embeddings; training state of VeLoRA, MonteCLoRA.
        (UNUSED, r"(.+)\.(?:base_layer\.weight|original_module\.weight|lora_velora_.+|lora_monteclora_sampler\..+)"),
        ("dora", r"(.+)\.(?:lora_magnitude_vector(?:\..+)?|m)"),
        ("lora-bias", rf"(.+)\.lora_B{_NAME}\.bias"),
        ("kasa", r"(.+)\.lora_diag(?:\..+)?"),
        ("tokens", r"(.+?)\.trainable_tokens_delta(?:\..+)?"),
        ("unknown", r"(.+\.lora_.+)"),
        ("bias", r"(.+?)(?:\.base_layer)?\.bias"),
        ("norm", r"((?:.+\.)?[^.]*norm)\.weight"),
        ("weight", rf"(.+?)(?:\.modules_to_save{_NAME})?\.weight"),
        ("unknown", r"(.+)"),
    )
)

_REASONS: Mapping[str, str] = {
    "dora": "DoRA changes the full matrix, not only B @ A: merge it while converting",
    "lora-bias": "lora_bias: lora_B has a trained bias",
    "kasa": "KaSA (lora_diag) computes more than B @ A",
    "tokens": "trainable_token_indices: whole rows of the embedding were replaced",
    "bias": "a trained bias",
    "norm": "a trained norm, which llama.cpp ignores in adapters",
    "weight": "a whole trained weight (modules_to_save, a resized vocabulary or a full fine-tune)",
    "unknown": "a tensor of unknown kind",
}


_SAVE_AGAIN = "save the adapter again, or remove the name from its config if it was not trained"


@dataclass(slots=True)
class Factors:
    """The two factors of a module, as stored."""

    a: SourceTensor | None = None
    b: SourceTensor | None = None


@dataclass(slots=True)
class LoraFile:
    """An adapter of which only the header has been read. A context manager, which keeps the file open."""

    directory: Place
    config: Config
    shard: Shard
    factors: dict[str, Factors] = field(default_factory=dict)  # by module
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    @source_failures()
    def open(cls, source: Source | Place, budget: Budget) -> Self:
        """Open an adapter.

        Args:
            source: Its folder, or a safetensors file with the configuration beside it.
            budget: The memory that reading it may take.

        Raises:
            SourceError: A file is missing or malformed.
        """
        path = find_source(source)
        if not path.exists():
            raise SourceError("no such adapter", file=path, code="source-missing")
        if path.is_file() and path.suffix != ".safetensors":
            raise magic.misplaced(path, "a safetensors file", ADAPTER_CONFIG)
        directory = path if path.is_dir() else path.parent
        weights = _find_weights(path) if path.is_dir() else path
        if not (directory / ADAPTER_CONFIG).is_file():
            raise SourceError(
                f"no {ADAPTER_CONFIG}",
                file=directory,
                hint="an adapter needs one beside its weights",
                code="config-missing",
            )
        raw = load_object(directory / ADAPTER_CONFIG, MAX_CONFIG_NBYTES)
        adapter = cls(directory, Config(raw, directory / ADAPTER_CONFIG), Shard(weights, budget))
        adapter.sort()
        return adapter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shard.close()

    def has_rows(self, module: str) -> bool:
        """Return whether the file has all rows of an embedding or head, not only factors."""
        ends = tuple(f"{module}.{kind}weight" for kind in ("", "base_layer.", "modules_to_save."))
        return any(unwrapped(name).endswith(ends) for name in self.shard.tensors)

    def by_module(self, role: str) -> dict[str, SourceTensor]:
        """Return the tensors of one role, such as "dora", by module."""
        named = ((parse_name(name), tensor) for name, tensor in self.shard.tensors.items())
        return {module: tensor for (one, module), tensor in named if one == role}

    def unsaved(self, recipe: Output, *, is_tied: bool) -> list[Problem]:
        """Return a problem for each of `modules_to_save` that the base has but whose weight is missing here.

        Names that match nothing in the base are ignored, as in PEFT. A tied model needs only one of head and embedding.
        """
        named = self.config.raw.get("modules_to_save")
        keys = [key for key in (named if isinstance(named, list) else [named]) if isinstance(key, str) and key]
        here = [f".{parse_name(name)[1]}." for name in self.shard.tensors]
        modules = [f".{row.source.rpartition('.')[0]}." for row in recipe.tensors]
        ends = [f".{name.removesuffix('.weight')}." for name in (recipe.embedding, recipe.head)]

        def has(names: Sequence[str], key: str) -> bool:
            return any(f".{key}." in name for name in names)

        def is_here(key: str) -> bool:
            is_shared = is_tied and has(ends, key)
            return has(here, key) or (is_shared and any(has(here, end.strip(".").rpartition(".")[2]) for end in ends))

        return [
            Problem("module-unsaved", f"modules_to_save names {key}, but its weight is missing: {_SAVE_AGAIN}")
            for key in keys
            if has(modules, key) and not is_here(key)
        ]

    def sort(self) -> None:
        """Fill `factors` and `problems` from the names of the tensors."""
        others: dict[str, list[str]] = {}
        for name, tensor in self.shard.tensors.items():
            role, module = parse_name(name)
            if role in (A, B):
                factors = self.factors.setdefault(module, Factors())
                other = getattr(factors, role)
                if other is not None and not has_same_numbers(other, tensor):
                    self.problems.append(Problem("twice", f"has two tensors for lora_{role}", (module,)))
                setattr(factors, role, tensor)
            elif role != UNUSED:
                others.setdefault(role, []).append(name if role == "unknown" else module)
        self.problems += [Problem(role, _REASONS[role], tuple(names)) for role, names in others.items()]


def parse_name(name: str) -> tuple[str, str]:
    """Return (role, module) of a tensor, as ("a", "lm_head") for base_model.model.lm_head.lora_A.weight."""
    name = unwrapped(name).replace(TOKEN_ADAPTER, ".")
    for role, pattern in _ROLES:
        if match := pattern.fullmatch(name):
            return role, match[1]
    return "unknown", name


def _find_weights(directory: Place) -> Place:
    """The weights in a folder: the finished adapter, else the only numbered checkpoint."""
    finished = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    if len(finished) > 1:
        raise SourceError(
            f"{' and '.join(WEIGHTS)} are both there",
            file=directory,
            hint=f"name one, as {finished[0]}",
            code="weights-ambiguous",
        )
    if finished:
        return finished[0]
    numbered = sorted(directory.glob(NUMBERED), key=lambda path: path.name)
    if len(numbered) == 1:
        return numbered[0]
    if numbered:
        raise SourceError(
            f"{len(numbered)} checkpoints and no {WEIGHTS[1]}",
            file=directory,
            hint=f"name one, as {numbered[-1]}",
            code="weights-ambiguous",
        )
    raise SourceError(
        "no adapter_model.safetensors or adapters.safetensors",
        file=directory,
        hint=_missing(directory),
        code="weights-missing",
    )


def _missing(directory: Place) -> str:
    if (directory / "adapter_model.bin").exists():
        return "adapter_model.bin is a pickle, which is never loaded: save the adapter again as safetensors"
    if (directory / CONFIG).is_file() and not (directory / ADAPTER_CONFIG).is_file():
        return "this is a model: give the adapter's folder, and pass the model with --base"
    inside = next((child.parent for child in _grandchildren(directory)), None)
    return f"there is one in {inside}" if inside else "give the folder that contains them"


def _grandchildren(directory: Place) -> Iterator[Path]:
    folder = local_path(directory)
    return (file for name in WEIGHTS for file in sorted(folder.glob(f"*/{name}") if folder else ()))
