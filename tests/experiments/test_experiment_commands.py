"""``rds-fast recipes`` and ``rds-fast sweep`` as a user calls them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from rds_fast.experiments import recipes

for package in ("typer", "rich", "safetensors"):
    pytest.importorskip(package, reason="needs the extra train")

Call = Callable[..., tuple[int, str, str]]

SMALL = ("data=synthetic", "image_size=8", "classes=3", "train_size=40", "model=cnn", "epochs=1", "batch_size=8")
SMALL += ("evaluation.steps=2", "--device", "cpu", "--threads", "1")


def test_recipes_are_listed_and_shown(call: Call) -> None:
    code, output, errors = call("recipes")
    assert (code, errors) == (0, "")
    for name in recipes.names():
        recipe = recipes.load(name)
        assert f"{name}: {recipe.title}" in output
        assert recipe.source in output
        assert ", ".join(recipe.variants) in output
    code, output, _ = call("recipes", "mnist-rar")
    assert code == 0
    assert tomllib.loads(output)["title"] == recipes.load("mnist-rar").title
    code, _, errors = call("recipes", "minst-rar")
    assert code == 1
    assert "recipe is 'minst-rar'; did you mean 'mnist-rar'" in errors


def test_a_sweep_over_two_settings(tmp_path: Path, call: Call) -> None:
    words = ("block-mnist-norms", "variant=p2", "weight=0.1,1", "power=1,2", "--seeds", 2, "--test")
    code, output, errors = call("sweep", *words, *SMALL, "--out", tmp_path)
    assert (code, errors) == (0, "")
    assert "[10/10] p2-weight1.0-power2.0-seed1: accuracy" in output
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [tuple(point.values()) for point in record["points"]["p2"]] == [
        (0.1, 1.0),
        (0.1, 2.0),
        (1.0, 1.0),
        (1.0, 2.0),
    ]
    assert record["evaluation"]["steps"] == record["test_evaluation"]["steps"] == 2
    assert record["evaluation"]["metrics"] == ["accuracy", "pgd"]
    assert len(record["tests"]) == 4
    assert record["training"]["image_size"] == 8
    assert "device" not in record["training"]
    assert record["command"].startswith("rds-fast sweep block-mnist-norms variant=p2")
    for text in ("validation split; chosen candidates in bold", "test split", "weight 0.1, power 2.0"):
        assert text in output
    again = call("sweep", *words, *SMALL, "--out", tmp_path)
    assert again[0] == 0
    assert "[1/" not in again[1]


def test_a_run_is_evaluated_as_its_recipe_says(tmp_path: Path, call: Call) -> None:
    small = (*SMALL[:5], "batch_size=8", "steps=2", "device=cpu")
    assert call("train", "fashion-mnist-rar-short", "variant=natural", *small, "--out", tmp_path, "--quiet")[0] == 0
    options = ("--metrics", "accuracy,pgd", "--limit", 3, "--device", "cpu", "--no-page", "--split", "validation")
    assert call("evaluate", tmp_path, *options)[0] == 0
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert (settings["steps"], settings["linf_step_size"], settings["attribution_keep"]) == (20, 0.01, "kendall")
    assert (settings["limit"], settings["metrics"]) == (3, ["accuracy", "pgd"])


def test_what_a_source_reports_stands_beside(tmp_path: Path, call: Call) -> None:
    words = ("mnist-rar", "variant=natural", "steps=2", "evaluation.metrics=accuracy,pgd", "--test")
    code, output, errors = call("sweep", *words, *(word for word in SMALL if word != "epochs=1"), "--out", tmp_path)
    assert (code, errors) == (0, "")
    reported = output[output.index("as the source reports") :]
    assert "NATURAL" in reported
    assert "IG-SUM-NORM" in reported
    assert "99.2%" in reported
    assert "arXiv 1905.09957" in reported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("block-mnits",), "recipe is 'block-mnits'; did you mean 'block-mnist'"),
        (("variant=densty",), "variant is 'densty'; did you mean 'density'"),
        (("weigth=1,2",), "a key is 'weigth'; did you mean 'weight'"),
        (("weight=1,x",), "weight is 'x'; it must be a number"),
        (("weight=1,-2",), "weight is -2.0; it must be 0 or more"),
        (("data=mnits",), "data is 'mnits'; did you mean 'mnist'"),
        (("evaluation.step=1",), "a key is 'evaluation.step'; did you mean 'evaluation.steps'"),
        (("evaluation.steps=0",), "steps is 0; it must be 1 or more"),
        (("evaluation.metrics=acc",), "a metric is 'acc'; did you mean 'accuracy'"),
        (("epsilon=0.1,0.2",), "epsilon would have no effect"),
        (("seed=1,2",), "seed has 2 values; give one (seeds are counted by --seeds)"),
        (("objective=density",), "objective is given; a sweep takes its objectives by variant="),
        (("lr=1", "lr=2"), "lr is given twice"),
        (("imagenet-resnet50",), "data is 'imagefolder' and data_root is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_words_fail_before_any_work(tmp_path: Path, call: Call, words: tuple[str, ...], message: str) -> None:
    code, output, errors = call("sweep", *words, "--out", tmp_path / "sweep")
    assert (code, output) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "sweep").exists()
