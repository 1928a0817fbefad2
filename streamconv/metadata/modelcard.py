"""The `general.*` keys that describe a model, from its model card, its configs and its name.

gguf's own heuristics find them; this module converts the result to keys with exact types. A model card is untrusted:
whatever it contains, the result is keys or a warning, never a failed conversion.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_VERSION, GGUFValueType

from streamconv.errors import RunWarning
from streamconv.files.hub import CONFIG, model_name
from streamconv.files.local import read_start
from streamconv.files.store import Place
from streamconv.files.strict_json import load_object_if_present
from streamconv.gguf.format import KeyValue, PackedArray
from streamconv.lazy.node import TensorSpec

CARD = "README.md"
FENCE = "---"  # before and after the front matter
MAX_CARD_NBYTES = 1 << 20
MAX_FRONT_MATTER_NBYTES = (
    64 << 10
)  # parsing takes up to 340 bytes of memory per byte; published ones have a few thousand bytes

# Fields that describe only the model itself, not models derived from it.
_OWN_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True, slots=True)
class General:
    """The general.* keys of a file, warnings for the user, and the metadata for the conventional file name."""

    keys: tuple[KeyValue, ...]
    warnings: tuple[RunWarning, ...]
    metadata: Any  # gguf.Metadata, for the naming convention

    def file_name(self, outtype: str, kind: str | None = None) -> str:
        """Return the conventional file name, such as Name-1.2B-BF16.gguf. `kind` is "LoRA" for adapters."""
        from gguf.utility import naming_convention

        m = self.metadata
        # A card may have a number or a list instead of a name.
        name, base, finetune, version, size = (
            None if part is None else str(part) for part in (m.name, m.basename, m.finetune, m.version, m.size_label)
        )
        stem = naming_convention(name, base, finetune, version, size, outtype, kind)  # type: ignore[arg-type]
        return "".join(c if c.isprintable() and c not in "/\\" else "-" for c in stem)[:200] + ".gguf"


def read_general(
    directory: Place,
    *,
    arch: str,
    name: str | None,
    specs: Iterable[tuple[str, TensorSpec]],
    kind: str = "model",
    merged: Sequence[Place] = (),
) -> General:
    """Return the general.* keys as llama.cpp's converter writes them, general.architecture and general.type first.

    Args:
        directory: The model's or adapter's folder.
        arch: GGUF's name of the architecture.
        name: Overrides the name in the model card.
        specs: Name and spec of every tensor, for the size label.
        kind: The value of general.type.
        merged: Folders of adapters merged into the model, which makes it a fine-tune of the model in `directory`.
    """
    from gguf.metadata import Metadata
    from gguf.utility import size_label

    total, shared, expert, n_experts = count_parameters(specs)
    label = size_label(total, shared, expert, n_experts) if total > 0 and kind != "adapter" else None
    warnings = []
    fallback = name or model_name(directory)
    with _quiet("metadata"):
        try:
            # gguf takes a negative total as the sign of an adapter, whose name may contain the size of its base.
            metadata = _read_cards(directory, merged, -total if kind == "adapter" else total)
            if name:
                metadata.name, metadata.basename = name, None if merged else metadata.basename
            metadata.name = metadata.name or fallback
            metadata.size_label = metadata.size_label or label
            keys = tuple(_keys(metadata, arch))
        except Exception as error:  # gguf and yaml raise many types; the card is optional
            what = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.append(RunWarning("model-card", f"the model card was ignored: {what}"))
            metadata = Metadata(name=fallback, size_label=label)
            keys = tuple(_keys(metadata, arch))
    head = (KeyValue.string("general.architecture", arch), KeyValue.string("general.type", kind))
    tail = (KeyValue.u32("general.quantization_version", GGML_QUANT_VERSION),)
    return General((*head, *keys, *tail), tuple(warnings), metadata)


def _read_cards(directory: Place, merged: Sequence[Place], n_parameters: int) -> Any:
    """gguf's metadata of the model in `directory` with `merged` adapters. ValueError if a card is too large."""
    metadata = _load(directory, n_parameters)
    if merged:
        _make_fine_tune(metadata, [_load(folder, -1) for folder in merged])
    return metadata


def _read_card(path: Place) -> dict[str, Any]:
    """The front matter of a model card, as gguf's Metadata.load_model_card reads it; empty if there is none.

    ValueError if parsing it could take more memory than is reserved for it.
    """
    import yaml

    if not path.is_file():
        return {}
    text = read_start(path, MAX_CARD_NBYTES + 1)
    if len(text) > MAX_CARD_NBYTES:
        raise ValueError(f"{CARD} is larger than {MAX_CARD_NBYTES:,} bytes")
    first, *lines = text.decode("utf-8").splitlines() or [""]
    if first != FENCE:
        return {}
    matter = "\n".join(lines[: lines.index(FENCE)] if FENCE in lines else lines) + "\n"
    if len(matter) > MAX_FRONT_MATTER_NBYTES:
        raise ValueError(f"its front matter is larger than {MAX_FRONT_MATTER_NBYTES:,} bytes")
    # As in gguf: "no" is Norwegian, not false, and a tab counts as two spaces.
    data = yaml.safe_load(matter.replace("- no\n", '- "no"\n').replace("\t", "  "))
    return data if isinstance(data, dict) else {}


def _load(directory: Place, n_parameters: int) -> Any:
    """gguf's metadata of `directory`; in the Hugging Face cache, the repo's name replaces that of the folder.

    Like gguf's Metadata.load, but it also accepts JSON with a byte-order mark.
    """
    from gguf.metadata import Metadata

    card, params = _read_card(directory / CARD), load_object_if_present(directory / CONFIG)
    name = Path(model_name(directory))
    metadata = Metadata.apply_metadata_heuristic(Metadata(), card, params, name, n_parameters)
    sampling = load_object_if_present(directory / "generation_config.json")
    for field in fields(metadata):
        what = field.name.removeprefix("sampling_")
        if what != field.name:
            setattr(metadata, field.name, sampling.get("temperature" if what == "temp" else what))
    return metadata


def _make_fine_tune(metadata: Any, adapters: Sequence[Any]) -> None:
    """Turn a base's metadata into those of a model that adapters were merged into."""
    cards = [entry for adapter in adapters for entry in adapter.base_models or ()]
    own = {field: value for field in _OWN_FIELDS if (value := getattr(metadata, field))}
    names = [str(adapter.name) for adapter in adapters]
    for field in _OWN_FIELDS:
        setattr(metadata, field, None)
    metadata.base_models = [(cards[0] if cards else {}) | own]
    base = str(own.get("name", "model"))
    metadata.basename = metadata.basename or base
    metadata.name = " + ".join([base, *names])
    metadata.finetune = " ".join(names)


def count_parameters(specs: Iterable[tuple[str, TensorSpec]]) -> tuple[int, int, int, int]:
    """Return the numbers of parameters (total, shared, of one expert) and of experts.

    Source: GGUFWriter.get_total_parameter_count in gguf.
    """
    total = shared = expert = n_experts = 0
    for target, spec in specs:
        total += spec.n_elements
        if "_exps." in target and len(spec.shape) >= 3:
            n_experts = spec.shape[-3]
            expert += spec.n_elements // n_experts
        else:
            shared += spec.n_elements
    return total, shared, expert, n_experts


def _keys(metadata: Any, arch: str) -> Iterator[KeyValue]:
    """The keys that gguf would write for `metadata`, with exact types."""
    from gguf.gguf_writer import GGUFWriter

    writer = GGUFWriter("", arch)
    metadata.set_gguf_meta_model(writer)
    for key, entry in writer.kv_data[0].items():
        if key in ("general.architecture", "general.type"):
            continue
        if entry.type == GGUFValueType.ARRAY:
            yield KeyValue.array(key, PackedArray.of_strings([_utf8(item) for item in entry.value]))
        elif entry.type == GGUFValueType.STRING:
            yield KeyValue.string(key, _utf8(entry.value))
        else:
            yield KeyValue(key, entry.type, entry.value)


def _utf8(value: object) -> str:
    """`value` as text; half of a surrogate pair in a card, or a byte of a name that is not UTF-8, becomes "?"."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Disable a library's logger, whose remarks on a model card would confuse users."""
    logger = logging.getLogger(logger_name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
