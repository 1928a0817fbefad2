"""The table of families: one entry for each kind of checkpoint that transformers saves and llama.cpp runs.

An entry is tested (tests/golden/test_families.py) as soon as an architecture's file supports its `hf_name`;
tests/tools/families.py makes its references.

The dimensions of an entry are pairwise distinct, so that no axis can be mistaken for another; rows are multiples of 256
if the architecture permits it, so that one checkpoint also tests K-quants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Modules that an adapter changes, by their last names: those of most families. Experts are parameters, not modules.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Vectors:
    """The modules of sentence-transformers after a model, which make vectors of its hidden states.

    Attributes:
        pooling: The mode; None for vectors of all tokens.
        answers: Of a reranker, the tokens whose logits are compared, for and against; the vectors are then its scores.
        dense: Rows and whether there is a bias, of each dense layer.
        by: Who wrote modules.json: PyLate has other names for its classes.
    """

    pooling: str | None
    dense: tuple[tuple[int, bool], ...] = ()
    by: str = "sentence_transformers"
    answers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Family:
    """What is made and asked of one kind of checkpoint.

    Attributes:
        hf_name: The class of transformers, which is the name in `architectures` of config.json.
        config: Keyword arguments of its config class; those that ENDS has need not be repeated.
        tokenizer: A kind of tests/families/tokenizers.py.
        pre: The pre-tokenizer's name that llama.cpp's converter takes for this vocabulary, which it knows by digest.
        seed: Decides the values of the tensors.
        dtype: Of the checkpoint's parameters: bfloat16, float16 or float32.
        norm_mean: The mean of the norms' weights; 0 where the model stores a norm's distance from 1 (Gemma).
        ends_gain: As `gain`, of the embedding and the head.
        gain: What matrices' standard deviation is, times the square root of their rows' length.
        targets: The modules that the adapter changes: last names, or one regular expression of whole names.
        files: Further JSON files of the folder, by name.
        spelled: Beginnings of tensors' names as publishers have them, by that of transformers 5.
        has_projector: Whether it is a vision model: llama.cpp's converter then makes a second file.
        saved_as: A name in `architectures` other than `hf_name`, for models that publishers save under it.
        settings: Keys of config.json that publishers write and transformers 5 does not (see `note`).
        task_type: PEFT's, of the adapter.
        without_llama_cpp: Why llama.cpp's converter is not the reference of the tensors; None where it is.
        wrong_keys: Keys that llama.cpp's converter gets wrong or leaves out, with the reason. Ours are held by the
            distribution alone, and where they decide it, that by 1e-8, not by what llama.cpp's own file reaches.
        note: What a reader of the table must know.
        vectors: Of a retrieval model, what follows it: vectors are then compared in place of distributions, and the
            KL divergences here are cosine distances.
    """

    hf_name: str
    config: Mapping[str, Any]
    tokenizer: str = "bpe"
    pre: str | None = None
    seed: int = 1
    dtype: str = "bfloat16"
    norm_mean: float = 1.0
    gain: float = 0.8
    ends_gain: float = 2.0
    targets: tuple[str, ...] | str = (*ATTENTION, *GATED)
    saved_as: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    has_projector: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    task_type: str = "CAUSAL_LM"
    without_llama_cpp: str | None = None
    wrong_keys: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    vectors: Vectors | None = None


def dense(**settings: Any) -> dict[str, Any]:
    """A decoder of three layers with heads of 64, four to a key-value head."""
    base = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 640,
        "rope_parameters": rope(),
    }
    return without_none(base | settings)


def narrow(**settings: Any) -> dict[str, Any]:
    """As `dense`, for architectures whose heads are a fraction of the hidden size and have no `head_dim`."""
    return dense(**{"head_dim": ABSENT} | settings)


def experts(**settings: Any) -> dict[str, Any]:
    """Two layers, for a model of five experts, of which two are used."""
    return {"num_hidden_layers": 2, "num_experts_per_tok": 2} | settings


def rope(theta: float = 50_000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | settings


def eyes(**settings: Any) -> dict[str, Any]:
    """The vision tower of an LFM2-VL, with some rows of no whole blocks of 32. llama.cpp needs three layers or more."""
    base = {"hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 3}
    return {"model_type": "siglip2_vision_model", "patch_size": 16, "vision_use_head": False} | base | settings


# How Liquid writes the names of its vision tower; llama.cpp's converter knows them so alone.
LIQUID = {"model.vision_tower.": "model.vision_tower.vision_model."}
LFM2_VL_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|out_proj|in_proj|w1|w2|w3)"

ABSENT = object()  # as a value: the key is left to the config class


def without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not ABSENT}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", dense(rope_parameters=rope(500_000.0)), pre="llama-bpe", tokenizer="llama-bpe"),
    "llama3": Family(
        "LlamaForCausalLM",
        dense(
            num_hidden_layers=2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=rope(
                500_000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=160,
            ),
        ),
        tokenizer="llama-bpe",
        pre="llama-bpe",
        seed=50,
    ),
    "internlm3": Family(
        "LlamaForCausalLM",
        dense(attention_bias=True, mlp_bias=True, rope_parameters=rope(rope_type="dynamic", factor=6.0)),
        tokenizer="spm",
        seed=72,
        saved_as="InternLM3ForCausalLM",
        settings={"model_type": "internlm3", "qkv_bias": True, "bias": True},
        note="The publisher's own class; its layers are Llama's.",
    ),
    "iquest-coder": Family(
        "LlamaForCausalLM",
        dense(num_hidden_layers=2),
        tokenizer="llama-bpe",
        pre="llama-bpe",
        seed=73,
        saved_as="IQuestCoderForCausalLM",
        settings={"model_type": "iquestcoder", "clip_qkv": None, "use_sliding_window": False},
        note="The publisher's own class; its layers are Llama's.",
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        narrow(
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
            layer_types=["conv", "full_attention", "conv"],
            tie_word_embeddings=True,
        ),
        tokenizer="lfm2",
        pre="lfm2",
        seed=51,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
    ),
    "lfm2moe": Family(
        "Lfm2MoeForCausalLM",
        narrow(
            num_experts_per_tok=2,
            num_experts=5,
            moe_intermediate_size=512,
            num_dense_layers=1,
            conv_L_cache=3,
            layer_types=["conv", "full_attention", "conv"],
            norm_topk_prob=True,
            use_expert_bias=True,
        ),
        tokenizer="lfm2",
        pre="lfm2",
        seed=52,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj"),
    ),
    "lfm2-colbert": Family(
        "Lfm2Model",
        narrow(block_auto_adjust_ff_dim=False, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]),
        tokenizer="lfm2",
        pre="lfm2",
        seed=160,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors(None, ((96, False),), by="pylate"),
        note="LFM2-ColBERT, causal: vectors of all tokens.",
    ),
    "lfm2.5-colbert": Family(
        "Lfm2BidirectionalModel",
        narrow(block_auto_adjust_ff_dim=False, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]),
        tokenizer="lfm2",
        pre="lfm2",
        seed=161,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors(None, ((96, False),), by="pylate"),
        note="LFM2.5-ColBERT: each token sees both sides.",
    ),
    "lfm2.5-embedding": Family(
        "Lfm2BidirectionalModel",
        narrow(block_auto_adjust_ff_dim=False, conv_L_cache=5, layer_types=["conv", "full_attention", "conv"]),
        tokenizer="lfm2",
        pre="lfm2",
        seed=162,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("cls"),
        note="LFM2.5-Embedding: the vector of the first token.",
    ),
    "lfm2-dense": Family(
        "Lfm2Model",
        narrow(block_auto_adjust_ff_dim=False, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]),
        tokenizer="lfm2",
        pre="lfm2",
        seed=163,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("mean", ((96, True),)),
        without_llama_cpp="ignores the bias of a dense layer, and every dense layer that is not in `1_Dense`",
    ),
    "lfm2-vl": Family(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": narrow(
                architectures=["Lfm2ForCausalLM"],
                model_type="lfm2",
                vocab_size=416,
                block_auto_adjust_ff_dim=False,
                layer_types=["conv", "full_attention", "conv"],
            ),
            "vision_config": eyes(num_patches=256),
            "projector_hidden_size": 192,
            "image_token_id": 340,
        },
        files={"preprocessor_config.json": {"image_mean": [0.4, 0.45, 0.5], "image_std": [0.25, 0.5, 0.3]}},
        spelled=LIQUID,
        has_projector=True,
        tokenizer="lfm2-vl",
        pre="lfm2",
        seed=170,
        targets=LFM2_VL_TARGETS,
        note="As published: with `vision_model.` in the names, and without a word on the projector's norm.",
    ),
    "lfm2_5-vl": Family(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": narrow(
                architectures=["Lfm2ForCausalLM"],
                model_type="lfm2",
                vocab_size=416,
                block_auto_adjust_ff_dim=False,
                layer_types=["conv", "full_attention", "conv"],
            ),
            "vision_config": eyes(num_patches=81, num_hidden_layers=4),
            "projector_hidden_size": 160,
            "projector_use_layernorm": False,
            "image_token_id": 340,
        },
        files={
            "preprocessor_config.json": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.4, 0.6]},
            "processor_config.json": {"image_mean": [0.9] * 3, "image_processor": {"image_mean": [0.5, 0.55, 0.6]}},
        },
        spelled=LIQUID,
        has_projector=True,
        tokenizer="lfm2-vl",
        pre="lfm2",
        seed=171,
        dtype="float16",
        targets=LFM2_VL_TARGETS,
        wrong_keys={"clip.vision.image_size": "256, whatever the number of positions"},
        note="Without the projector's norm, and with positions that the runtime resizes.",
    ),
    "lfm2-vl-moe": Family(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": narrow(
                architectures=["Lfm2MoeForCausalLM"],
                model_type="lfm2_moe",
                vocab_size=416,
                num_experts_per_tok=2,
                num_experts=5,
                moe_intermediate_size=512,
                num_dense_layers=1,
                layer_types=["conv", "full_attention", "conv"],
                norm_topk_prob=True,
                use_expert_bias=True,
            ),
            "vision_config": eyes(num_patches=256),
            "projector_hidden_size": 224,
            "image_token_id": 340,
        },
        files={"processor_config.json": {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}},
        spelled=LIQUID,
        has_projector=True,
        tokenizer="lfm2-vl",
        pre="lfm2",
        seed=172,
        targets=r".*language_model.*\.(q_proj|k_proj|v_proj|out_proj|in_proj)",
    ),
    "qwen2": Family("Qwen2ForCausalLM", narrow(), tokenizer="qwen2", pre="qwen2", seed=2),
    "qwen2-tied": Family(
        "Qwen2ForCausalLM",
        narrow(
            tie_word_embeddings=True,
            rope_parameters=rope(1_000_000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=160),
        ),
        tokenizer="qwen2",
        pre="qwen2",
        seed=3,
        dtype="float16",
    ),
    "qwen2moe": Family(
        "Qwen2MoeForCausalLM",
        narrow(
            **experts(
                num_experts=5, moe_intermediate_size=512, shared_expert_intermediate_size=1024, decoder_sparse_step=1
            )
        ),
        tokenizer="qwen2",
        pre="qwen2",
        seed=4,
        targets=ATTENTION,
    ),
    "qwen3": Family("Qwen3ForCausalLM", dense(), tokenizer="qwen2", pre="qwen2", seed=5),
    "qwen3-tied": Family("Qwen3ForCausalLM", dense(tie_word_embeddings=True), tokenizer="qwen2", pre="qwen2", seed=6),
    "qwen3-embedding": Family(
        "Qwen3Model",
        dense(tie_word_embeddings=False),
        saved_as="Qwen3ForCausalLM",
        tokenizer="qwen2-eos",
        pre="qwen2",
        seed=164,
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("lasttoken"),
        note="As the larger ones are published: untied, and without a head; an end token is put after each text.",
    ),
    "qwen3-reranker": Family(
        "Qwen3ForCausalLM",
        dense(),
        tokenizer="qwen3-reranker",
        pre="qwen2",
        seed=165,
        vectors=Vectors(None, answers=(404, 405)),
    ),
    "qwen3-reranker-tied": Family(
        "Qwen3ForCausalLM",
        dense(tie_word_embeddings=True),
        tokenizer="qwen3-reranker",
        pre="qwen2",
        seed=166,
        vectors=Vectors(None, answers=(404, 405)),
    ),
    "qwen2-embedding": Family(
        "Qwen2Model",
        narrow(),
        tokenizer="qwen2-eos",
        pre="qwen2",
        seed=167,
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("lasttoken"),
    ),
    "qwen2-bidirectional": Family(
        "Qwen2Model",
        narrow(is_causal=False),
        saved_as="Qwen2ForCausalLM",
        tokenizer="qwen2-eos",
        pre="qwen2",
        seed=168,
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("mean"),
        note="As gte-Qwen2, whose attention has no mask.",
    ),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        dense(**experts(num_experts=5, moe_intermediate_size=1024, norm_topk_prob=True, decoder_sparse_step=1)),
        tokenizer="qwen2",
        pre="qwen2",
        seed=7,
        targets=ATTENTION,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        narrow(num_hidden_layers=5, tie_word_embeddings=True),
        tokenizer="llama-bpe",
        pre="llama-bpe",
        seed=8,
        note="Five layers, so that one of them is without RoPE and one behind it has it.",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        narrow(
            embedding_multiplier=6.0,
            logits_scaling=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.11,
            tie_word_embeddings=True,
        ),
        tokenizer="smollm",
        pre="refact",
        seed=9,
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        narrow(
            **experts(num_local_experts=5),
            embedding_multiplier=6.0,
            logits_scaling=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.11,
        ),
        tokenizer="smollm",
        pre="refact",
        seed=10,
        targets=ATTENTION,
    ),
    "olmo2": Family("Olmo2ForCausalLM", narrow(), tokenizer="dbrx", pre="dbrx", seed=11),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        narrow(
            num_hidden_layers=4,
            sliding_window=6,
            rope_parameters=ABSENT,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        tokenizer="dbrx",
        pre="dbrx",
        seed=12,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        narrow(**experts(num_experts=5, num_key_value_heads=8)),
        tokenizer="gpt-2",
        pre="olmo",
        seed=13,
        targets=ATTENTION,
    ),
    "seed-oss": Family(
        "SeedOssForCausalLM",
        dense(attention_bias=True, attention_out_bias=False),
        tokenizer="seed-coder",
        pre="seed-coder",
        seed=14,
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        narrow(use_bias=True, sliding_window=None),
        tokenizer="smollm",
        pre="starcoder",
        seed=15,
        targets=(*ATTENTION, "c_fc", "c_proj"),
        dtype="float16",
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        narrow(use_qkv_bias=True, rope_parameters=rope(partial_rotary_factor=0.25)),
        tokenizer="qwen2",
        pre="stablelm2",
        seed=16,
        dtype="float16",
        wrong_keys={"stablelm.rope.freq_base": "not written, so the runtime uses 10000"},
    ),
    "stablelm-epoch": Family(
        "StableLmForCausalLM",
        narrow(num_hidden_layers=2, rope_parameters=rope(10_000.0, partial_rotary_factor=0.5)),
        tokenizer="qwen2",
        pre="stablelm2",
        seed=74,
        saved_as="StableLMEpochForCausalLM",
        settings={"model_type": "stablelm_epoch", "norm_eps": 1e-5, "rope_pct": 0.5},
        wrong_keys={"stablelm.rope.freq_base": "not written, so the runtime uses 10000"},
        note="The name of the first of them.",
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        narrow(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 3),
        tokenizer="gpt-2",
        pre="exaone4",
        seed=17,
    ),
    "hunyuan-dense": Family(
        "HunYuanDenseV1ForCausalLM", dense(), tokenizer="deepseek-v3", pre="hunyuan-dense", seed=18
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        narrow(
            num_hidden_layers=4,
            sliding_window=6,
            logit_scale=0.25,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        tokenizer="smollm",
        pre="command-r",
        seed=19,
        settings={"rotary_pct": 1.0},
        note="Published configs have `rotary_pct`, which transformers 5 drops and llama.cpp's converter demands.",
    ),
    "cohere2-saved": Family(
        "Cohere2ForCausalLM",
        narrow(
            num_hidden_layers=4,
            sliding_window=6,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        tokenizer="smollm",
        seed=53,
        without_llama_cpp="it fails if the config has no `rotary_pct`",
        note="As transformers 5 saves it.",
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        dense(attention_bias=True, rope_parameters=rope(partial_rotary_factor=0.5)),
        tokenizer="glm4",
        pre="glm4",
        seed=20,
        targets=(*ATTENTION, "gate_up_proj", "down_proj"),
    ),
    "glm4moe": Family(
        "Glm4MoeForCausalLM",
        dense(
            num_experts_per_tok=2,
            n_routed_experts=5,
            moe_intermediate_size=1024,
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            attention_bias=True,
            use_qk_norm=True,
            num_nextn_predict_layers=0,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
        tokenizer="glm4",
        pre="glm4",
        seed=21,
        targets=ATTENTION,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        dense(
            **experts(num_local_experts=5),
            sliding_window=6,
            rope_parameters=rope(
                65_536.0,
                rope_type="yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=201,
            ),
            max_position_embeddings=804,
        ),
        tokenizer="gpt-4o",
        pre="gpt-4o",
        seed=22,
        targets=ATTENTION,
        note="Experts in BF16, as fine-tunes have them; the published MXFP4 is a quantised source. The runtime rounds "
        "the range of YaRN, which these models do not; base and context are such that there is nothing to round.",
    ),
    "minimax-m2": Family(
        "MiniMaxM2ForCausalLM",
        dense(**experts(num_local_experts=5), rope_parameters=rope(partial_rotary_factor=0.5)),
        tokenizer="gpt-4o",
        pre="minimax-m2",
        seed=23,
        targets=ATTENTION,
        settings={"rotary_dim": 32, "scoring_func": "sigmoid"},
        note="Published configs have both `settings`, which transformers 5 drops.",
    ),
    "minimax-m2-saved": Family(
        "MiniMaxM2ForCausalLM",
        dense(**experts(num_local_experts=5), rope_parameters=rope(partial_rotary_factor=0.5)),
        tokenizer="gpt-4o",
        pre="minimax-m2",
        seed=28,
        targets=ATTENTION,
        without_llama_cpp="it fails if the config has no `rotary_dim`",
        note="As transformers 5 saves it.",
    ),
    "granitemoe-shared": Family(
        "GraniteMoeSharedForCausalLM",
        narrow(
            **experts(num_local_experts=5),
            shared_intermediate_size=1024,
            embedding_multiplier=6.0,
            logits_scaling=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.11,
        ),
        tokenizer="smollm",
        pre="refact",
        seed=60,
        targets=ATTENTION,
    ),
    "olmo3-yarn": Family(
        "Olmo3ForCausalLM",
        narrow(
            num_hidden_layers=4,
            sliding_window=6,
            rope_parameters={
                "sliding_attention": rope(),
                "full_attention": rope(
                    rope_type="yarn",
                    factor=4.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    original_max_position_embeddings=160,
                ),
            },
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        tokenizer="dbrx",
        pre="dbrx",
        seed=61,
        note="RoPE said by kind of layer, scaled in those without a window; another pattern of windows.",
    ),
    "exaone4-llama3": Family(
        "Exaone4ForCausalLM",
        narrow(
            tie_word_embeddings=True,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=["full_attention"] * 3,
            rope_parameters=rope(
                rope_type="llama3",
                factor=16.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=160,
            ),
        ),
        tokenizer="gpt-2",
        pre="exaone4",
        seed=62,
    ),
    "exaone4-window": Family(
        "Exaone4ForCausalLM",
        narrow(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=64,
            num_attention_heads=4,
            sliding_window=6,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 16,
        ),
        tokenizer="gpt-2",
        pre="exaone4",
        seed=63,
        targets=ATTENTION,
        note="64 layers, since the runtime has windows in models of so many alone.",
    ),
    "hunyuan-dense-alpha": Family(
        "HunYuanDenseV1ForCausalLM",
        dense(
            tie_word_embeddings=True,
            max_position_embeddings=32_768,
            rope_parameters=rope(10_000.0, rope_type="dynamic", alpha=1000.0, factor=1.0),
        ),
        tokenizer="deepseek-v3",
        pre="hunyuan-dense",
        seed=64,
    ),
    "cohere2-pattern": Family(
        "Cohere2ForCausalLM",
        narrow(
            num_hidden_layers=4,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        tokenizer="smollm",
        pre="command-r",
        seed=65,
        settings={"rotary_pct": 1.0},
        wrong_keys={
            "cohere2.attention.sliding_window_pattern": "not written, so the runtime uses the window in all layers "
            "but every fourth"
        },
    ),
    "gpt-oss-pattern": Family(
        "GptOssForCausalLM",
        dense(
            **experts(num_local_experts=5),
            sliding_window=6,
            rope_parameters=rope(150_000.0),
            layer_types=["full_attention", "sliding_attention"],
        ),
        tokenizer="gpt-4o",
        pre="gpt-4o",
        seed=66,
        targets=ATTENTION,
        wrong_keys={
            "gpt-oss.attention.sliding_window_pattern": "not written, so the runtime uses the window in layers "
            "0, 2, 4, ..."
        },
    ),
    "glm4moe-groups": Family(
        "Glm4MoeForCausalLM",
        dense(
            num_hidden_layers=2,
            num_experts_per_tok=2,
            n_routed_experts=6,
            n_group=3,
            topk_group=2,
            moe_intermediate_size=1024,
            n_shared_experts=2,
            first_k_dense_replace=1,
            norm_topk_prob=False,
            use_qk_norm=False,
            tie_word_embeddings=True,
            num_nextn_predict_layers=0,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
        tokenizer="glm4",
        pre="glm4",
        seed=67,
        targets=ATTENTION,
    ),
    "mistral": Family("MistralForCausalLM", dense(sliding_window=None), tokenizer="spm", seed=24),
    "mistral-tekken": Family(
        "MistralForCausalLM", dense(sliding_window=None), tokenizer="tekken", pre="tekken", seed=25
    ),
    "mixtral": Family(
        "MixtralForCausalLM", narrow(**experts(num_local_experts=5)), tokenizer="spm", seed=26, targets=ATTENTION
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        dense(
            rope_parameters=rope(
                1_000_000.0,
                rope_type="yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                original_max_position_embeddings=16,
                llama_4_scaling_beta=0.1,
            )
        ),
        tokenizer="tekken",
        pre="tekken",
        seed=27,
        note="An original context of 16 positions, so that the temperature of later ones shows.",
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": dense(
                model_type="ministral3",
                vocab_size=416,
                rope_parameters=rope(
                    1_000_000.0,
                    rope_type="yarn",
                    factor=4.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                    original_max_position_embeddings=16,
                    llama_4_scaling_beta=0.1,
                ),
            ),
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "image_size": 56,
                "patch_size": 14,
            },
            "image_token_index": 340,
        },
        tokenizer="tekken",
        pre="tekken",
        seed=29,
        targets=r".*language_model.*\.([qkvo]_proj|(gate|up|down)_proj)",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        dense(rope_parameters=rope(10_000.0)),
        tokenizer="gemma",
        seed=30,
        norm_mean=0.0,
        ends_gain=0.5,
        wrong_keys={"tokenizer.ggml.eot_token_id": "107, whichever token that is"},
    ),
    "gemma-base": Family(
        "GemmaForCausalLM",
        dense(num_hidden_layers=2),
        tokenizer="gemma",
        seed=70,
        norm_mean=0.0,
        ends_gain=0.2,
        wrong_keys={
            "gemma.rope.freq_base": "not written, so the runtime uses 10000",
            "tokenizer.ggml.eot_token_id": "107, whichever token that is",
        },
        note="Another base of RoPE than the one of published models.",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        dense(num_hidden_layers=4, sliding_window=6, query_pre_attn_scalar=64, rope_parameters=rope(10_000.0)),
        tokenizer="gemma",
        seed=31,
        norm_mean=0.0,
        ends_gain=0.5,
    ),
    "gemma2-base": Family(
        "Gemma2ForCausalLM",
        dense(num_hidden_layers=2, sliding_window=6, query_pre_attn_scalar=64),
        tokenizer="gemma",
        seed=71,
        norm_mean=0.0,
        ends_gain=0.2,
        wrong_keys={"gemma2.rope.freq_base": "not written, so the runtime uses 10000"},
        note="Another base of RoPE than the one of published models.",
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        dense(
            num_hidden_layers=7,
            intermediate_size=1024,
            sliding_window=6,
            query_pre_attn_scalar=64,
            rope_parameters=ABSENT,
        ),
        tokenizer="gemma",
        seed=32,
        norm_mean=0.0,
        ends_gain=0.5,
        note="Seven layers: the sixth attends to everything, the seventh is behind it.",
    ),
    "gemma3-it": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": dense(
                num_hidden_layers=7,
                intermediate_size=1024,
                sliding_window=6,
                query_pre_attn_scalar=64,
                vocab_size=352,
                rope_parameters=ABSENT,
            ),
            "vision_config": {
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "image_size": 56,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 340,
        },
        tokenizer="gemma",
        seed=33,
        norm_mean=0.0,
        ends_gain=0.5,
        targets=r".*language_model.*\.([qkvo]_proj|(gate|up|down)_proj)",
    ),
    "gemma-embedding": Family(
        "Gemma3TextModel",
        dense(
            num_hidden_layers=7,
            intermediate_size=1024,
            sliding_window=6,
            query_pre_attn_scalar=64,
            rope_parameters=ABSENT,
            use_bidirectional_attention=True,
        ),
        tokenizer="gemma",
        seed=169,
        norm_mean=0.0,
        ends_gain=0.5,
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("mean", ((384, False), (256, False))),
    ),
    "gemma-embedding-plain": Family(
        "Gemma3TextModel",
        dense(
            num_hidden_layers=7,
            intermediate_size=1024,
            sliding_window=10,
            query_pre_attn_scalar=64,
            rope_parameters=ABSENT,
            use_bidirectional_attention=True,
        ),
        tokenizer="gemma",
        seed=180,
        norm_mean=0.0,
        ends_gain=0.5,
        task_type="FEATURE_EXTRACTION",
        vectors=Vectors("mean"),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        narrow(sliding_window=None),
        tokenizer="phi3",
        seed=35,
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "phi3-long": Family(
        "Phi3ForCausalLM",
        narrow(
            sliding_window=300,
            original_max_position_embeddings=16,
            rope_parameters=rope(
                rope_type="longrope",
                short_factor=[1.0 + 0.05 * i for i in range(16)],
                long_factor=[1.5 + 0.5 * i for i in range(16)],
                original_max_position_embeddings=16,
            ),
        ),
        tokenizer="phi3",
        seed=36,
        note="An original context of 16 positions, so that the long factors are in use.",
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "phi4-mini": Family(
        "Phi3ForCausalLM",
        narrow(
            sliding_window=300,
            tie_word_embeddings=True,
            original_max_position_embeddings=320,
            rope_parameters=rope(
                rope_type="longrope",
                short_factor=[1.0 + 0.05 * i for i in range(12)],
                long_factor=[1.5 + 0.5 * i for i in range(12)],
                original_max_position_embeddings=320,
                partial_rotary_factor=0.75,
            ),
        ),
        tokenizer="phi4",
        note="An original context beyond that of the tests, so that the short factors are in use.",
        pre="gpt-4o",
        seed=37,
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "ernie4_5": Family("Ernie4_5ForCausalLM", dense(tie_word_embeddings=True), tokenizer="spm", seed=40),
    "ernie4_5-saved": Family(
        "Ernie4_5ForCausalLM",
        dense(tie_word_embeddings=True),
        saved_as="Ernie4_5_ForCausalLM",
        tokenizer="spm",
        seed=41,
        note="The publisher's spelling of the name.",
    ),
    "ernie4_5-moe": Family(
        "Ernie4_5_MoeForCausalLM",
        narrow(
            moe_k=2,
            moe_num_experts=5,
            moe_num_shared_experts=2,
            intermediate_size=2048,
            moe_intermediate_size=512,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            moe_layer_interval=1,
        ),
        tokenizer="spm",
        seed=42,
        targets=ATTENTION,
    ),
    "ernie4_5-moe-wide": Family(
        "Ernie4_5_MoeForCausalLM",
        narrow(
            moe_k=2,
            moe_num_experts=5,
            moe_num_shared_experts=2,
            moe_intermediate_size=512,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            moe_layer_interval=1,
        ),
        tokenizer="spm",
        seed=44,
        wrong_keys={"ernie4_5-moe.expert_shared_feed_forward_length": "intermediate_size / num_key_value_heads"},
        targets=ATTENTION,
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        dense(head_dim=32, rope_parameters=rope(partial_rotary_factor=0.5)),
        tokenizer="spm",
        seed=43,
        targets=(*ATTENTION, "up_proj", "down_proj"),
        norm_mean=0.0,
        dtype="float32",
        wrong_keys={"tokenizer.ggml.unknown_token_id": "1, not the id in the tokenizer"},
    ),
}


def exceptions() -> list[str]:
    """Where llama.cpp's converter is not the reference, as lines of docs/families.md."""
    lines = []
    for name, family in FAMILIES.items():
        hf_name = family.saved_as or family.hf_name
        if family.without_llama_cpp:
            lines.append(f"- {hf_name} ({name}): {family.without_llama_cpp}")
        lines += [f"- {hf_name} ({name}): `{key}` is {reason}" for key, reason in family.wrong_keys.items()]
    return lines
