"""An adapter on its base: which way round its factors lie, and all that keeps it from being carried, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.budget import unbounded
from streamconv.errors import SourceError
from streamconv.lazy.views import Transpose
from streamconv.lora.base import Landing, Slot
from streamconv.lora.config import Problem, read_lora_config
from streamconv.lora.files import LoraFile
from streamconv.lora.fold import landed
from streamconv.lora.open_base import open_base
from streamconv.lora.resolve import Resolved, grouped, orientations, refuse, resolve
from tests import loras, tiny
from tests.raising import raises
from tests.unit.test_base_model import LLAMA, gguf

LIMIT = unbounded()
Q, K, UP = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
A, B = "lora_A.weight", "lora_B.weight"


def resolved(adapter: Path, base: Path, scale: float | None = None) -> Resolved:
    with LoraFile.open(adapter, LIMIT) as file:
        return resolve(file, open_base(base, LIMIT), read_lora_config(file.config, scale))


def problems(adapter: Path, base: Path) -> dict[str, Problem]:
    found, base_model = resolved(adapter, base), open_base(base, LIMIT)
    _, landing = landed(found.sound, base_model.model)
    return {problem.code: problem for problem in grouped([*found.problems, *landing])}


def at(target: str) -> tuple[Landing, ...]:
    return (Landing(target, (0, 0, -1), ()),)


def refused(adapter: Path, base: Path) -> SourceError:
    with pytest.raises(SourceError) as caught, LoraFile.open(adapter, LIMIT) as file:
        refuse(resolved(adapter, base).problems, file, open_base(base, LIMIT))
    return caught.value


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads and 2, hidden 64, 160 wide, tied."""
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("untied"), tied=False)


# ---------------------------------------------------------------- orientation

STRAIGHT, TURNED, A_TURNED, B_TURNED = (False, False), (True, True), (True, False), (False, True)


@pytest.mark.parametrize(
    ("a", "b", "shape", "expected"),
    [
        ((8, 64), (32, 8), (32, 64), [STRAIGHT]),
        ((64, 8), (8, 32), (32, 64), [TURNED]),
        ((64, 8), (32, 8), (32, 64), [A_TURNED]),
        ((8, 64), (8, 32), (32, 64), [B_TURNED]),
        ((48, 64), (32, 48), (32, 64), [STRAIGHT]),  # a rank above out
        ((72, 64), (32, 72), (32, 64), [STRAIGHT]),  # and above in: shapes decide, for any rank
        ((64, 72), (72, 32), (32, 64), [TURNED]),
        ((64, 64), (32, 64), (32, 64), [STRAIGHT]),  # the rank is in: B tells for both
        ((64, 64), (64, 32), (32, 64), [TURNED]),
        ((32, 64), (32, 32), (32, 64), [STRAIGHT]),  # the rank is out: A tells for both
        ((64, 64), (64, 64), (64, 64), [STRAIGHT, TURNED]),
        ((1, 64), (64, 1), (64, 64), [STRAIGHT]),
        # Without the base's shape a factor is longer than it is wide.
        ((8, 64), (32, 8), (None, None), [STRAIGHT]),
        ((64, 8), (8, 32), (None, None), [TURNED]),
        ((64, 8), (32, 8), (None, None), [A_TURNED]),
        ((8, 16), (16, 8), (None, None), [STRAIGHT]),
        ((16, 8), (8, 16), (None, None), [TURNED]),
        ((8, 8), (8, 8), (None, None), [STRAIGHT, TURNED]),
        ((8, 64), (8, 8), (None, None), [STRAIGHT]),
        ((64, 8), (8, 8), (None, 64), [TURNED]),
        # What does not fit.
        ((8, 64), (32, 4), (32, 64), []),
        ((8, 60), (32, 8), (32, 64), []),
        ((0, 64), (32, 0), (32, 64), []),
        ((8, 64), (32,), (32, 64), []),
        ((), (), (32, 64), []),
        ((2, 8, 64), (2, 32, 8), (32, 64), []),
    ],
)
def test_orientations(a: Any, b: Any, shape: Any, expected: list[tuple[bool, bool]]) -> None:
    assert orientations([(a, b, Slot(at("x.weight"), shape))]) == [set(expected)]


def test_an_embedding_goes_from_the_vocabulary_to_the_hidden_size() -> None:
    embedding = Slot(at("token_embd.weight"), (50, 64), is_embedding=True)
    pairs = [((8, 50), (64, 8), STRAIGHT), ((50, 8), (8, 64), TURNED), ((8, 64), (50, 8), None)]
    for a, b, expected in pairs:
        assert orientations([(a, b, embedding)]) == [{expected} - {None}]


@pytest.mark.parametrize(
    ("a", "b", "fits"),
    [
        ((6, 8, 64), (6, 32, 8), True),
        ((6, 64, 8), (6, 8, 32), False),
        ((5, 8, 64), (5, 32, 8), False),
        ((6, 8, 64), (), False),
    ],
)
def test_experts_together_are_never_turned(a: Any, b: Any, fits: bool) -> None:
    slot = Slot(at("blk.0.ffn_up_exps.weight"), (32, 64), n_experts=6)
    assert orientations([(a, b, slot)]) == [{STRAIGHT} if fits else set()]


def test_what_shapes_leave_open_is_an_error(tmp_path: Path, llama: Path) -> None:
    adapter = loras.write(tmp_path, loras.factors(Q, 64, 64, r=64), loras.PEFT | {"r": 64})
    assert problems(adapter, llama)["ambiguous"].modules == (Q,)


@pytest.mark.parametrize("is_turned", [True, False])
def test_the_other_modules_of_a_file_tell_how_it_was_written(tmp_path: Path, llama: Path, is_turned: bool) -> None:
    tensors = loras.factors(Q, 64, 64, r=64) | loras.factors(K, 32, 64, r=64)
    if is_turned:
        tensors = {name: loras.turned(tensor) for name, tensor in tensors.items()}
    found = resolved(loras.write(tmp_path, tensors, loras.PEFT | {"r": 64}), llama)
    assert not found.problems
    assert [type(module.a).__name__ for module in found.modules] == ["Transpose" if is_turned else "Source"] * 2


def test_modules_that_disagree_tell_nothing(tmp_path: Path, llama: Path) -> None:
    straight, turned = loras.factors(K, 32, 64, r=64), loras.factors(UP, 160, 64, r=64)
    turned = {name: loras.turned(tensor) for name, tensor in turned.items()}
    adapter = loras.write(tmp_path, loras.factors(Q, 64, 64, r=64) | straight | turned, loras.PEFT | {"r": 64})
    found = [(problem.code, problem.modules) for problem in resolved(adapter, llama).problems]
    assert sorted(found) == [("ambiguous", (name,)) for name in (UP, K, Q)]  # the first two by a square A
    plain = {name: loras.turned(tensor) for name, tensor in loras.factors(UP, 160, 64).items()}
    plain |= loras.factors(K, 32, 64)
    assert not problems(loras.write(tmp_path, plain), llama)  # each by itself is certain


@pytest.mark.parametrize("alone", ["lora_A", "lora_B"])
@pytest.mark.parametrize("r", [32, 64])
def test_certain_modules_come_before_the_likelier_way(tmp_path: Path, llama: Path, alone: str, r: int) -> None:
    """One factor turned in all modules, by a program of its own, and the rank an extent, so that factors are square."""
    down = "model.layers.0.mlp.down_proj"
    tensors = loras.factors(Q, 64, 64, r=r) | loras.factors(K, 32, 64, r=r) | loras.factors(UP, 160, 64, r=r)
    tensors |= loras.factors(down, 64, 160, r=r)
    tensors = {name: loras.turned(tensor) if alone in name else tensor for name, tensor in tensors.items()}
    found = resolved(loras.write(tmp_path, tensors, loras.PEFT | {"r": r}), llama)
    assert not found.problems
    turned = [[isinstance(factor, Transpose) for factor in (module.a, module.b)] for module in found.modules]
    assert turned == [[alone == "lora_A", alone == "lora_B"]] * 4


@pytest.mark.parametrize("others", [(), (UP,)])
def test_stacked_experts_tell_nothing_of_other_modules(tmp_path: Path, others: tuple[str, ...]) -> None:
    """mlx-lm stores them straight, and all others turned."""
    base = tiny.lfm2moe(tmp_path / "base")
    experts, q = "model.layers.1.feed_forward.switch_mlp.up_proj", "model.layers.1.self_attn.q_proj"
    tensors = {f"{q}.lora_a": loras.noise("a", (64, 64)), f"{q}.lora_b": loras.noise("b", (64, 64))}
    tensors |= {
        f"{experts}.lora_a": loras.noise("ea", (6, 64, 64)),
        f"{experts}.lora_b": loras.noise("eb", (6, 160, 64)),
    }
    if others:
        dense = "model.layers.0.feed_forward.w1"
        tensors |= {f"{dense}.lora_a": loras.noise("c", (64, 64)), f"{dense}.lora_b": loras.noise("d", (64, 96))}
    settings = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0, "rank": 64}}
    found = resolved(loras.write(tmp_path / "adapter", tensors, settings), base)
    if others:
        assert not found.problems
        assert [isinstance(module.a, Transpose) for module in found.modules] == [True, True, False]
    else:
        assert [(problem.code, problem.modules) for problem in found.problems] == [("ambiguous", (q,))]


# ---------------------------------------------------------------- what is resolved


def test_modules_come_in_the_bases_order(tmp_path: Path, llama: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama)
    names = [module.slot.target.split(".", 2)[2] for module in resolved(adapter, llama).modules]
    layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"]
    assert names == [f"{name}.weight" for name in [*layer, *layer]]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.base_model.model."])
def test_prefixes(tmp_path: Path, llama: Path, prefix: str) -> None:
    (module,) = resolved(loras.write(tmp_path, loras.factors(Q, 64, 64, prefix=prefix)), llama).modules
    assert module.slot.target == "blk.0.attn_q.weight"


def test_a_model_without_a_head_has_shorter_names(tmp_path: Path, llama: Path) -> None:
    adapter = loras.write(tmp_path, loras.factors("layers.0.self_attn.q_proj", 64, 64))
    assert resolved(adapter, llama).modules[0].slot.target == "blk.0.attn_q.weight"


# ---------------------------------------------------------------- what cannot be carried


def without(tensors: dict[str, tiny.Tensor], *ends: str) -> dict[str, tiny.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


PAIR = loras.factors(Q, 64, 64)


@pytest.mark.parametrize(
    ("tensors", "settings", "code", "words"),
    [
        (PAIR, {"use_dora": True}, "dora", "dora"),
        (PAIR | {f"{Q}.lora_magnitude_vector": loras.noise("m", (64,))}, {}, "dora", "dora"),
        (without(PAIR, A), {}, "partner", "partner"),
        (without(PAIR, B), {}, "partner", "partner"),
        (PAIR | {f"base_model.model.{Q}.{B}": loras.noise("b", (64, 4))}, {}, "rank", "rank"),
        (PAIR, {"r": 4}, "rank", "rank"),
        (PAIR, {"rank_pattern": {"q_proj": 16}}, "rank", "rank"),
        (loras.factors(Q, 64, 60), {}, "shape", "shape"),
        (loras.factors(Q, 64, 16), {"use_qalora": True}, "shape", "shape"),
        (loras.factors("roberta.encoder.layer.0.query", 64, 64), {}, "no-module", "no-module"),
        (loras.factors("model.layers.7.mlp.up_proj", 160, 64), {}, "no-module", "no-module"),
        (loras.factors("model.layers.0.input_layernorm", 64, 1), {}, "no-matrix", "no-matrix"),
        (PAIR | {"lm_head.weight": loras.noise("h", (4, 64))}, {}, "weight", "weight"),
        (PAIR | {f"{Q}.bias": loras.noise("h", (64,))}, {}, "bias", "bias"),
        (PAIR | {f"{Q}.base_layer.bias": loras.noise("h", (64,))}, {"bias": "all"}, "bias", "bias"),
        (PAIR | {f"{Q}.lora_B.bias": loras.noise("h", (64,))}, {}, "lora-bias", "lora-bias"),
        (PAIR | {f"{Q}.lora_diag": loras.noise("h", (8,))}, {}, "kasa", "kasa"),
        (PAIR | {"model.norm.weight": loras.noise("h", (64,))}, {}, "norm", "norm"),
        (PAIR | {"model.embed_tokens.trainable_tokens_delta": loras.noise("h", (1, 64))}, {}, "tokens", "tokens"),
        (PAIR | {"mystery": loras.noise("h", (1, 64))}, {}, "unknown", "unknown"),
        (PAIR, {"layer_replication": [[0, 2], [1, 2]]}, "replication", "replication"),
        (PAIR, {"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}}, "bd-lora", "bd-lora"),
        (PAIR, {"init_lora_weights": "pissa"}, "init", "init"),
        (PAIR, {"peft_type": "peft-type"}, "peft-type", "peft-type"),
        (loras.factors("lm_head", 96, 64), {}, "tied", "tied"),
        (PAIR | loras.factors("layers.0.self_attn.q_proj", 64, 64), {}, "twice", "twice"),
        (PAIR | {f"{Q}.lora_a": loras.noise("again", (64, 8))}, {}, "twice", "twice"),
        ({}, {}, "empty", "empty"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, llama: Path, tensors: Any, settings: Any, code: str, words: str) -> None:
    found = problems(loras.write(tmp_path, tensors, loras.PEFT | settings), llama)
    assert code in found
    with raises(SourceError, code=words):
        with LoraFile.open(tmp_path, LIMIT) as file:
            refuse([found[code]], file, open_base(llama, LIMIT))


@pytest.mark.parametrize(
    ("extra", "settings"),
    [
        ({f"{Q}.base_layer.weight": loras.noise("w", (64, 64))}, {}),  # a copy of the frozen base
        ({f"{Q}.lora_velora_embed": loras.noise("w", (8,))}, {"velora_config": {"num_groups": 8}}),
        ({}, {"bias": "all"}),
        ({}, {"fan_in_fan_out": True}),
        ({}, {"use_qalora": True}),
        ({}, {"lora_bias": True}),
        ({}, {"modules_to_save": ["lm_head"]}),
        ({}, {"target_parameters": ["experts.up_proj"]}),
        ({}, {"layer_replication": [[0, 2]]}),
        ({}, {"use_bdlora": {"target_modules_bd_b": ["k_proj"], "nblocks": 2}}),
    ],
)
def test_what_has_no_effect_is_carried(tmp_path: Path, llama: Path, extra: Any, settings: Any) -> None:
    found = resolved(loras.write(tmp_path, PAIR | extra, loras.PEFT | settings), llama)
    assert not found.problems
    assert [module.name for module in found.modules] == [Q]


def test_an_embedding_and_a_head_on_an_untied_base(tmp_path: Path, llama: Path, untied: Path) -> None:
    adapter = tiny.peft_adapter(tmp_path, untied, targets=("embed_tokens", "lm_head"))
    assert [module.slot.target for module in resolved(adapter, untied).modules] == [
        "token_embd.weight",
        "output.weight",
    ]
    assert problems(adapter, llama)["tied"].modules == ("model.embed_tokens",)


def test_whether_a_base_is_tied_must_be_known(tmp_path: Path, untied: Path) -> None:
    gguf(tmp_path / "base.gguf", LLAMA | {"llama.vocab_size": tiny.N_BPE_TOKENS})
    adapter = tiny.peft_adapter(tmp_path / "adapter", untied, targets=("embed_tokens", "lm_head"))
    assert len(problems(adapter, tmp_path / "base.gguf")["tied"].modules) == 2


def test_a_dtype_that_is_none_of_ours(tmp_path: Path, llama: Path) -> None:
    tensors = {name: tiny.Tensor("I32", tensor.shape, tensor.data) for name, tensor in PAIR.items()}
    assert "I32" in problems(loras.write(tmp_path, tensors), llama)["dtype"].message


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    gguf(tmp_path / "base.gguf", LLAMA | {"llama.attention.head_count": 3}, {"blk.0.attn_q.weight": (64, 64)})
    adapter = loras.write(tmp_path / "adapter", PAIR)
    message = problems(adapter, tmp_path / "base.gguf")["heads"].message
    assert "64 rows" in message and "3 heads" in message


def test_all_problems_are_told_at_once_alike_ones_together(tmp_path: Path, llama: Path) -> None:
    tensors = tiny.tensors_of(tiny.peft_adapter(tmp_path / "whole", llama, dora=True))
    tensors |= loras.factors("model.layers.9.mlp.up_proj", 160, 64)
    tensors["base_model.model.lm_head.weight"] = loras.noise("h", (4, 64))
    adapter = loras.write(tmp_path / "adapter", tensors, loras.PEFT | {"kasa_config": {}, "r": 8})
    error = refused(adapter, llama)
    message = str(error)
    assert "model.layers.0.mlp.down_proj and 13 more: DoRA" in message
    for words in (
        "KaSA",
        "lm_head: a whole trained weight",
        "model.layers.9.mlp.up_proj: the base (llama) has no such",
    ):
        assert words in message
    assert "--adapter" not in message  # a merge cannot carry all of it either
    modules = {problem["code"]: problem["modules"] for problem in error.problems}
    assert len(modules["dora"]) == 14
    assert modules["no-module"] == ["model.layers.9.mlp.up_proj"]
    assert modules["kasa"] == []


@pytest.mark.parametrize(("dora", "merges"), [(True, True), (False, False)])
def test_what_a_merge_can_carry_says_so(tmp_path: Path, llama: Path, dora: bool, merges: bool) -> None:
    adapter = tiny.peft_adapter(tmp_path, llama, dora=dora, config={"kasa_config": None if dora else {}})
    assert (f"--adapter {adapter}" in str(refused(adapter, llama))) is merges


@pytest.mark.parametrize(
    ("extra", "settings", "merges"),
    [
        ({"base_model.model.lm_head.weight": loras.noise("h", (96, 64))}, {}, True),  # of a tied base, too
        ({"layers.1.mlp.up_proj.weight": loras.noise("h", (160, 64))}, {}, True),
        ({"base_model.model.model.norm.weight": loras.noise("n", (64,))}, {}, True),
        ({"base_model.model.score.weight": loras.noise("h", (2, 64))}, {}, False),
        ({f"base_model.model.{Q}.bias": loras.noise("h", (64,))}, {}, False),
        ({}, {"use_dora": True}, False),  # its magnitudes are missing
    ],
)
def test_a_merge_is_offered_for_what_the_base_has(
    tmp_path: Path, llama: Path, extra: Any, settings: Any, merges: bool
) -> None:
    adapter = loras.write(tmp_path, PAIR | extra, loras.PEFT | settings)
    assert ("--adapter" in str(refused(adapter, llama))) is merges


def test_nonsense_in_the_configuration_does_not_hide_the_rest(tmp_path: Path, llama: Path) -> None:
    tensors = without(PAIR, B) | {f"{K}.lora_magnitude_vector": loras.noise("m", (32,))}
    tensors |= loras.factors(UP, 160, 64, r=5)  # no rank to hold it against
    adapter = loras.write(tmp_path, tensors, loras.PEFT | {"r": "8", "lora_alpha": "12", "peft_type": 3})
    found = [(problem["code"], problem["modules"]) for problem in refused(adapter, llama).problems]
    assert found == [("dora", [K]), ("config", []), ("config", []), ("config", []), ("partner", [Q])]


def test_some_of_many_problems_are_shown(tmp_path: Path, llama: Path) -> None:
    with LoraFile.open(loras.write(tmp_path, PAIR), LIMIT) as file, pytest.raises(SourceError, match=r"; and 9 more$"):
        refuse([Problem(str(i), f"problem {i}") for i in range(15)], file, open_base(llama, LIMIT))


def test_experts_of_one_target_clash_with_the_whole(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    together = {
        "model.layers.1.feed_forward.switch_mlp.up_proj.lora_a": loras.noise("a", (6, 8, 64)),
        "model.layers.1.feed_forward.switch_mlp.up_proj.lora_b": loras.noise("b", (6, 160, 8)),
    }
    one = loras.factors("model.layers.1.feed_forward.experts.3.w3", 160, 64)
    assert not problems(loras.write(tmp_path / "together", together), base)
    assert not problems(loras.write(tmp_path / "one", one), base)
    assert "twice" in problems(loras.write(tmp_path / "both", together | one), base)


@pytest.mark.parametrize("key", ["base_model_name_or_path", "model"])
@pytest.mark.parametrize("module", ["model.layers.7.mlp.up_proj", "model.layers.0.mlp.up_proj"])
def test_a_base_that_is_not_the_adapters_is_answered_with_the_one_it_names(
    llama: Path, tmp_path: Path, key: str, module: str
) -> None:
    adapter = loras.write(tmp_path / "adapter", loras.factors(module, 999, 64), loras.PEFT | {key: "Some/Other-3B"})
    for convert in (
        lambda: streamconv.convert_adapter(adapter, llama, tmp_path / "a.gguf"),
        lambda: streamconv.convert(llama, tmp_path / "m.gguf", adapters=[adapter]),
    ):
        with pytest.raises(SourceError) as caught:
            convert()
        assert "adapter_config.json names Some/Other-3B" in caught.value.message.partition(module)[0]
