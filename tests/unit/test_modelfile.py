"""Modelfiles: what they name, which chat templates they translate, and that they stand in nobody's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli import main
from streamconv.output.modelfile import CHATML, LLAMA_3, find_prompt
from tests import tiny

JINJA_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JINJA_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def with_template(directory: Path, template: str | None) -> Path:
    path = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["chat_template"] = template
    path.write_text(json.dumps(config))
    return directory


def rendered(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go makes of a template that has one range over the messages, with nothing but their role and content."""
    start, body, end = template.replace("{{ end }}", "{{ range .Messages }}").split("{{ range .Messages }}")
    return start + "".join(body.replace("{{ .Role }}", r).replace("{{ .Content }}", c) for r, c in messages) + end


def test_the_forms_are_those_of_the_templates() -> None:
    chat = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?")]
    assert rendered(CHATML.template, chat) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(LLAMA_3.template, chat[1:2]) == (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (JINJA_CHATML, CHATML),
        (JINJA_CHATML.replace("\n", "\\n") + "\n", CHATML),
        ("{{ bos_token }}" + JINJA_CHATML, CHATML),
        (JINJA_LLAMA_3, LLAMA_3),
        (JINJA_CHATML.replace("role", "name"), None),
        (JINJA_CHATML.replace("im_end", "im_stop"), None),
        (JINJA_LLAMA_3 + "{{ eos_token }}", None),
        ("", None),
    ],
)
def test_a_template_is_recognised_whole_or_not_at_all(template: str, prompt: object) -> None:
    assert find_prompt(template) == prompt


def test_a_model_with_a_known_template(tmp_path: Path) -> None:
    source = with_template(tiny.lfm2(tmp_path / "src"), JINJA_CHATML)
    out = tmp_path / "My Model.gguf"
    assert main(["convert", str(source), "-o", str(out), "--modelfile", "--quiet"]) == 0
    assert (tmp_path / "My Model.Modelfile").read_text() == (
        "# ollama create NAME -f 'My Model.Modelfile'\n"
        "FROM ./My Model.gguf\n"
        f'TEMPLATE """{CHATML.template}"""\n'
        'PARAMETER stop "<|im_start|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", "{# " + "x" * 70_000 + " #}"])
def test_what_is_not_known_is_left_to_ollama(tmp_path: Path, template: str | None) -> None:
    source = with_template(tiny.lfm2(tmp_path / "src"), template)
    assert main(["convert", str(source), "-o", str(tmp_path / "m.gguf"), "--modelfile", "--quiet"]) == 0
    assert (tmp_path / "m.Modelfile").read_text() == "# ollama create NAME -f m.Modelfile\nFROM ./m.gguf\n"


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    source = with_template(tiny.llama(tmp_path / "src"), JINJA_LLAMA_3)
    adapter = tiny.peft_adapter(tmp_path / "adapter", source)
    (tmp_path / "bases").mkdir()
    (tmp_path / "out").mkdir()
    base = tmp_path / "bases" / "base.gguf"
    assert main(["convert", str(source), "-o", str(base), "--quiet"]) == 0
    out = tmp_path / "out" / "a.gguf"
    assert main(["lora", str(adapter), "--base", str(base), "-o", str(out), "--modelfile", "--quiet"]) == 0
    _, from_, adapter_, *others = (tmp_path / "out" / "a.Modelfile").read_text().split("\n", 3)
    assert (from_, adapter_) == ("FROM ../bases/base.gguf", "ADAPTER ./a.gguf")
    assert others[0].startswith(f'TEMPLATE """{LLAMA_3.template}"""\nPARAMETER stop "<|start_header_id|>"\n')


def test_a_very_long_template_of_a_base_is_none_of_the_known(tmp_path: Path) -> None:
    source = with_template(tiny.llama(tmp_path / "src"), JINJA_LLAMA_3 + "{# " + "x" * 100_000 + " #}")
    adapter, base = tiny.peft_adapter(tmp_path / "adapter", source), tmp_path / "base.gguf"
    assert main(["convert", str(source), "-o", str(base), "--quiet"]) == 0
    assert (
        main(["lora", str(adapter), "--base", str(base), "-o", str(tmp_path / "a.gguf"), "--modelfile", "--quiet"]) == 0
    )
    assert "TEMPLATE" not in (tmp_path / "a.Modelfile").read_text()


def test_what_cannot_have_one_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.llama(tmp_path / "src")
    adapter = tiny.peft_adapter(tmp_path / "adapter", source)
    out = ("-o", str(tmp_path / "m.gguf"), "--modelfile")
    assert main(["convert", str(source), *out, "--split-max-size", "60K"]) == 2
    assert "Ollama cannot import split ones" in capsys.readouterr().err
    assert main(["lora", str(adapter), "--base", str(source), *out]) == 2
    assert "needs the base's GGUF" in capsys.readouterr().err
    (tmp_path / "m.Modelfile").write_text("mine")
    assert main(["convert", str(source), *out]) == 5
    assert "m.Modelfile: exists already" in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()
    assert (tmp_path / "m.Modelfile").read_text() == "mine"
    assert main(["convert", str(source), *out, "--dry-run", "--force", "--quiet"]) == 0
    assert (tmp_path / "m.Modelfile").read_text() == "mine"
    assert main(["convert", str(source), *out, "--force", "--quiet"]) == 0
    assert "FROM ./m.gguf" in (tmp_path / "m.Modelfile").read_text()
    assert not list(tmp_path.glob("*.part"))
