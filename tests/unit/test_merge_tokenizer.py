"""Which tokenizer a merged model gets where an adapter brings one: its end token and template, or the base's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.cli import main
from streamconv.errors import UsageError
from streamconv.output.modelfile import CHATML
from tests import tiny
from tests.oracles import ggufs
from tests.unit.test_modelfile import JINJA_CHATML
from tests.vocab_cases import edit

EOS, TEMPLATE = "tokenizer.ggml.eos_token_id", "tokenizer.chat_template"
TRAINED = "{% for m in messages %}[{{m['role']}}] {{m['content']}}<|endoftext|>{% endfor %}\n  of the fine-tune \u00fc"
END = "<|endoftext|>"  # token 4; the bases stop at <|im_end|>, token 2

BASES = {
    "llama": (tiny.llama, ("q_proj", "down_proj")),
    "lfm2": (tiny.lfm2, ("q_proj", "in_proj")),
    "lfm2moe": (tiny.lfm2moe, ("q_proj", "out_proj")),
}


@pytest.fixture(scope="module", params=BASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter on it that has no tokenizer."""
    build, targets = BASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = build(folder / "base")
    maker = tiny.mlx_adapter if request.param == "lfm2" else tiny.peft_adapter
    return base, maker(folder / "adapter", base, targets=targets)


@pytest.fixture
def base(pair: tuple[Path, Path]) -> Path:
    return pair[0]


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    return Path(shutil.copytree(pair[1], tmp_path / "adapter"))


def merged(base: Path, dst: Path, *adapters: Path, **options: Any) -> tuple[ggufs.Gguf, dict[str, str]]:
    """The file, and the messages of the warnings about tokenizers by their code."""
    report = streamconv.convert(base, dst, outtype="f32", adapters=adapters, **options)
    found = {w.code: w.message for w in report.warnings if w.code.startswith(("tokenizer", "special", "chat"))}
    return ggufs.read(dst), found


def copy(base: Path, adapter: Path, *names: str) -> None:
    for name in names:
        shutil.copy(base / name, adapter)


def whole_tokenizer(base: Path, adapter: Path) -> None:
    copy(base, adapter, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    edit(adapter / "tokenizer_config.json", lambda value: value.update(eos_token=END, chat_template=TRAINED))
    edit(adapter / "special_tokens_map.json", lambda value: value.update(eos_token={"content": END}))


def template_in_a_file(base: Path, adapter: Path) -> None:
    whole_tokenizer(base, adapter)
    edit(adapter / "tokenizer_config.json", lambda value: value.pop("chat_template"))
    (adapter / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")


def config_alone(base: Path, adapter: Path) -> None:
    tiny.write_json(adapter / "tokenizer_config.json", {"eos_token": {"content": END}, "chat_template": TRAINED})


def generation_config(base: Path, adapter: Path) -> None:
    """The end token by its id, the other files as the base has them."""
    copy(base, adapter, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    tiny.write_json(adapter / "generation_config.json", {"eos_token_id": [4, 2], "temperature": 0.5})
    (adapter / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")


def generation_config_alone(base: Path, adapter: Path) -> None:
    tiny.write_json(adapter / "generation_config.json", {"eos_token_id": 4})
    tiny.write_json(adapter / "chat_template.json", {"chat_template": TRAINED})


def special_tokens_map(base: Path, adapter: Path) -> None:
    tiny.write_json(adapter / "special_tokens_map.json", {"eos_token": END})
    (adapter / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")


Bring = Callable[[Path, Path], None]
BRINGS: list[Bring] = [
    whole_tokenizer,
    template_in_a_file,
    config_alone,
    generation_config,
    generation_config_alone,
    special_tokens_map,
]


@pytest.mark.parametrize("bring", BRINGS)
def test_the_trained_end_token_and_template_are_written(
    base: Path, adapter: Path, tmp_path: Path, bring: Bring
) -> None:
    plain, nothing = merged(base, tmp_path / "plain.gguf", adapter)
    bring(base, adapter)
    file, warnings = merged(base, tmp_path / "out.gguf", adapter, verify=True)
    assert (plain[EOS], file[EOS]) == (2, 4)
    assert file[TEMPLATE] == TRAINED
    assert file.golden()["tensors"] == plain.golden()["tensors"]
    assert list(warnings) == ["tokenizer-of-adapter"]
    assert "eos_token_id 4 instead of 2" in warnings["tokenizer-of-adapter"]
    assert nothing == {}
    assert streamconv.verify(tmp_path / "out.gguf", base, adapters=[adapter]).verified


def test_a_template_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file[EOS], file[TEMPLATE]) == (2, TRAINED)
    assert list(warnings) == ["tokenizer-of-adapter"]


def test_an_end_token_alone_keeps_the_template_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    tiny.write_json(adapter / "tokenizer_config.json", {"eos_token": END})
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file[EOS], file[TEMPLATE]) == (4, tiny.tokenizer.CHAT_TEMPLATE)
    assert list(warnings) == ["tokenizer-of-adapter"]


def test_the_same_tokenizer_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    plain, _ = merged(base, tmp_path / "plain.gguf", adapter)
    copy(base, adapter, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    edit(adapter / "tokenizer_config.json", lambda value: value.update(padding_side="left"))
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file.keys, warnings) == (plain.keys, {})


def test_a_pad_token_added_to_the_trained_tokenizer_is_no_other_vocabulary(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Beyond the rows it is left out; among the padding it would be another token."""
    whole_tokenizer(base, adapter)
    token = {"id": 416, "content": "[PAD]", "special": True}
    edit(adapter / "tokenizer_config.json", lambda value: value.update(added_tokens_decoder={"416": token}))
    file, _ = merged(base, tmp_path / "out.gguf", adapter)
    assert file[EOS] == 4


def test_other_tokens_without_rows_are_left_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole_tokenizer(base, adapter)

    def swap(value: Any) -> None:
        vocab = value["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit(adapter / "tokenizer.json", swap)
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file[EOS], file[TEMPLATE]) == (2, tiny.tokenizer.CHAT_TEMPLATE)
    assert list(warnings) == ["tokenizer-left-out"]
    forced, _ = merged(base, tmp_path / "forced.gguf", adapter, tokenizer="adapter")
    assert (forced[EOS], forced[TEMPLATE]) == (4, TRAINED)
    assert forced["tokenizer.ggml.tokens"] != file["tokenizer.ggml.tokens"]


def test_a_tokenizer_that_cannot_be_read_is_left_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer.json").write_text("{", encoding="utf-8")
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert file[EOS] == 2
    assert list(warnings) == ["tokenizer-left-out"]


def test_an_end_token_that_the_base_does_not_have_is_never_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    tiny.write_json(adapter / "tokenizer_config.json", {"eos_token": "<|nowhere|>", "chat_template": TRAINED})
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file[EOS], file[TEMPLATE]) == (2, TRAINED)
    assert {"special-token-unknown", "tokenizer-of-adapter"} == set(warnings)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "special-token-unknown"),
        ("special_tokens_map.json", {"eos_token": {"content": "<|nowhere|>"}}, "special-token-unknown"),
        ("generation_config.json", {"eos_token_id": 99_999}, "special-token-range"),
    ],
)
def test_an_end_token_in_vain_is_a_warning_where_nothing_else_differs(
    base: Path, adapter: Path, tmp_path: Path, name: str, content: dict[str, Any], code: str
) -> None:
    tiny.write_json(adapter / name, content)
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (file[EOS], list(warnings)) == (2, [code])


def test_the_user_decides(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole_tokenizer(base, adapter)
    plain, warnings = merged(base, tmp_path / "base.gguf", adapter, tokenizer="base")
    assert (plain[EOS], plain[TEMPLATE]) == (2, tiny.tokenizer.CHAT_TEMPLATE)
    assert list(warnings) == ["tokenizer-left-out"]
    arguments = ["verify", str(tmp_path / "base.gguf"), "--source", str(base), "--adapter", str(adapter), "--quiet"]
    assert main([*arguments, "--tokenizer", "base"]) == 0
    assert main(arguments) == 6


def test_the_adapters_tokenizer_where_there_is_none(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        merged(base, tmp_path / "out.gguf", adapter, tokenizer="adapter")
    assert caught.value.code == "tokenizer-missing"
    with pytest.raises(UsageError):
        merged(base, tmp_path / "out.gguf", adapter, tokenizer="other")


def test_of_two_adapters_the_first_that_brings_one_counts(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    third = Path(shutil.copytree(adapter, tmp_path / "third"))
    tiny.write_json(second / "tokenizer_config.json", {"eos_token": END})
    tiny.write_json(third / "tokenizer_config.json", {"eos_token": "<|im_start|>"})
    file, warnings = merged(base, tmp_path / "out.gguf", adapter, second, third)
    assert file[EOS] == 4
    assert str(second) in warnings["tokenizer-of-adapter"]
    assert str(third) in warnings["tokenizer-left-out"]


@pytest.mark.parametrize("kind", ["spm", "spm-model", "spm-json"])
def test_sentencepiece(tmp_path: Path, kind: str) -> None:
    """The base's scores and types stay, also where the adapter has a tokenizer.json alone."""
    base = tiny.llama(tmp_path / "base", tokenizer=kind)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    plain, _ = merged(base, tmp_path / "plain.gguf", adapter)
    tiny.write_spm(adapter, model=False)
    edit(adapter / "tokenizer_config.json", lambda value: value.update(eos_token="<s>", chat_template=TRAINED))
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert (plain[EOS], file[EOS], file[TEMPLATE]) == (2, 1, TRAINED)
    assert list(warnings) == ["tokenizer-of-adapter"]
    for key in ("tokens", "scores"):
        assert file[f"tokenizer.ggml.{key}"] == plain[f"tokenizer.ggml.{key}"]


def test_a_base_without_a_tokenizer_gets_the_adapters(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=("q_proj",))
    plain, _ = merged(base, tmp_path / "plain.gguf", adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).rename(adapter / name)
    file, _ = merged(base, tmp_path / "out.gguf", adapter)
    assert file["tokenizer.ggml.tokens"] == plain["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",)])
def test_an_adapter_with_rows_of_its_own_has_the_tokenizer(tmp_path: Path, targets: tuple[str, ...]) -> None:
    base = tiny.llama(tmp_path / "base", tied=False)
    adapter = tiny.peft_adapter(tmp_path / "adapter", base, targets=targets)
    tiny.write_bpe(adapter, pre="llama-bpe")
    (adapter / "tokenizer_config.json").unlink()
    (adapter / "chat_template.jinja").write_text(TRAINED, encoding="utf-8")
    file, warnings = merged(base, tmp_path / "merged.gguf", adapter)
    assert file[TEMPLATE] == TRAINED
    assert list(warnings) == ["tokenizer-of-adapter"]
    assert "chat_template" in warnings["tokenizer-of-adapter"]
    kept, _ = merged(base, tmp_path / "kept.gguf", adapter, tokenizer="base")
    assert kept[TEMPLATE] == tiny.tokenizer.CHAT_TEMPLATE


def test_rows_of_the_same_tokens_keep_what_their_tokenizer_does_not_say(tmp_path: Path) -> None:
    base = tiny.lfm2(tmp_path / "base")
    adapter = tiny.mlx_adapter(tmp_path / "adapter", base, targets=("embed_tokens",))
    plain, _ = merged(base, tmp_path / "plain.gguf", adapter)
    copy(base, adapter, "tokenizer.json")
    tiny.write_json(adapter / "tokenizer_config.json", {"eos_token": END})
    file, warnings = merged(base, tmp_path / "out.gguf", adapter)
    assert list(warnings) == ["tokenizer-of-adapter"]
    assert {key for key in plain.keys | file.keys if plain.keys.get(key) != file.keys.get(key)} == {EOS}
    assert (file[EOS], file[TEMPLATE]) == (4, tiny.tokenizer.CHAT_TEMPLATE)


def test_the_modelfile_follows_the_merged_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    tiny.write_json(adapter / "tokenizer_config.json", {"chat_template": JINJA_CHATML})
    merged(base, tmp_path / "out.gguf", adapter, modelfile=True)
    assert CHATML.template in (tmp_path / "out.Modelfile").read_text(encoding="utf-8")
    merged(base, tmp_path / "base.gguf", adapter, modelfile=True, tokenizer="base")
    assert "TEMPLATE" not in (tmp_path / "base.Modelfile").read_text(encoding="utf-8")
