"""Draft a recipe for an unsupported checkpoint from its tensor names, its shapes and its config.

Permutations of rows, the calculations of the runtime and the meaning of config flags cannot be determined
automatically; they are marked TODO. The draft is a Python module. Its RECIPE binds to the checkpoint from which it was
drafted, unless tensors with the same template have different shapes, or a name contains braces or a third number, which
recipes cannot express.
"""

from __future__ import annotations

from streamconv.budget import Budget, default_limit_nbytes
from streamconv.checkpoint.folder import Checkpoint
from streamconv.files.store import Place
from streamconv.recipe.draft.dims import TODO, guess_dims
from streamconv.recipe.draft.sources import collect, count_layers, gguf_arch, kinds_of_layers
from streamconv.recipe.draft.text import Draft, module_text


def draft(directory: Place) -> str:
    """Return the text of a recipe module for the checkpoint in `directory`.

    Raises:
        SourceError: The checkpoint cannot be opened.
    """
    with Checkpoint.open(directory, budget=Budget(default_limit_nbytes())) as checkpoint:
        config, shapes = checkpoint.config.raw, {name: one.shape for name, one in checkpoint.tensors.items()}
    names = config.get("architectures")
    model_type = str(config.get("model_type") or TODO)
    arch = gguf_arch(model_type)
    sources, unsayable = collect(shapes, arch)
    n_layers = count_layers(sources)
    axes, only = kinds_of_layers(sources, n_layers)
    return module_text(
        Draft(
            config=config,
            hf_name=next((n for n in names if isinstance(n, str)), TODO) if isinstance(names, list) else TODO,
            model_type=model_type,
            arch=arch,
            sources=sources,
            unsayable=unsayable,
            n_layers=n_layers,
            dims=guess_dims(config, sources, n_layers),
            axes=axes,
            only=only,
        )
    )
