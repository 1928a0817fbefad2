"""The modules of sentence-transformers in a model's folder: they turn hidden states into embeddings of texts or tokens.

modules.json lists them in the order in which they are applied: the model itself, pooling, dense layers. Modules that a
GGUF file cannot describe are refused by name.

Sources: sentence-transformers 6.2.0 (base/modules/dense.py, sentence_transformer/modules/pooling.py), PyLate's Dense,
and llama.cpp's build_pooling and build_dense_out, which apply dense layers after the pooling. Only linear dense layers
are accepted, for which the order of the two makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.budget import Budget
from streamconv.checkpoint.config import Config
from streamconv.checkpoint.safetensors import Shard, SourceTensor
from streamconv.checkpoint.weight_sets import WHOLE
from streamconv.errors import RunWarning, SourceError
from streamconv.files.hub import CONFIG
from streamconv.files.store import Place
from streamconv.files.strict_json import MAX_CONFIG_NBYTES, load_list, load_object

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
OLD_SETTINGS = "sentence_bert_config.json"
DENSE = "dense."  # prefix of the names of dense layers' tensors: dense.0.linear.weight in the first

# sentence-transformers' modes, as llama.cpp's LLAMA_POOLING_TYPE_*.
POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
RANK = 4  # LLAMA_POOLING_TYPE_RANK: the last token's hidden state goes to a classifier

# Versions before 5.6 write these flags instead of a mode; without any of them, the mode is mean.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_IDENTITY = "Identity"
# Not needed in the file: Dropout does nothing at inference, and callers decide which vectors count.
_OUTSIDE = ("Dropout", "MultiVectorMask")
_HINT = "llama.cpp would give other embeddings: run the model with sentence-transformers"


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules that follow the model, from modules.json.

    Attributes:
        is_given: Whether there is a modules.json: the model then returns embeddings or scores, not text.
        pooling: A key of POOLING; None if each token keeps its vector.
        answers: The ids of the tokens (yes, no) whose logits a reranker compares; None if the result is embeddings.
        tensors: The tensors of the dense layers by name, as dense.0.linear.weight.
        shards: The open files that hold them.
        warnings: Steps that callers have to do themselves, since a GGUF file cannot express them.
        fault: Why a GGUF file cannot express these modules; None if it can.
    """

    is_given: bool = False
    pooling: str | None = None
    answers: tuple[int, int] | None = None
    tensors: dict[str, SourceTensor] = field(default_factory=dict, repr=False)
    shards: tuple[Shard, ...] = ()
    warnings: tuple[RunWarning, ...] = ()
    fault: SourceError | None = None

    @property
    def has_dense(self) -> bool:
        return bool(self.tensors)

    @property
    def pooling_type(self) -> int | None:
        """The number of llama.cpp's LLAMA_POOLING_TYPE_*; None if each token keeps its vector."""
        if self.answers is not None:
            return RANK
        return None if self.pooling is None else POOLING[self.pooling]


NO_MODULES = Modules()


def read_modules(directory: Place, budget: Budget) -> Modules:
    """The modules in a model's folder. If they are malformed or unsupported, `fault` has the error.

    Raises:
        BudgetError: Their files do not fit in memory.
    """
    reader = _Reader(directory, budget)
    try:
        return reader.read()
    except SourceError as error:
        reader.close()
        return Modules(is_given=True, fault=error)
    except BaseException:
        reader.close()
        raise


class _Reader:
    """The state of `read_modules`, with the shards to close on an error."""

    def __init__(self, directory: Place, budget: Budget) -> None:
        self.directory, self.budget = directory, budget
        self.file = directory / MODULES
        self.pooling: str | None = None
        self.answers: tuple[int, int] | None = None
        self.shards: list[Shard] = []
        self.tensors: dict[str, SourceTensor] = {}
        self.warnings: list[RunWarning] = []

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def read(self) -> Modules:
        if not self.file.exists():
            folders = [f"{number}_{kind}" for kind in ("Pooling", "Dense") for number in (1, 2, 3)]
            if any((self.directory / folder).is_dir() for folder in folders):
                raise SourceError(
                    f"has pooling or dense layers, but no {MODULES} to say how they are used",
                    file=self.directory,
                    hint=f"download {MODULES} too, or remove their folders to convert the model without them",
                    code="modules-missing",
                )
            return NO_MODULES
        modules = [self._module(entry) for entry in load_list(self.file, MAX_CONFIG_NBYTES, afford=self._afford)]
        if not modules or modules[0][0] != "Transformer":
            raise self._not_modules("its first module is not a Transformer")
        is_normalized = False
        for kind, full_name, folder in modules[1:]:
            if kind == "Normalize":
                is_normalized = True  # callers of the runtime choose whether to normalise
            elif self.answers or (kind in ("Pooling", "Dense", "LogitScore") and is_normalized):
                raise self._beyond(f"{kind} after {'LogitScore' if self.answers else 'Normalize'}")
            elif kind == "Pooling":
                self._read_pooling(folder)
            elif kind == "Dense":
                self._read_dense(folder, full_name)
            elif kind == "LogitScore" and not self.pooling and not self.tensors:
                self._read_answers(folder)
            elif kind not in _OUTSIDE:
                raise self._beyond(f"the module {kind}")
        self._read_settings()
        return Modules(True, self.pooling, self.answers, self.tensors, tuple(self.shards), tuple(self.warnings))

    def _module(self, entry: object) -> tuple[str, str, Place]:
        """Kind, class and folder of an entry of modules.json."""
        path, full_name = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(full_name, str) or not full_name:
            raise self._not_modules("has an entry without a type or a path")
        if "\0" in path or path.startswith("/") or ".." in path.replace("\\", "/").split("/"):
            raise self._not_modules(f"names {path!r:.80}, which is not inside the model's folder")
        return full_name.rpartition(".")[2], full_name, self.directory / path if path else self.directory

    def _read_pooling(self, folder: Place) -> None:
        config = self._config(folder)
        stated = config.get("pooling_mode")
        if stated is None:
            stated = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True] or ["mean"]
        modes = [stated] if isinstance(stated, str) else stated
        if self.pooling is not None or not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLING:
            shown = " and ".join(map(str, modes)) if isinstance(modes, list) else repr(modes)
            what = "a second pooling" if self.pooling else f"pooling {shown:.80}"
            raise self._beyond(what, folder, f"llama.cpp has {', '.join(POOLING)}")
        self.pooling = modes[0]
        if config.get("include_prompt") is False:
            message = "sentence-transformers leaves the tokens of a prompt out of the pooling; llama.cpp includes them"
            self.warnings.append(RunWarning("prompt-pooled", message))

    def _read_answers(self, folder: Place) -> None:
        config = self._config(folder)
        if config.get("false_token_id") is None:
            raise self._beyond("a score from a single token's logit", folder, "llama.cpp compares two tokens")
        answers = Config(config, folder / CONFIG)
        yes, no = answers.integer("true_token_id", 0), answers.integer("false_token_id", 0)
        if yes is None or no is None:
            raise answers.wrong("true_token_id", "a token id")
        self.answers = yes, no

    def _read_dense(self, folder: Place, full_name: str) -> None:
        config, number = self._config(folder), sum(name.endswith(".linear.weight") for name in self.tensors)
        activation = config.get("activation_function")
        if activation is None:
            activation = _IDENTITY if full_name.startswith("pylate.") else "Tanh"  # the classes' own defaults
        if not isinstance(activation, str) or activation.rpartition(".")[2] != _IDENTITY:
            raise self._beyond(f"a dense layer with {activation!s:.80}", folder, "llama.cpp's are linear")
        if config.get("use_residual"):
            raise self._beyond("a dense layer with a residual", folder, "llama.cpp's have none")
        if not (folder / WHOLE).exists():
            raise _no_weights(folder)
        shard = Shard(folder / WHOLE, self.budget)
        self.shards.append(shard)
        self._check_sizes(config, shard)
        for name, tensor in shard.tensors.items():
            self.tensors[f"{DENSE}{number}.{name}"] = replace(tensor, name=f"{DENSE}{number}.{name}")

    def _check_sizes(self, config: Mapping[str, Any], shard: Shard) -> None:
        weight = shard.tensors.get("linear.weight")
        if weight is None:
            raise SourceError("no linear.weight", file=shard.path, hint="download it again", code="no-weights")
        stated = [config.get("out_features"), config.get("in_features")]
        if any(one is not None and [one] != [found] for one, found in zip(stated, weight.shape, strict=False)):
            what = f"has shape {list(weight.shape)}, but the {CONFIG} next to it says {stated}"
            hint = "download both again"
            raise SourceError(what, file=shard.path, tensor=weight.name, hint=hint, code="shape-mismatch")

    def _read_settings(self) -> None:
        """Warn about text processing that sentence-transformers does before the model."""
        settings, old = (self._optional(name) for name in (SETTINGS, OLD_SETTINGS))
        prompts = settings.get("prompts")
        texts = dict(prompts) if isinstance(prompts, dict) else {}
        texts |= {name: settings.get(name) for name in ("query_prefix", "document_prefix")}
        shown = [f"{name} {text!r:.60}" for name, text in texts.items() if isinstance(text, str) and text]
        if shown:
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            message = f"a GGUF file cannot hold the prompts that are put before texts: {', '.join(shown[:4])}{more}"
            self.warnings.append(RunWarning("prompts-left-out", message))
        if old.get("do_lower_case") is True:
            message = "sentence-transformers converts texts to lower case first; llama.cpp does not"
            self.warnings.append(RunWarning("lower-case", message))

    def _optional(self, name: str) -> Mapping[str, Any]:
        path = self.directory / name
        return load_object(path, MAX_CONFIG_NBYTES, afford=self._afford) if path.exists() else {}

    def _config(self, folder: Place) -> Mapping[str, Any]:
        path = folder / CONFIG
        if not path.exists():
            raise SourceError("the module's config is missing", file=path, hint="download it too", code="module-config")
        return load_object(path, MAX_CONFIG_NBYTES, afford=self._afford)

    def _afford(self, nbytes: int) -> None:
        self.budget.check("the JSON of its modules", nbytes, file=self.directory)

    def _not_modules(self, what: str) -> SourceError:
        return SourceError(what, file=self.file, hint="download it again", code="modules-malformed")

    def _beyond(
        self, what: str, folder: Place | None = None, why: str = "a GGUF file cannot express that"
    ) -> SourceError:
        return SourceError(f"{what}: {why}", file=folder or self.file, hint=_HINT, code="module-unsupported")


def _no_weights(folder: Place) -> SourceError:
    if (folder / "pytorch_model.bin").exists():
        hint = "save the model again with sentence-transformers"
        return SourceError("only pickled weights, which are never loaded here", file=folder, hint=hint, code="pickled")
    return SourceError(f"no {WHOLE}", file=folder, hint="download it as well", code="no-weights")
