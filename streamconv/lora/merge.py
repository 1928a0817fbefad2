"""Adapters merged into a checkpoint: its table of tensors with the changed ones made again, for any recipe to bind.

Owns: which stored tensors the adapters change, replace or add, and everything that rules a merge out. Does not own: an
adapter's files and scales (resolve.py and what it rests on), the arithmetic (lazy/arithmetic.py), or targets
(recipe/bind.py).
Invariant: merging happens in the checkpoint's own names, rows and shapes, before any operation of a recipe; what cannot
be merged exactly is refused, all of it at once.

What is merged is the adapted model as PEFT runs it: on a tied base a changed embedding leaves the head as it was, and a
changed head the embedding, so the model gets an `output.weight` of its own. MLX trains the one matrix that both are, as
PEFT does with `ensure_weight_tying`: there both change, and the model stays tied.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from streamconv.checkpoint.config import MAX_NUMBER, Config
from streamconv.checkpoint.folder import Checkpoint
from streamconv.checkpoint.safetensors import SourceTensor
from streamconv.errors import RunWarning, SourceError
from streamconv.lazy.arithmetic import AddProduct, ColumnMagnitudes, RowMagnitudes
from streamconv.lazy.node import LazyTensor
from streamconv.lazy.views import matrix_of, transposed
from streamconv.lora.base import N_VOCAB, BaseModel
from streamconv.lora.config import LoraConfig, MlxConfig, Problem, read_lora_config
from streamconv.lora.files import parse_name
from streamconv.lora.resolve import SAVE_ENDS, LoraModule, base_hint, other_base, refuse_all, resolve
from streamconv.lora.specs import Adapter, Merged
from streamconv.lora.whole_weights import TokenRows, WholeWeight, alone, one_by_one
from streamconv.metadata.vocab.choice import Tokenizers
from streamconv.metadata.vocab.files import has_tokens
from streamconv.recipe.bind import bind
from streamconv.recipe.language import Model, Stored
from streamconv.recipe.names import fill
from streamconv.recipe.ops import factors_through
from streamconv.recipe.spelling import Speller
from streamconv.recipe.words import Tensor

# Kinds of tensors (file.py) that replace one of the base's, with the end of its name there. What has no such end,
# as stacked experts, is of an unknown kind until the base knows it.
_REPLACING: Mapping[str, str] = {"weight": ".weight", "norm": ".weight", "bias": ".bias", "unknown": ""}
# What rules out a GGUF adapter and not a merge; whether they can be merged is found here.
_MERGEABLE = frozenset(("dora", "tokens", *_REPLACING))
_FROZEN = (".base_layer.weight", ".original_module.weight")

HEAD_MODULE = "lm_head"  # transformers' name of it

_Weights = dict[str, tuple[str, Stored]]  # by stored name: the adapter's module, and its tensor


def merge(checkpoint: Checkpoint, model: Model, adapters: Sequence[Adapter]) -> Merged:
    """`model`, bound to `checkpoint`, with the adapters merged into it; no weight is read.

    (But of two adapters that both bring a grown frozen embedding, to see that it is the same one.) SourceError with all
    that cannot be merged.
    """
    return _Merge(checkpoint, model, adapters).run()


def _lacks_rows(problems: Sequence[Problem]) -> bool:
    """Whether rows of a grown vocabulary are all that is missing."""
    return bool(problems) and all(problem.code == "vocabulary" for problem in problems)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that is not stored as it is, for binding."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.spec.shape

    def lazy(self) -> LazyTensor:
        return self.tensor


class _Merge:
    """One run of `merge`; exists to collect what was made of each stored tensor, by whom, and problems."""

    def __init__(self, checkpoint: Checkpoint, model: Model, adapters: Sequence[Adapter]) -> None:
        self.checkpoint, self.model, self.adapters = checkpoint, model, tuple(adapters)
        self.recipe = model.recipe
        self.base = model.stored
        self.stored = dict(self.base)
        self.embedding = self.recipe.embedding
        self.made: dict[str, LazyTensor] = {}
        self.wholes: dict[str, WholeWeight] = {}  # by stored name
        self.changed_by: dict[str, list[Adapter]] = defaultdict(list)  # by stored name
        self.problems: list[tuple[Adapter, Problem]] = []
        self.warnings: list[RunWarning] = []
        self.n_vocab = model.dims[N_VOCAB]
        self.tying: list[Adapter] = []  # those whose change of a tied embedding is one of the head

    def run(self) -> Merged:
        options = {}
        for adapter in self.adapters:
            self._replace(adapter)
        for number, adapter in enumerate(self.adapters, 1):
            origins = self._add(adapter)
            digest = hashlib.sha256("\n".join(origins).encode()).hexdigest()
            options[f"adapter {number}"] = f"{adapter.weight!r} {adapter.file.shard.fingerprint} {digest}"
        self._settle_ends()
        tokenizers = self._tokenizers()
        self._refuse()
        overlay = self.stored | {name: _Made(tensor) for name, tensor in self.made.items()}
        model = bind(self.recipe, self._config(), overlay)
        return Merged(model, tokenizers, self.adapters, options, tuple(self.warnings))

    def _refuse(self) -> None:
        """SourceError with all problems, those of one adapter together."""
        errors = []
        for adapter in self.adapters:
            problems = [problem for other, problem in self.problems if other is adapter]
            try:
                refuse_all(
                    f"cannot be merged{other_base(problems, adapter.file)}",
                    problems,
                    adapter.file.directory,
                    SAVE_ENDS if _lacks_rows(problems) else base_hint(problems),
                    code="adapter-unmergeable",
                )
            except SourceError as error:
                errors.append(error)
        if errors:
            first, *others = errors
            what = first.message + "".join(f"; and {error.file}: {error.message}" for error in others)
            hint = None if others else first.hint
            listed = [one for error in errors for one in error.problems]
            raise SourceError(what, file=first.file, hint=hint, problems=listed, code="adapter-unmergeable")

    def _problem(self, adapter: Adapter, code: str, message: str, *modules: str) -> None:
        self.problems.append((adapter, Problem(code, message, modules)))

    # -- whole weights

    def _replace(self, adapter: Adapter) -> None:
        """Take the adapter's whole weights in place of the base's: modules_to_save, a resized vocabulary."""
        frozen, trained = self._whole_weights(adapter)
        if trained and adapter.weight != 1:
            what = "whole weights (modules_to_save) replace the base's: they merge at weight 1 alone"
            self._problem(adapter, "weight", what)
        ends = [tensor for name, (_, tensor) in (*frozen.items(), *trained.items()) if self._is_end(name)]
        n_vocab = max((tensor.shape[0] for tensor in ends if len(tensor.shape) == 2), default=self.n_vocab)
        if n_vocab != self.model.dims[N_VOCAB]:
            self.n_vocab = n_vocab
        for name, (module, tensor) in (*frozen.items(), *trained.items()):
            shape = self._original(name).shape
            expected = (self.n_vocab, *shape[1:]) if self._is_end(name) else shape
            whole = WholeWeight(adapter, tensor, name in trained)
            other = self.wholes.setdefault(name, whole)
            if tensor.shape != expected:
                shapes = f"has shape {list(tensor.shape)}, the base's is {list(expected)}"
                self._problem(adapter, "shape", shapes, module)
            elif other is not whole and other.excludes(whole):
                self._problem(adapter, "twice", f"{name} is replaced by {other.adapter.label} as well", module)
            elif whole.is_trained:
                self.made[name] = tensor.lazy()
                self.changed_by[name].append(adapter)
            else:
                self.stored[name] = tensor

    def _whole_weights(self, adapter: Adapter) -> tuple[_Weights, _Weights]:
        """The base's weights that PEFT saved beside the trained ones, and those that were trained whole.

        Of the former only an embedding or head matters whose vocabulary has grown: it is what factors are added to.
        """
        frozen, trained = _Weights(), _Weights()
        strange: dict[str, list[str]] = defaultdict(list)
        whole = {
            full_name: (role, module, module + _REPLACING.get(role, ".weight"))
            for full_name in adapter.file.shard.tensors
            for role, module in [parse_name(full_name)]
            if role in _REPLACING or full_name.endswith(_FROZEN)
        }
        speller = Speller(self.recipe, (name for _, _, name in whole.values()))
        self.warnings += speller.warnings
        for full_name, (role, module, spelled) in whole.items():
            tensor, is_frozen = adapter.file.shard.tensors[full_name], full_name.endswith(_FROZEN)
            name = speller.spell(spelled)
            name = name if self._is_stored(name) else None
            if name is None and (experts := self._experts(module, tensor)).keys() & self.stored.keys():
                trained |= {one: (module, _Made(expert)) for one, expert in experts.items()}
            elif name is None:
                strange["tensor" if role == "unknown" else role].append(module)
            elif is_frozen and self._is_end(name) and tensor.shape != self._original(name).shape:
                frozen[name] = module, tensor
            elif not is_frozen and (name not in trained or ".modules_to_save." in full_name):
                trained[name] = module, tensor  # with a grown vocabulary PEFT saves trained ends under two names
        for what, modules in strange.items():
            self._problem(adapter, "no-module", f"the base ({self.recipe.arch}) has no such {what}", *modules)
        return {name: frozen[name] for name in frozen if name not in trained}, trained

    def _experts(self, name: str, stack: SourceTensor) -> dict[str, LazyTensor]:
        """Stacked experts that an adapter saved whole, one by one; none where the tensor is another."""
        is_known = len(stack.shape) == 3 and self.recipe.find(name) is not None
        return dict(one_by_one(self.model, name, stack.lazy())) if is_known else {}

    def _is_stored(self, name: str | None) -> TypeGuard[str]:
        return name in self.base or name == self.recipe.head

    def _is_end(self, name: str) -> bool:
        return name in (self.embedding, self.recipe.head)

    def _original(self, name: str) -> Stored:
        """The checkpoint's tensor `name`; of a tied head the embedding."""
        return self.base.get(name) or self.base[self.embedding]

    def _base_of(self, name: str) -> Stored:
        """The tensor that `name` begins as, which an adapter may have brought; a tied head begins as the embedding."""
        return self.stored.get(name) or self.stored[self.embedding]

    # -- factors

    def _add(self, adapter: Adapter) -> list[str]:
        """Add the adapter's products to what it changes; what of its configuration and of the base decided them."""
        config = read_lora_config(adapter.file.config)
        if config.ties_ends:
            self.tying.append(adapter)
        base = self._base_model()
        resolved = resolve(adapter.file, base, config)
        self.problems += [(adapter, problem) for problem in resolved.problems if problem.code not in _MERGEABLE]
        self.warnings += resolved.warnings
        if config.invocation_tokens:
            self._problem(
                adapter, "alora", "an activated LoRA: its tokens switch it on at runtime, which no merge can express"
            )
        magnitudes = self._magnitudes(adapter, config, resolved.modules)
        origins = []
        singles = alone(self.recipe)
        for module in resolved.modules:
            if module.slot.n_experts and self.recipe.tensors[module.slot.order[1]].target not in singles:
                self._problem(adapter, "experts", "experts that are stored as one cannot be merged with", module.name)
                continue
            for name, left, right in self._factors(module):
                self._change(adapter, module, name, left, right, magnitudes.get(module.name))
            origins.append(f"{module.name} {module.slot.order} {module.scale!r} {module.turned}")
        return [*origins, *self._replace_rows(adapter, config)]

    def _replace_rows(self, adapter: Adapter, config: LoraConfig) -> Iterator[str]:
        """Put the adapter's trained rows (trainable_token_indices) in place; what decided them."""
        deltas = {
            module: tensor
            for name, tensor in adapter.file.shard.tensors.items()
            for role, module in [parse_name(name)]
            if role == "tokens"
        }
        speller = Speller(self.recipe, (f"{module}.weight" for module in deltas))
        placed: dict[str, TokenRows] = {}
        for module, tensor in deltas.items():
            name = speller.spell(f"{module}.weight")
            numbers = next((rows for key, rows in config.token_rows.items() if f".{module}".endswith(f".{key}")), None)
            if numbers is None and module.endswith(HEAD_MODULE):
                numbers = config.token_rows.get("embed_tokens")  # of a tied model, whose head PEFT wraps as well
            if not self._is_stored(name):
                self._problem(adapter, "no-module", f"the base ({self.recipe.arch}) has no such module", module)
            elif numbers is None:
                self._problem(adapter, "tokens", "the configuration does not say of which tokens its rows are", module)
            elif fault := self._rows_fault(adapter, name, numbers, tensor):
                self._problem(adapter, "tokens", fault, module)
            else:
                placed[name] = TokenRows(numbers, tensor)
        for key, numbers in config.token_rows.items():
            is_tied_head = key.endswith(HEAD_MODULE) and not self._has_own_head()
            if deltas and numbers and not is_tied_head and not any(f".{one}".endswith(f".{key}") for one in deltas):
                self._problem(adapter, "tokens", f"trainable_token_indices has rows of {key}, and they are missing")
        if not self._has_own_head() and self.recipe.head in placed:
            head = placed.pop(self.recipe.head)
            if (embedding := placed.get(self.embedding)) is None or not embedding.is_same(head):
                self._problem(adapter, "tying", "its rows of the embedding and of the tied head differ")
        for name, rows in placed.items():
            before = self.made.get(name) or self._base_of(name).lazy()
            self.made[name] = rows.over(before)
            self.changed_by[name].append(adapter)
            yield f"{name} rows {rows.numbers}"

    def _rows_fault(self, adapter: Adapter, name: str, numbers: Sequence[int], tensor: SourceTensor) -> str | None:
        """Why trained rows cannot replace those of `name`."""
        shape = (self.made.get(name) or self._base_of(name).lazy()).spec.shape
        if len(shape) == 2 and (beyond := max(numbers, default=0)) >= shape[0]:
            return f"trainable_token_indices has {beyond}, and {name} {shape[0]} rows: the adapter's base was another"
        if len(shape) != 2 or tensor.shape != (len(numbers), shape[1]):
            return f"trained rows {list(tensor.shape)} of {len(numbers)} tokens do not fit {name} {list(shape)}"
        if adapter.weight != 1:
            return "trained rows replace the base's: they merge at weight 1 alone"
        if self.changed_by[name]:
            return f"{name} is changed by {self.changed_by[name][0].label} as well"
        return None

    def _base_model(self) -> BaseModel:
        """The base as its adapters see it: the head of a tied base is a matrix of its own here."""
        head = {row.target for row in self.recipe.tensors if row.source == self.recipe.head}
        return BaseModel(
            path=self.checkpoint.directory,
            model=replace(self.model, dims=self.model.dims | {N_VOCAB: self.n_vocab}),
            is_tied=False,
            keys=(),
            targets=frozenset(head | {target.name for target in self.model.targets}),
        )

    def _magnitudes(
        self, adapter: Adapter, config: LoraConfig, modules: Sequence[LoraModule]
    ) -> dict[str, tuple[LazyTensor, bool]]:
        """DoRA's magnitudes by module, and whether there is one a column (PEFT's embeddings) in place of one a row."""
        tensors = {
            module: tensor
            for name, tensor in adapter.file.shard.tensors.items()
            for role, module in [parse_name(name)]
            if role == "dora"
        }
        if tensors and not config.is_dora:
            self._problem(adapter, "dora", "has DoRA's magnitudes, and its configuration says that it is plain LoRA")
        if tensors and (adapter.weight != 1 or len(self.adapters) > 1):
            self._problem(adapter, "dora", "DoRA merges alone and at weight 1: its norms are of the whole sum")
        found: dict[str, tuple[LazyTensor, bool]] = {}
        for module in modules:
            by_column = module.slot.is_embedding and not isinstance(config, MlxConfig)
            n = module.b.spec.shape[-2] if by_column or not module.slot.is_embedding else module.a.spec.shape[-1]
            tensor = tensors.pop(module.name, None)
            if tensor is not None and tensor.shape == (n,):
                found[module.name] = tensor.lazy(), by_column
            elif tensor is not None:
                self._problem(adapter, "dora", f"has magnitudes {list(tensor.shape)}, and needs {[n]}", module.name)
            elif config.is_dora:
                self._problem(adapter, "dora", "DoRA, and its magnitudes are missing", module.name)
        if tensors:
            self._problem(adapter, "dora", "has magnitudes, and no factors", *tensors)
        return found

    def _factors(self, module: LoraModule) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
        """(stored name, left, right) of each tensor that the module changes by scale * left @ right."""
        layer, number, expert = module.slot.order
        row = self.recipe.tensors[number]
        if module.slot.n_experts:
            row = self._single(row.target, layer)
        if module.slot.n_experts and module.slot.expert is None:
            yield from self._factors_of_stack(module)
        elif module.slot.is_embedding:
            yield row.source, transposed(module.a), transposed(module.b)
        else:
            yield fill(row.source, layer, expert), module.b, module.a

    def _factors_of_stack(self, module: LoraModule) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
        """As `_factors`, of all experts of a layer, in every tensor that their stack is split into."""
        for landing in module.slot.landings:
            layer, number, _ = landing.order
            row, single = self.recipe.tensors[number], self._single(landing.target, layer)
            apart = row.ops[: len(row.ops) - len(single.ops)]  # what makes single experts of the stack
            a, b = factors_through(apart, module.a, module.b, self.model)
            n_out, rank = b.spec.shape[-2:]
            for e in range(module.slot.n_experts):
                yield fill(single.source, layer, e), matrix_of(b, e, n_out), matrix_of(a, e, rank)

    def _single(self, target: str, layer: int) -> Tensor:
        """The row of single experts of a target, which the table of tensors has one by one from now on."""
        row = next(row for row in alone(self.recipe).values() if fill(row.target, layer) == fill(target, layer))
        if fill(row.source, layer, 0) not in self.stored:
            self._unstack(row, layer)
        return row

    def _unstack(self, row: Tensor, layer: int) -> None:
        """See a layer's stacked experts one by one, as recipes know them as well."""
        (name,) = {
            name
            for other in self.recipe.tensors
            if other.target == row.target and (name := fill(other.source, layer, 0)) in self.stored
        }
        stack = self.stored.pop(name).lazy()
        for one, expert in one_by_one(self.model, name, stack):
            self.stored[one] = _Made(expert)

    def _change(
        self,
        adapter: Adapter,
        module: LoraModule,
        name: str,
        left: LazyTensor,
        right: LazyTensor,
        magnitudes: tuple[LazyTensor, bool] | None,
    ) -> None:
        whole, scale = self.wholes.get(name), module.scale * adapter.weight
        if whole is not None and whole.is_trained and whole.adapter is not adapter:
            self._problem(adapter, "twice", f"{whole.adapter.label} replaces {name}", module.name)
            return
        if not abs(scale) <= MAX_NUMBER:
            self._problem(adapter, "scale", f"its scale comes to {scale:g}, beyond float32", module.name)
            return
        before = self.made.get(name) or self._base_of(name).lazy()
        if (n_rows := left.spec.n_rows) != before.spec.n_rows:  # the vocabulary grew, and the frozen rows are missing
            what = f"its factors are of {n_rows} rows, and {name} has {before.spec.n_rows}"
            self._problem(adapter, "vocabulary", what, module.name)
            return
        merged: LazyTensor = AddProduct(before, left, right, scale)
        if magnitudes is not None:
            vector, by_column = magnitudes
            merged = ColumnMagnitudes(merged, vector) if by_column else RowMagnitudes(merged, vector)
        self.made[name] = merged
        self.changed_by[name].append(adapter)

    # -- embedding, head and tokenizer

    def _settle_ends(self) -> None:
        """Untie a head whose embedding changed, unless both are one; refuse one that the vocabulary outgrew."""
        head, embedding = self.recipe.head, self.embedding
        if self._tie():
            if head not in self.made:
                self.stored.pop(head, None)  # a copy, in the base or of the grown rows
        elif embedding in self.made and head not in self.made and head not in self.stored:
            self.made[head] = self.stored[embedding].lazy()
        is_told = any(problem.code == "vocabulary" for _, problem in self.problems)
        for name in () if is_told else (embedding, head):
            tensor = self.made.get(name) or (self.stored[name].lazy() if name in self.stored else None)
            if tensor is not None and tensor.spec.shape[0] != self.n_vocab:
                grew = f"the vocabulary grew from {tensor.spec.shape[0]} to {self.n_vocab} tokens"
                what = f"{grew}, and the adapter has no {name} of that size"
                self._problem(next(self._ends_from()), "vocabulary", what)

    def _has_own_head(self) -> bool:
        """Whether the base has a head of its own: one that its config calls the embedding is a copy of that."""
        return self.recipe.head in self.base and not self.recipe.stated_tie(self.model.config)

    def _tie(self) -> bool:
        """Whether who changed the embedding of a tied base changed the head with it (MLX, and ensure_weight_tying)."""
        if self._has_own_head():
            return False
        of_embedding, of_head = self.changed_by[self.embedding], self.changed_by[self.recipe.head]
        tying = [adapter for adapter in of_embedding if adapter in self.tying]
        others = [adapter for adapter in (*of_embedding, *of_head) if adapter not in tying]
        if tying and others:
            what = f"{tying[0].label} changes embedding and head as one, and this one changes one of them"
            self._problem(others[0], "tying", what)
        return bool(tying)

    def _ends_from(self) -> Iterator[Adapter]:
        """Who brought or changed an embedding or a head: whole ones first."""
        ends = (self.embedding, self.recipe.head)
        yield from (self.wholes[name].adapter for name in ends if name in self.wholes)
        yield from (adapter for name in ends for adapter in self.changed_by[name])

    def _config(self) -> Config:
        """The base's configuration, as it would be of the merged model."""
        raw = dict(self.model.config.raw)
        if self.n_vocab != self.model.dims[N_VOCAB]:
            raw[self.recipe.dims[N_VOCAB].label] = self.n_vocab
        if self.recipe.head in self.made.keys() | (self.stored.keys() - self.base.keys()):
            raw |= {key: False for key in self.recipe.tie_keys if key in raw}
        return Config(raw, self.model.config.file, self.model.config.parent)

    def _tokenizers(self) -> Tokenizers:
        """Where the tokenizer may lie. An adapter that brought or changed embedding or head has the trained one."""
        beside = [adapter.file.directory for adapter in self._ends_from()]
        with_rows = next(filter(has_tokens, beside), None)
        if with_rows is None and self.n_vocab != self.model.dims[N_VOCAB]:
            what = (
                f"the vocabulary has {self.n_vocab} tokens, the base's {self.model.dims[N_VOCAB]}, and there is no "
                "tokenizer beside the adapter: tokenizer.save_pretrained(folder) puts it there"
            )
            self._problem(next(self._ends_from()), "tokenizer", what)
        folders = tuple(dict.fromkeys(adapter.file.directory for adapter in self.adapters))
        return Tokenizers(self.checkpoint.directory, folders, with_rows)
