"""Settings as key=value."""

from __future__ import annotations

import math

import pytest

from rds_fast.experiments import words
from rds_fast.training.config import FIELDS

KEYS = ("variant", *FIELDS)


def test_a_recipe_and_settings() -> None:
    found = words.split(["lr=0.1", "mine.toml", "batch-size=5"], KEYS)
    assert found == ("mine.toml", {"lr": "0.1", "batch_size": "5"})
    assert words.split([], KEYS) == (None, {})
    assert words.split(["data_root=/a=b"], KEYS).settings == {"data_root": "/a=b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], "two recipes are given, 'a' and 'b'; give one, and settings as key=value"),
        (["lr=1", "lr=2"], "lr is given twice, as '1' and '2'"),
        (["wieght=1"], "a key is 'wieght'; did you mean 'weight'"),
        (["=1"], "a key is ''"),
    ],
)
def test_wrong_words(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.split(given, KEYS)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "3", 3),
        ("weight", "1e-2", 0.01),
        ("p", "inf", math.inf),
        ("weight", "2", 2.0),
        ("nesterov", "true", True),
        ("fast", "No", False),
        ("threads", "none", None),
        ("threads", "2", 2),
        ("steps", "None", None),
        ("attack_step_size", "0.5", 0.5),
        ("data_root", "none", None),
        ("objective", "density", "density"),
        ("lr_milestones", "60,120", (60, 120)),
        ("lr_milestones", "", ()),
        ("evaluation.metrics", "accuracy,pgd", ("accuracy", "pgd")),
        ("evaluation.perturbation_ratios", "0.1,0.5", (0.1, 0.5)),
        ("evaluation.limit", "none", None),
    ],
)
def test_values(key: str, text: str, value: object) -> None:
    found = words.value(key, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("epochs", "3.5", "epochs is '3.5'; it must be a whole number$"),
        ("epochs", "none", "epochs is 'none'; it must be a whole number$"),
        ("threads", "two", "threads is 'two'; it must be a whole number, or none"),
        ("lr", "fast", "lr is 'fast'; it must be a number$"),
        ("nesterov", "1", "nesterov is '1'; it must be true or false"),
        ("lr_milestones", "60,x", "lr_milestones is 'x'; it must be a whole number"),
    ],
)
def test_wrong_values(key: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.value(key, text)
