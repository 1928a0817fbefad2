"""Names and shapes as recipes write them, and the dims that follow from a config and from stored shapes."""

from __future__ import annotations

import pytest

from streamconv.recipe.dims import Equation, extents, match_name, solve_dims
from streamconv.recipe.language import Dim, Recipe

RECIPE = Recipe(
    arch="toy",
    hf_names=("ToyForCausalLM",),
    model_type="toy",
    dims={"L": Dim("layers"), "V": Dim("vocab"), "H": Dim("hidden"), "A": Dim("heads"), "D": Dim("head_dim", "H/A")},
    tensors=(),
    keys=(),
)


@pytest.mark.parametrize(
    ("name", "template", "numbers"),
    [
        ("model.norm.weight", "model.norm.weight", ()),
        ("layers.12.w.weight", "layers.{i}.w.weight", (12,)),
        ("layers.0.experts.7.w1", "layers.{i}.experts.{e}.w1", (0, 7)),
        ("a.1.b.2.c.3.d", "a.{i}.b.{e}.c.{?}.d", (1, 2, 3)),
        ("layers.007.w", "layers.007.w", ()),
        ("layers.9999999.w", "layers.9999999.w", ()),
        ("conv1.5", "conv1.5", ()),
    ],
)
def test_names_are_templates_with_numbers(name: str, template: str, numbers: tuple[int, ...]) -> None:
    assert match_name(name) == (template, numbers)


def test_a_shape_is_a_product_of_dims_and_numbers() -> None:
    assert extents("2*A*D H", {"A": 3, "D": 4, "H": 5}) == (24, 5)
    assert extents("A*D H", {"A": 3, "H": 5}) is None


@pytest.mark.parametrize(
    ("stated", "equations", "solved"),
    [
        ({"H": 12, "A": 3}, [], {"H": 12, "A": 3, "D": 4}),  # a default
        ({"H": 12, "A": 3}, [Equation(("A", "D"), 21)], {"H": 12, "A": 3, "D": 7}),  # a shape comes before it
        ({"A": 3}, [Equation(("A", "D"), 21), Equation(("D", "H"), 35)], {"A": 3, "D": 7, "H": 5}),  # one by one
        ({"A": 3}, [Equation(("D", "H"), 35), Equation(("A", "D"), 21)], {"A": 3, "D": 7, "H": 5}),  # in any order
        ({"H": 12}, [Equation(("H",), 10)], {"H": 12}),  # what is stated stays
        ({"H": 12, "A": 5}, [Equation(("A", "D"), 12)], {"H": 12, "A": 5}),  # no whole number
    ],
)
def test_dims_are_stated_or_follow_from_shapes_or_defaults(
    stated: dict[str, int], equations: list[Equation], solved: dict[str, int]
) -> None:
    assert solve_dims(RECIPE, stated, equations) == solved
