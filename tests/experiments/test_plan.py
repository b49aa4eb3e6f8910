"""Which runs a sweep has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rds_fast.experiments import recipes
from rds_fast.experiments.plan import Plan

RECIPE = recipes.parse(
    "mine",
    """
title = "an example"
source = "nobody 2020"
variant = "a"
[training]
epochs = 1
[variants.plain]
objective = "cross-entropy"
[variants.a]
objective = "density"
[variants.fixed]
objective = "attribution"
weight = 1.0
[variants.attacked]
objective = "adversarial"
[sweep]
grid.weight = [1.0, 0.1]
""",
)


def names(plan: Plan) -> list[str]:
    return [trial.name for trial in plan.trials]


def test_the_grid_is_for_those_on_which_it_has_an_effect() -> None:
    """And not for those that have a weight of their own."""
    assert names(Plan(RECIPE)) == [
        "plain-seed0",
        "a-weight0.1-seed0",
        "a-weight1.0-seed0",
        "fixed-seed0",
        "attacked-seed0",
    ]
    weights = [trial.config.weight for trial in Plan(RECIPE).trials if trial.variant in ("a", "fixed")]
    assert weights == [0.1, 1.0, 1.0]


def test_what_is_given_comes_before_the_recipe() -> None:
    plan = Plan(RECIPE, {"epochs": 3}, {"weight": [5.0], "epsilon": [0.2, 0.1]}, ["fixed", "a"], (0, 1))
    assert names(plan) == [
        *("plain-seed0", "plain-seed1"),  # the baseline is always there
        *("a-weight5.0-seed0", "a-weight5.0-seed1"),
        *("fixed-weight5.0-epsilon0.1-seed0", "fixed-weight5.0-epsilon0.1-seed1"),
        *("fixed-weight5.0-epsilon0.2-seed0", "fixed-weight5.0-epsilon0.2-seed1"),
    ]
    assert {trial.config.epochs for trial in plan.trials} == {3}
    assert [trial.config.seed for trial in plan.trials] == [trial.seed for trial in plan.trials]
    changed = Plan(RECIPE, {"weight": 3.0})
    assert names(changed) == ["plain-seed0", "a-seed0", "fixed-seed0", "attacked-seed0"]
    assert {trial.config.weight for trial in changed.trials if trial.variant in ("a", "fixed")} == {3.0}


def test_an_axis_may_hang_on_another() -> None:
    axes = {"weight": [1.0], "method": ["exact", "finite_difference"], "step_size": [0.01, 0.1]}
    plan = Plan(RECIPE, axes=axes, variants=["a"])
    assert [trial.settings for trial in plan.trials if trial.variant == "a"] == [
        {"weight": 1.0, "method": "exact"},
        {"weight": 1.0, "method": "finite_difference", "step_size": 0.01},
        {"weight": 1.0, "method": "finite_difference", "step_size": 0.1},
    ]


def test_infinity_is_json() -> None:
    plan = Plan(RECIPE, axes={"p": [float("inf"), 1.0], "weight": [1.0]}, variants=["a"])
    found = [trial for trial in plan.trials if trial.variant == "a"]
    assert [json.dumps(trial.settings, allow_nan=False) for trial in found] == [
        '{"weight": 1.0, "p": 1.0}',
        '{"weight": 1.0, "p": "inf"}',
    ]
    assert found[1].config.p == float("inf")
    assert found[1].name == "a-weight1.0-pinf-seed0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": ["b"]}, "variant is 'b'; did you mean"),
        ({"changes": {"epoch": 1}}, "a setting is 'epoch'; did you mean 'epochs'"),
        ({"changes": {"epochs": 0}}, "epochs is 0"),
        ({"axes": {"weight": [0.1, -1.0]}}, "weight is -1.0"),
        ({"axes": {"weight": [0.0, 0.1]}}, "a weight of 0 is given; candidates are above 0"),
        ({"axes": {"weight": []}}, "weight has no values"),
        ({"axes": {"objective": ["density", "jacobian"]}}, "objective has 2 values; give one"),
        ({"axes": {"seed": [0, 1]}}, "seed has 2 values; give one"),
        ({"axes": {"threads": [1, 2]}}, "threads has 2 values; give one"),
        ({"changes": {"objective": "density"}}, "objective is given; a sweep takes its objectives by variant="),
        ({"changes": {"seed": 3}}, "seed is given"),
        ({"changes": {"projections": 2}}, "projections would have no effect: "),
        ({"axes": {"epsilon": [0.1, 0.2]}, "variants": ["a"]}, "epsilon would have no effect: "),
        ({"seeds": ()}, "at least one, and each once"),
        ({"seeds": (0, 0)}, "at least one, and each once"),
    ],
)
def test_what_no_sweep_can_run(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(RECIPE, **arguments)
