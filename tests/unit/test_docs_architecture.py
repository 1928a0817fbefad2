"""docs/adding-an-architecture.md does what it says: its commands print what it shows, and its code runs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamconv.architectures
from streamconv import cli
from streamconv.recipe.registry import own_recipes
from tests.cases import GOLDENS
from tests.oracles import runtime
from tests.tools import arcee

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-architecture.md"
BLOCKS = re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
MODULE = "# arcee.py\n"
RECIPE = ["--recipe", "arcee.py"]
LOGITS = GOLDENS / "arcee.logits.npy"


class Reader:
    """Somebody who follows the page in an empty folder.

    has_checkout: whether the recipe is put where streamconv's own are, and not named.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], *, has_checkout: bool) -> None:
        self.has_checkout = has_checkout
        self.recipes = folder / "recipes" if has_checkout else folder
        self.recipes.mkdir(exist_ok=True)
        self.capsys = capsys
        self.scope: dict[str, Any] = {}

    def follow(self, kind: str, body: str) -> None:
        if kind == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                assert_shows(self.run(command), shown)
        elif body.startswith(MODULE):
            self.install(body)
        elif kind == "python torch":
            compile(body, str(PAGE), "exec")
            shutil.copy(LOGITS, "logits.npy")
        elif kind == "python":
            exec(compile(body, str(PAGE), "exec"), self.scope)

    def run(self, command: str) -> str:
        """What a command prints, on either stream."""
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "tests.tools.arcee"]:
            return f"{arcee.build(Path(words[3]))}\n"
        assert words[0] == "streamconv"
        if self.has_checkout:
            words = [word for word in words if word not in RECIPE]
        self.capsys.readouterr()
        cli.main(words[1:])
        return "".join(self.capsys.readouterr())

    def install(self, text: str) -> None:
        (self.recipes / "arcee.py").write_text(text, encoding="utf-8")
        sys.modules.pop("streamconv.architectures.arcee", None)
        own_recipes.cache_clear()


def assert_shows(printed: str, shown: str) -> None:
    """The lines shown are printed in this order; `...` stands for lines, or for the rest of one, that are left out."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line != "...":
            start, dots, _ = line.partition(" ...")
            assert any(one.startswith(start) if dots else one == line for one in lines), f"not printed: {line}"


@pytest.fixture(params=["installed", "checkout"])
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    one = Reader(tmp_path, capsys, has_checkout=request.param == "checkout")
    if one.has_checkout:
        folders = [*streamconv.architectures.__path__, str(one.recipes)]
        monkeypatch.setattr(streamconv.architectures, "__path__", folders)
    yield one
    sys.modules.pop("streamconv.architectures.arcee", None)
    own_recipes.cache_clear()


def recipe_text() -> str:
    (text,) = (body for _, body in BLOCKS if body.startswith(MODULE))
    return text


def distance(reader: Reader, text: str, *options: str) -> float:
    """KL at runtime of the tiny model, converted with this recipe."""
    reader.install(text)
    command = ["convert", "Arcee-tiny", "-o", "other.gguf", "--outtype", "f32", "--quiet", "--force", *RECIPE]
    assert reader.run(shlex.join(["streamconv", *command, *options])) == ""
    ids = [1, 33, 120, 7, 300, 201, 64, 90]
    return runtime.kl(np.load(LOGITS), runtime.next_token_logprobs("other.gguf", ids))


def test_the_page_can_be_followed(reader: Reader) -> None:
    for kind, body in BLOCKS:
        reader.follow(kind, body)
    assert reader.scope["distance"] < 1e-8
    assert {kind for kind, _ in BLOCKS} == {"console", "python", "python torch", "text", "toml"}


def test_its_error_is_what_a_wrong_shape_gives(reader: Reader) -> None:
    arcee.build(Path("Arcee-tiny"))
    reader.install(recipe_text().replace('"ffn_up.weight", "F H"', '"ffn_up.weight", "H F"'))
    (shown,) = (body for kind, body in BLOCKS if kind == "text")
    assert reader.run("streamconv convert Arcee-tiny --recipe arcee.py") == shown


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"A*D H", (Permute("A"),))', '"A*D H")'),
        ('"ffn_norm.weight"', '"attn_norm.weight"'),
    ],
    ids=["not permuted", "exchanged"],
)
def test_its_proof_finds_what_shapes_cannot(reader: Reader, right: str, wrong: str) -> None:
    arcee.build(Path("Arcee-tiny"))
    text = recipe_text()
    if wrong in text:  # exchanged
        text = text.replace(wrong, "@").replace(right, wrong).replace("@", right)
    else:
        text = text.replace(right, wrong)
    assert distance(reader, text) > 1e-2


def test_the_draft_converts_and_is_right_once_its_todo_is_settled(reader: Reader) -> None:
    arcee.build(Path("Arcee-tiny"))
    draft = reader.run("streamconv draft Arcee-tiny")
    assert distance(reader, draft) > 1e-2
    settled = draft.replace('attn_q.weight", "A*D H"', 'attn_q.weight", "A*D H", (Permute("A"),)')
    settled = settled.replace('attn_k.weight", "K*D H"', 'attn_k.weight", "K*D H", (Permute("K"),)')
    assert distance(reader, settled.replace("Recipe, ", "Permute, Recipe, ", 1)) < 1e-8


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_the_recipe_refuses_by_name(reader: Reader, flag: str) -> None:
    arcee.build(Path("Arcee-tiny"), **{flag: True})
    reader.install(recipe_text())
    said = reader.run("streamconv convert Arcee-tiny --recipe arcee.py")
    assert f"{flag} is true, but the runtime does not support it" in said
