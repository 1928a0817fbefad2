"""Ollama's Modelfile for a finished output: the file to run, and the prompt format if it is known for certain.

A chat template is recognised only by its complete text; for all others, Ollama derives a prompt format from the GGUF.
The formats are for chats without tools, and do not contain BOS, which the tokenizer adds.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.engine.split import Part
from streamconv.errors import UsageError
from streamconv.files.local import local_path
from streamconv.files.store import Place

TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt format in Go's template language, and the tokens that end an answer."""

    template: str
    stops: tuple[str, ...]


CHATML = Prompt(
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ("<|im_start|>", "<|im_end|>"),
)
LLAMA_3 = Prompt(
    "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

# SHA-256 of a chat template, stripped, with its line breaks as \n, as they are in tokenizer_config.json.
_KNOWN: Mapping[str, Prompt] = {
    # ChatML: transformers' former default; with a default for add_generation_prompt; with a BOS token before it.
    "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e": CHATML,
    "d7b5b8c7b58f7a6bf868aa46a5f73ee976d7292f40fcb9c3e7a1defd8d235cfb": CHATML,
    "bbb11deafc46a882550f9757a6fb189cfe6c8a47c1ebacd37ca8f8cc20836a30": CHATML,
    # LFM2's, which is ChatML for chats without tools (LFM2.5-1.2B-Base's chat_template.jinja).
    "dbdb865950da4567c1fbcf449414b82100f25a1cf52a29f38a877869ba41da7a": CHATML,
    # Llama 3's first one, without tools (Meta-Llama-3-8B-Instruct's tokenizer_config.json).
    "4f46ecd43418f216df8c26936c60e5d04bcc81db47db5d86fbe889f64212dd4c": LLAMA_3,
}


def find_prompt(chat_template: str) -> Prompt | None:
    """The prompt format of a chat template in Jinja; None if it is not a known one."""
    text = chat_template.strip().replace("\n", "\\n")
    return _KNOWN.get(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())


def modelfile_path(output: Path) -> Path:
    """The path of the Modelfile for an output: LFM2-1.2B-Q8_0.Modelfile for LFM2-1.2B-Q8_0.gguf."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}.Modelfile")


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A Modelfile, planned before the output is written.

    Attributes:
        path: Where it will be written.
        text: Its content.
        has_prompt: Whether it contains a prompt format.
    """

    path: Path
    text: str
    has_prompt: bool


def plan_modelfile(
    output: Part, place: Place | None = None, projectors: Sequence[Path] = (), base_template: str = ""
) -> Modelfile:
    """The Modelfile for an output, in the same folder.

    Args:
        output: A model, or an adapter.
        place: The base of an adapter.
        projectors: The projectors of a vision model, which Ollama takes as further FROM lines.
        base_template: The chat template of an adapter's base.

    Raises:
        UsageError: Ollama could not import it: the output is split, or an adapter's base is not a local GGUF file, or a
            path cannot be written in a Modelfile.
    """
    if output.is_of_split:
        raise UsageError("--modelfile needs a single file: Ollama cannot import split ones", code="option-conflict")
    base = None if place is None else local_path(place)
    if place is not None and not (base and base.is_file()):
        raise UsageError(
            "--modelfile needs the base's GGUF, to which Ollama applies the adapter",
            file=place,
            hint="convert the base first and give its GGUF file as --base",
            code="option-conflict",
        )
    path = modelfile_path(output.path)
    model = output.path if base is None else base
    lines = [f"# ollama create NAME -f {shlex.quote(path.name)}", f"FROM {_beside(model, path)}"]
    lines += [f"FROM {_beside(projector, path)}" for projector in projectors]
    if base is not None:
        lines.append(f"ADAPTER {_beside(output.path, path)}")
    prompt = find_prompt(_own_template(output) if base is None else base_template)
    if prompt is not None:
        lines.append(f'TEMPLATE """{prompt.template}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in prompt.stops]
    return Modelfile(path, "\n".join(lines) + "\n", prompt is not None)


def _beside(target: Path, path: Path) -> str:
    """`target` relative to the Modelfile, beginning with ./ or ../ so that Ollama takes it for a path."""
    # Symbolic links are resolved first, since ../ leads to the parent of the real folder.
    seen = os.path.relpath(Path(os.path.realpath(target.parent), target.name), os.path.realpath(path.parent))
    if not seen.isprintable():
        raise UsageError("a Modelfile cannot name this path", file=target, code="modelfile-path")
    return seen if seen.startswith("..") else f"./{seen}"


def _own_template(output: Part) -> str:
    return next((str(entry.value) for entry in output.keys if entry.key == TEMPLATE_KEY), "")
