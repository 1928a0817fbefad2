"""Names and shapes as recipes write them, and the dims that follow from a config and from stored shapes."""

from __future__ import annotations

import pytest

from streamconv.recipe.dims import Equation, extents, parse_extent, solve_dims
from streamconv.recipe.language import Dim, Recipe
from streamconv.recipe.names import NONE, NameTable, fill, match_name

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


@pytest.mark.parametrize(
    ("templates", "name", "found"),
    [
        (["layers.{i}.w"], "layers.3.w", ("layers.{i}.w", 3, NONE)),
        (["layers.{i}.experts.{e}.w1"], "layers.3.experts.7.w1", ("layers.{i}.experts.{e}.w1", 3, 7)),
        (["experts.{e}.layers.{i}.w"], "experts.3.layers.7.w", ("experts.{e}.layers.{i}.w", 7, 3)),
        (["v.layers.{i:vision}.w"], "v.layers.26.w", ("v.layers.{i:vision}.w", 26, NONE)),
        (["mlp.0.weight", "mlp.2.weight"], "mlp.2.weight", ("mlp.2.weight", NONE, NONE)),
        (["mlp.0.weight", "mlp.2.weight"], "mlp.1.weight", None),
        (["mlp.{i}.weight", "mlp.2.weight"], "mlp.2.weight", ("mlp.2.weight", NONE, NONE)),
        (["mlp.{i}.weight", "mlp.2.weight"], "mlp.1.weight", ("mlp.{i}.weight", 1, NONE)),
        (["layers.{i}.mlp.0.w"], "layers.5.mlp.0.w", ("layers.{i}.mlp.0.w", 5, NONE)),
        (["layers.{i}.mlp.0.w"], "layers.0.mlp.5.w", None),
        (["layers.{i}.w"], "layers.03.w", None),
        (["layers.{i}.w"], "layers.x.w", None),
        (["layers.{i}.w"], "layers.#.w", None),
    ],
)
def test_a_name_is_found_by_its_template(templates: list[str], name: str, found: tuple[str, int, int] | None) -> None:
    one = NameTable(templates).find(name)
    assert (one and (one.template, one.i, one.e)) == found


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("blk.{i}.w", "blk.3.w"),
        ("v.blk.{i:vision}.w", "v.blk.3.w"),
        ("layers.{i}.experts.{e}.w", "layers.3.experts.7.w"),
        ("output.weight", "output.weight"),
    ],
)
def test_a_template_is_filled(template: str, name: str) -> None:
    assert fill(template, 3, 7) == name


@pytest.mark.parametrize(
    ("text", "dims", "value"),
    [
        ("(A+2*K)*D", {"A": 8, "K": 2, "D": 4}, 48),
        ("A*D+2*K*D", {"A": 8, "K": 2, "D": 4}, 48),
        ("2*M-1", {"M": 5}, 9),
        ("H/A", {"H": 12, "A": 4}, 3),
        ("H/A", {"H": 12, "A": 5}, 0),  # no tensor has that
        ("H/(A-B)", {"H": 12, "A": 5, "B": 5}, 0),
        ("(A+2*K)*D", {"A": 8, "K": 2}, None),
    ],
)
def test_an_extent_is_a_sum_of_products(text: str, dims: dict[str, int], value: int | None) -> None:
    assert parse_extent(text).value(dims) == value


@pytest.mark.parametrize(
    ("text", "dims", "extent", "solved"),
    [
        ("(A+2*K)*D", {"A": 8, "K": 2}, 48, ("D", 4)),
        ("(A+2*K)*D", {"A": 8, "D": 4}, 48, ("K", 2)),
        ("(A+2*K)*D", {"K": 2, "D": 4}, 48, ("A", 8)),
        ("(A+2*K)*D", {"A": 8, "D": 4}, 50, None),  # not whole
        ("(A+2*K)*D", {"A": 8, "D": 4}, 32, None),  # would be 0
        ("(A+2*K)*D", {"A": 8}, 48, None),  # two are unknown
        ("A*A", {}, 49, None),  # not linear
        ("H/A", {"H": 12}, 4, None),
        ("H/A", {"A": 4}, 3, ("H", 12)),
        ("2*M+1", {}, 1 << 80 | 1, ("M", 1 << 79)),
    ],
)
def test_a_sum_is_solved_for_its_unknown_dim(
    text: str, dims: dict[str, int], extent: int, solved: tuple[str, int] | None
) -> None:
    assert parse_extent(text).solve(extent, dims) == solved


def test_a_shape_is_a_product_of_dims_and_numbers() -> None:
    assert extents("2*A*D H", {"A": 3, "D": 4, "H": 5}) == (24, 5)
    assert extents("A*D H", {"A": 3, "H": 5}) is None


@pytest.mark.parametrize(
    ("stated", "equations", "solved"),
    [
        ({"H": 12, "A": 3}, [], {"H": 12, "A": 3, "D": 4}),  # a default
        ({"H": 12, "A": 3}, [Equation(parse_extent("A*D"), 21)], {"H": 12, "A": 3, "D": 7}),  # a shape comes before it
        (
            {"A": 3},
            [Equation(parse_extent("A*D"), 21), Equation(parse_extent("D*H"), 35)],
            {"A": 3, "D": 7, "H": 5},
        ),  # one by one
        (
            {"A": 3},
            [Equation(parse_extent("D*H"), 35), Equation(parse_extent("A*D"), 21)],
            {"A": 3, "D": 7, "H": 5},
        ),  # in any order
        ({"H": 12}, [Equation(parse_extent("H"), 10)], {"H": 12}),  # what is stated stays
        ({"H": 12, "A": 5}, [Equation(parse_extent("A*D"), 12)], {"H": 12, "A": 5}),  # no whole number
    ],
)
def test_dims_are_stated_or_follow_from_shapes_or_defaults(
    stated: dict[str, int], equations: list[Equation], solved: dict[str, int]
) -> None:
    assert solve_dims(RECIPE, stated, equations) == solved
