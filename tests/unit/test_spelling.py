"""Names, shapes and layouts of other programs: what is taken for the recipe's, with a warning or without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import streamconv
from streamconv.errors import SourceError
from tests import families, tiny
from tests.oracles import ggufs
from tests.tiny import variants
from tests.tiny.variants import bare, configured, prefixed, renamed, rewritten, wrapped_layers

BUILDERS = {
    "llama": tiny.llama,
    "lfm2": tiny.lfm2,
    "lfm2moe": tiny.lfm2moe,
    "lfm2moe-stacked": lambda folder: tiny.lfm2moe(folder, stacked=True),
}
MODULES = {"llama": ("q_proj", "down_proj"), "lfm2": ("q_proj", "w2", "in_proj"), "lfm2moe": ("q_proj", "w2", "gate")}


@pytest.fixture(scope="module", params=BUILDERS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ggufs.Gguf]:
    """A checkpoint and its file."""
    folder = tmp_path_factory.mktemp(request.param)
    source = BUILDERS[request.param](folder / "model")
    return source, converted(source, folder / "model.gguf")[0]


@pytest.fixture
def copy(plain: tuple[Path, ggufs.Gguf], tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(plain[0], tmp_path / "model"))


def converted(source: Path, dst: Path) -> tuple[ggufs.Gguf, list[str]]:
    report = streamconv.convert(source, dst, outtype="auto", force=True, verify=True)
    return ggufs.read(dst), [warning.code for warning in report.warnings]


def refused(source: Path, dst: Path) -> SourceError:
    """The error; nothing was written, and inspect says the same."""
    with pytest.raises(SourceError) as caught:
        streamconv.convert(source, dst)
    assert not dst.exists()
    assert "\n" not in str(caught.value)
    return caught.value


def wrapped(*prefixes: str) -> variants.Rename:
    return prefixed("".join(prefixes))


def between(name: str) -> str:
    """A wrapper inside of the names, as torch.compile leaves it on each layer."""
    return name.replace(".layers.", ".layers._orig_mod.", 1) if ".layers." in name else f"module.{name}"


SILENT: dict[str, variants.Rename] = {
    "torch.compile": wrapped("_orig_mod."),
    "DataParallel": wrapped("module."),
    "FSDP": wrapped("_fsdp_wrapped_module."),
    "checkpointing": wrapped("_checkpoint_wrapped_module."),
    "PEFT": wrapped("base_model.model."),
    "stacked": wrapped("module._orig_mod.base_model.model."),
    "twice": wrapped("base_model.model.base_model.model."),
    "inside": wrapped_layers,
    "between": lambda name: between(name).replace("layers._orig_mod.", "layers."),
    "bare": bare,
    "bare and wrapped": lambda name: bare(name) and f"_orig_mod.{bare(name)}",
}
TOLD: dict[str, tuple[variants.Rename, str]] = {
    "doubled": (wrapped("model."), "name-prefix"),
    "unknown": (wrapped("student.net."), "name-prefix"),
    "unknown and bare": (lambda name: bare(name) and f"student.{bare(name)}", "name-prefix"),
    "language model": (wrapped("language_model."), "name-prefix"),
    "mixed": (lambda name: bare(name) if ".layers.0." in name else name, "names-mixed"),
}


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("kind", [*SILENT, *TOLD])
def test_names_of_wrappers(
    plain: tuple[Path, ggufs.Gguf], copy: Path, tmp_path: Path, kind: str, n_shards: int
) -> None:
    rename, code = (SILENT[kind], "") if kind in SILENT else TOLD[kind]
    file, codes = converted(renamed(copy, rename, n_shards=n_shards), tmp_path / "out.gguf")
    assert codes == ([code] if code else [])
    assert file.golden() == plain[1].golden()


def test_the_prefix_is_named(copy: Path, tmp_path: Path) -> None:
    renamed(copy, wrapped("student.net."))
    report = streamconv.convert(copy, tmp_path / "out.gguf")
    assert "'student.net.'" in report.warnings[0].message


def test_a_name_without_its_wrapper_and_other_numbers_is_refused(copy: Path, tmp_path: Path) -> None:
    tensors = tiny.tensors_of(copy)
    name = "model.layers.1.ffn_norm.weight"
    name = name if name in tensors else "model.layers.1.input_layernorm.weight"
    both = {f"_orig_mod.{one}": tensor for one, tensor in tensors.items()} | {name: tensors[name]}
    assert converted(rewritten(copy, both), tmp_path / "same.gguf")[1] == []
    other = tiny.Tensor.of(tensors[name].float32() + 1, tensors[name].dtype)
    assert refused(rewritten(copy, both | {name: other}), tmp_path / "out.gguf").code == "name-collision"
    bare_too = tensors | {bare(name): other}
    assert refused(rewritten(copy, bare_too), tmp_path / "out.gguf").code == "name-collision"


def test_a_tensor_whose_name_ends_as_another_s_is_unknown(copy: Path, tmp_path: Path) -> None:
    tensors = tiny.tensors_of(copy)
    strange = "model.layers.0.extra.embed_tokens.weight"
    error = refused(rewritten(copy, tensors | {strange: tensors["model.embed_tokens.weight"]}), tmp_path / "out.gguf")
    assert error.code == "checkpoint-mismatch"
    assert strange in str(error)


# ---------------------------------------------------------------- heads and embeddings


@pytest.mark.parametrize("architecture", [None, "body"])
def test_a_tied_model_without_a_head(
    plain: tuple[Path, ggufs.Gguf], copy: Path, tmp_path: Path, architecture: str | None
) -> None:
    renamed(copy, bare)
    if architecture:
        arch = plain[1]["general.architecture"]
        bodies = {"llama": "LlamaModel", "lfm2": "Lfm2Model", "lfm2moe": "Lfm2MoeModel"}
        configured(copy, architectures=[bodies[arch]])
    file, codes = converted(copy, tmp_path / "out.gguf")
    assert (codes, file.golden()) == ([], plain[1].golden())


@pytest.mark.parametrize("stated", [False, tiny.ABSENT])
@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForCausalLM"])
def test_an_untied_model_without_its_head_is_incomplete(tmp_path: Path, stated: bool, architecture: str) -> None:
    source = tiny.llama(tmp_path / "model", tied=False, config={"tie_word_embeddings": stated})
    renamed(configured(source, architectures=[architecture]), bare)
    error = refused(source, tmp_path / "out.gguf")
    assert [problem["code"] for problem in error.problems] == ["head-missing"]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "model.embed_tokens.weight": "lm_head.weight"}])
def test_a_tied_model_that_kept_the_head_s_name(
    plain: tuple[Path, ggufs.Gguf], copy: Path, tmp_path: Path, metadata: dict[str, str]
) -> None:
    tensors = tiny.tensors_of(copy)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    file, codes = converted(rewritten(copy, tensors, metadata=metadata), tmp_path / "out.gguf")
    assert (codes, file.golden()) == ([], plain[1].golden())
    assert "output.weight" not in file.tensors


def test_the_other_way_round(plain: tuple[Path, ggufs.Gguf], copy: Path, tmp_path: Path) -> None:
    alias = {"lm_head.weight": "model.embed_tokens.weight"}
    file, codes = converted(rewritten(copy, tiny.tensors_of(copy), metadata=alias), tmp_path / "out.gguf")
    assert (codes, file.golden()) == ([], plain[1].golden())


@pytest.mark.parametrize("builder", [tiny.llama, tiny.lfm2])
def test_an_untied_model_that_lacks_its_embedding(tmp_path: Path, builder: Callable[..., Path]) -> None:
    """Without a word of the file's on the shared numbers it is incomplete; with it, both are there."""
    source = builder(tmp_path / "model", tied=False)
    tensors = tiny.tensors_of(source)
    tensors.pop("model.embed_tokens.weight")
    assert refused(rewritten(source, tensors), tmp_path / "out.gguf").code == "checkpoint-mismatch"
    shared = {"model.embed_tokens.weight": "lm_head.weight"}
    file, _ = converted(rewritten(source, tensors, metadata=shared), tmp_path / "out.gguf")
    assert file.tensors["token_embd.weight"].sha256 == file.tensors["output.weight"].sha256


@pytest.mark.parametrize("name", ["LFM2ForCausalLM", "Lfm2Model"])
def test_other_names_of_the_class(tmp_path: Path, name: str) -> None:
    source = tiny.lfm2(tmp_path / "model")
    plain, _ = converted(source, tmp_path / "plain.gguf")
    file, codes = converted(configured(source, architectures=[name]), tmp_path / "out.gguf")
    assert (codes, file.golden()) == ([], plain.golden())


# ---------------------------------------------------------------- mlx-lm


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("builder", [tiny.lfm2, tiny.lfm2moe])
def test_mlx_checkpoints(tmp_path: Path, builder: Callable[..., Path], outtype: str, n_shards: int) -> None:
    source = builder(tmp_path / "model")
    streamconv.convert(source, tmp_path / "plain.gguf", outtype=outtype)
    variants.as_mlx(source, n_shards=n_shards)
    report = streamconv.convert(source, tmp_path / "out.gguf", outtype=outtype, verify=True)
    assert report.warnings == []
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert streamconv.verify(tmp_path / "plain.gguf", source).verified


def test_mlx_with_a_prefix(tmp_path: Path) -> None:
    source = tiny.lfm2moe(tmp_path / "model")
    plain, _ = converted(source, tmp_path / "plain.gguf")
    renamed(variants.as_mlx(source), wrapped("language_model."))
    file, codes = converted(source, tmp_path / "out.gguf")
    assert (codes, file.golden()) == (["name-prefix"], plain.golden())


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0)])
def test_other_orders_of_a_kernel_are_refused(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """[L, H, 1], [1, L, H], [1, H, L] and [L, 1, H]."""
    source = tiny.lfm2(tmp_path / "model")
    tensors = tiny.tensors_of(source)
    for name in [name for name in tensors if name.endswith("conv.conv.weight")]:
        tensors[name] = tiny.Tensor.of(tensors[name].float32().transpose(order), tensors[name].dtype)
    assert refused(rewritten(source, tensors), tmp_path / "out.gguf").code == "checkpoint-mismatch"


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", [*SILENT, *TOLD])
@pytest.mark.parametrize("arch", MODULES)
def test_adapters_of_wrapped_models(tmp_path: Path, arch: str, kind: str) -> None:
    base = BUILDERS[arch](tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=MODULES[arch], prefix="")
    rename, code = (SILENT[kind], "") if kind in SILENT else TOLD[kind]
    expected = [streamconv.convert(base, tmp_path / "plain.gguf", adapters=[adapter])]
    expected.append(streamconv.convert_adapter(adapter, base, tmp_path / "plain-lora.gguf"))
    renamed(adapter, rename)
    made = [streamconv.convert(base, tmp_path / "out.gguf", adapters=[adapter])]
    made.append(streamconv.convert_adapter(adapter, base, tmp_path / "lora.gguf"))
    for one, other in zip(made, expected, strict=True):
        assert [warning.code for warning in one.warnings] == ([code] if code else [])
        assert ggufs.read(one.output).golden()["tensors"] == ggufs.read(other.output).golden()["tensors"]


def test_an_adapter_with_both_names_and_other_numbers_is_refused(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    tensors = tiny.tensors_of(adapter)
    name = next(iter(tensors))
    file = adapter / "adapter_model.safetensors"
    tiny.write_safetensors(file, tensors | {f"_orig_mod.{name}": tensors[name]})
    streamconv.convert(base, tmp_path / "same.gguf", adapters=[adapter])
    other = tiny.Tensor.of(tensors[name].float32() + 1, "F32")
    tiny.write_safetensors(file, tensors | {f"_orig_mod.{name}": other})
    for call in (
        lambda: streamconv.convert(base, tmp_path / "out.gguf", adapters=[adapter]),
        lambda: streamconv.convert_adapter(adapter, base, tmp_path / "out.gguf"),
    ):
        with pytest.raises(SourceError) as caught:
            call()
        assert [problem["code"] for problem in caught.value.problems] == ["twice"]


def test_an_mlx_adapter_on_dense_layers_under_mlx_s_names(tmp_path: Path) -> None:
    base = tiny.lfm2moe(tmp_path / "base")
    adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("w1", "w2", "q_proj"))
    plain = streamconv.convert(base, tmp_path / "plain.gguf", adapters=[adapter])
    tensors = tiny.tensors_of(adapter)
    names = {"w1": "gate_proj", "w2": "down_proj"}
    renamed_ = {".".join(names.get(part, part) for part in name.split(".")): one for name, one in tensors.items()}
    assert renamed_.keys() != tensors.keys()
    tiny.write_safetensors(adapter / "adapters.safetensors", renamed_)
    variants.as_mlx(base)
    made = streamconv.convert(base, tmp_path / "out.gguf", adapters=[adapter])
    assert made.output.read_bytes() == plain.output.read_bytes()
    lora = streamconv.convert_adapter(adapter, base, tmp_path / "lora.gguf")
    assert "blk.0.ffn_gate.weight.lora_a" in ggufs.read(lora.output).tensors


def test_a_head_of_a_model_without_one_is_no_mixture_of_names(tmp_path: Path) -> None:
    """Gemma has its embedding as head, and no head of its own; some programs store it under that name alone."""
    source = families.checkpoint("gemma", tmp_path / "model")
    file, codes = converted(source, tmp_path / "plain.gguf")
    tensors = dict(tiny.tensors_of(source))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    other, other_codes = converted(variants.rewritten(source, tensors), tmp_path / "out.gguf")
    assert other_codes == codes
    assert other.golden() == file.golden()
