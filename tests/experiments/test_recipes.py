"""The recipes that ship, each of whose variants is built and takes a step; and what a recipe may not hold."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from rds_fast.experiments import recipes, words
from rds_fast.training import data, models
from rds_fast.training.config import FIELDS, TrainingConfig
from rds_fast.training.objectives import Objective

# Small, so that a step takes no time; as the command line would have it.
SMALL = words.values({"model": "cnn", "data_root": "elsewhere"})
SHORT = words.values({"path_steps": "2", "attack_path_steps": "1", "attack_steps": "1"})
VARIANTS = [(name, variant) for name in recipes.names() for variant in recipes.load(name).variants]

WANTED = {
    *("mnist-rar", "fashion-mnist-rar", "gtsrb-rar", "flowers-rar", "fashion-mnist-rar-short"),
    *("block-mnist", "block-fashion-mnist", "block-mnist-norms", "block-mnist-schedules"),
    *("cifar10-density", "cifar100-density", "svhn-density", "tiny-imagenet-density"),
    *("cifar10-finlay", "cifar10-madry", "celeba-hair", "waterbirds", "imagenet-resnet50"),
}


def test_the_recipes_that_ship() -> None:
    assert set(recipes.names()) == WANTED


@pytest.mark.parametrize("name", recipes.names())
def test_each_names_its_source_and_what_is_ours(name: str) -> None:
    recipe = recipes.load(name)
    assert re.search(r"\b(19|20)\d\d\b", recipe.source)  # a year
    assert recipe.ours
    assert all(len(why) > 15 for why in recipe.ours.values())
    decided = {*recipe.training, *(key for variant in recipe.variants.values() for key in variant.settings)}
    for setting in recipe.ours:  # is one that the recipe has, or that has a default that is ours
        assert setting in decided or setting in FIELDS or "." in setting or setting == "variants"
    assert recipe.settings(choosing=True).metrics  # what is measured while choosing is named
    measured = {"linf_accuracy": "pgd", "worst_group_accuracy": "groups"}[recipe.selection.measure]
    assert {"accuracy", measured} <= set(recipe.settings(choosing=True).metrics)


@pytest.mark.parametrize("name", recipes.names())
def test_variants_are_told_apart_by_their_titles(name: str) -> None:
    recipe = recipes.load(name)
    titles = [variant.title for variant in recipe.variants.values()]
    assert len(set(titles)) == len(titles)
    assert recipe.title not in titles


@pytest.mark.parametrize("name", recipes.names())
def test_how_a_sweep_chooses_is_ours(name: str) -> None:
    """No source says how its weights were chosen."""
    recipe = recipes.load(name)
    choosing = {f"sweep.{part}" for part in ("grid", "margin", "measure") if recipe.selection.grid}
    choosing |= {"sweep.evaluation"} if recipe.selection.evaluation else set()
    assert choosing == {setting for setting in recipe.ours if setting.startswith("sweep.")}


@pytest.mark.parametrize("name", [name for name in recipes.names() if "Yang" in recipes.load(name).source])
def test_of_the_density_penalty_the_paper_gives_data_norm_and_metrics_alone(name: str) -> None:
    recipe = recipes.load(name)
    measured = {f"evaluation.{setting}" for setting in recipe.evaluation if setting != "metrics"}
    assert {*recipe.training, *measured} - {"data", "p"} <= set(recipe.ours)


@pytest.mark.parametrize("name", ["mnist-rar", "fashion-mnist-rar", "gtsrb-rar", "flowers-rar"])
def test_what_differs_from_the_authors_attack_on_attributions_is_ours(name: str) -> None:
    """They attack all test images, three times each."""
    recipe = recipes.load(name)
    assert {"evaluation.attribution_limit", "evaluation.attribution_restarts"} <= set(recipe.ours)
    assert "evaluation.steps" not in recipe.ours  # those of the attack on the accuracy are theirs


def test_those_of_one_paper_hold_its_figures() -> None:
    """Chen et al. (2019), table of Fashion-MNIST: natural and PGD accuracy, top-k intersection, Kendall's τ."""
    expected = {
        "natural": (90.86, 0.01, 39.01, 0.4610),
        "madry": (85.73, 73.01, 46.12, 0.6251),
        "ig-norm": (85.13, 65.95, 59.22, 0.6171),
        "ig-sum-norm": (85.44, 70.26, 72.08, 0.6747),
    }
    for name in ("fashion-mnist-rar", "fashion-mnist-rar-short"):
        for variant, (accuracy, robust, top_k, tau) in expected.items():
            reported = recipes.load(name).variants[variant].reported
            assert reported["accuracy"] == pytest.approx(accuracy / 100)
            assert reported["linf_accuracy"] == pytest.approx(robust / 100)
            assert reported["top_k_intersection"] == pytest.approx(top_k / 100)
            assert reported["kendall_tau"] == tau


def test_the_full_schedule_is_the_paper_s() -> None:
    config = recipes.load("fashion-mnist-rar").config("ig-sum-norm")
    assert (config.model, config.steps, config.batch_size) == ("rar-cnn", 100_000, 50)
    assert (config.optimizer, config.lr, config.weight) == ("adam", 1e-4, 0.1)
    assert (config.epsilon, config.attack_steps, config.attack_step_size) == (0.1, 20, 0.01)
    assert (config.path_steps, config.attack_path_steps) == (50, 10)
    for name in ("mnist-rar", "fashion-mnist-rar"):
        assert recipes.load(name).config("natural").steps == 25_000
    settings = recipes.load("gtsrb-rar").settings()
    assert (settings.linf_epsilon, settings.steps, settings.linf_step_size) == (8 / 255, 7, 2 / 255)
    assert recipes.load("flowers-rar").settings().attribution_k == 1000
    norms = [recipes.load("block-mnist-norms").config(name).p for name in ("p1", "p2", "pinf")]
    assert norms == [1.0, 2.0, math.inf]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_each_variant_takes_a_step(name: str, variant: str) -> None:
    recipe = recipes.load(name)
    config = recipe.config(variant, SMALL)
    short = {key: value for key, value in SHORT.items() if config.without_effect(key) is None}
    if data.DATA_SETS[config.data].shape is None:
        short["image_size"] = 16
    config = dataclasses.replace(config, **short)
    torch.manual_seed(0)
    model = models.build(config.model, config.image_shape, 3)
    x, y = torch.rand(4, *config.image_shape), torch.tensor([0, 1, 2, 0])
    terms = Objective(config, 10, data.Images(x, y, classes=3))(model, x, y, 0)
    terms.total.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    assert terms.logits.shape == (4, 3)
    has_penalty = config.without_effect("weight") is None
    assert (float(terms.penalty.detach()) > 0) == has_penalty


EXAMPLE = """
title = "an example"
source = "nobody 2020"
variant = "a"
[training]
epochs = 1
[variants.a]
objective = "density"
[variants.b]
objective = "cross-entropy"
[sweep]
baseline = "b"
grid.weight = [0.1, 1]
[evaluation]
steps = 2
"""


def test_a_recipe_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(EXAMPLE)
    recipe = recipes.load(str(path))
    assert (recipe.name, recipe.title, recipe.variant) == ("mine", "an example", "a")
    assert recipe.config() == TrainingConfig(epochs=1, objective="density")
    assert recipe.config("b", {"epochs": 3}) == TrainingConfig(epochs=3, objective="cross-entropy")
    assert recipe.variants["a"].title == "a"
    assert recipe.selection.grid == {"weight": (0.1, 1)}
    assert (recipe.selection.measure, recipe.selection.margin) == ("linf_accuracy", 0.02)
    assert recipe.settings().steps == 2
    assert recipe.settings(choosing=True).metrics == ("accuracy", "pgd")
    assert recipe.settings({"steps": 3}).steps == 3
    with pytest.raises(ValueError, match="variant is 'c'; did you mean"):
        recipe.config("c")
    with pytest.raises(ValueError, match="a setting is 'wieght'; did you mean 'weight'"):
        recipe.config("a", {"wieght": 1})


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe is 'blockmnist'; did you mean 'block-mnist'"):
        recipes.load("blockmnist")
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*none\.toml"):
        recipes.load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "an example"', "", "title missing"),
        ('source = "nobody 2020"', "", "source missing"),
        ('title = "an example"', "title = 3", "title is 3; it must be a text"),
        ("[training]", "[trainings]", "a part is 'trainings'; did you mean 'training'"),
        ("epochs = 1", "epoch = 1", "a setting is 'epoch'; did you mean 'epochs'"),
        ("epochs = 1", "epochs = 0", "epochs is 0; it must be a whole number, 1 or more"),
        ("epochs = 1", 'data = "minst"', "data is 'minst'; did you mean 'mnist'"),
        ("epochs = 1", "projections = 2", "projections would have no effect: it belongs to objective jacobian"),
        ('objective = "density"', 'objective = "dense"', "variant a: objective is 'dense'; did you mean 'density'"),
        ('objective = "density"', 'objective = "density"\nepsilon = 1', "epsilon of variant a would have no effect"),
        ('objective = "density"', 'objective = "density"\nseed = 1', "variants.a holds a seed"),
        ('objective = "density"', "weight = true", "weight is True; it must be 0 or more"),
        ('variant = "a"', 'variant = "z"', "variant is 'z'; did you mean"),
        ('baseline = "b"', 'baseline = "z"', "sweep.baseline is 'z'; did you mean"),
        ('baseline = "b"', 'base = "b"', "a setting of sweep is 'base'; did you mean 'baseline'"),
        ('baseline = "b"', 'measure = "linf_acuracy"', "sweep.measure is 'linf_acuracy'; did you mean 'linf_accuracy'"),
        ('baseline = "b"', "margin = 2", "sweep.margin is 2; it must be a share of accuracy"),
        ("grid.weight = [0.1, 1]", "grid.weigth = [1]", "an axis of the grid is 'weigth'; did you mean 'weight'"),
        ("grid.weight = [0.1, 1]", "grid.weight = []", "sweep.grid.weight is empty"),
        ("grid.weight = [0.1, 1]", "grid.weight = [-1]", "weight is -1; it must be 0 or more"),
        (
            "grid.weight = [0.1, 1]",
            "evaluation.step = 1",
            "a setting of the evaluation is 'step'; did you mean 'steps'",
        ),
        ("steps = 2", "step = 2", "a setting of the evaluation is 'step'; did you mean 'steps'"),
        ("steps = 2", "steps = 0", "steps is 0; it must be 1 or more"),
        ("steps = 2", 'metrics = ["acuracy"]', "a metric is 'acuracy'; did you mean 'accuracy'"),
        ("[evaluation]", '[[ours]]\nsettings = ["lrr"]\nwhy = ""\n[evaluation]', "is 'lrr'; did you mean 'lr'"),
        (
            "[evaluation]",
            '[[ours]]\nwhy = ""\n[evaluation]',
            "an entry of ours holds why; it must hold settings and why",
        ),
        ("[evaluation]", "[evaluation", "recipe mine: Expected ']'"),
    ],
)
def test_what_no_recipe_may_hold(old: str, new: str, message: str) -> None:
    assert old in EXAMPLE
    with pytest.raises(ValueError, match="recipe mine: ") as caught:
        recipes.parse("mine", EXAMPLE.replace(old, new))
    assert message in str(caught.value)
