"""Accuracy by group: by hand, with groups that are empty, and without any."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation import group_accuracies
from rds_fast.evaluation.groups import measure
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training import Images

RIGHT = torch.tensor([True, True, False, True, False, False])
GROUPS = torch.tensor([0, 0, 0, 2, 3, 3])


def test_by_hand() -> None:
    accuracies, samples = group_accuracies(RIGHT, GROUPS, 4)
    assert samples.tolist() == [3, 0, 1, 2]
    assert accuracies[[0, 2, 3]].tolist() == [2 / 3, 1.0, 0.0]
    assert math.isnan(accuracies[1])


def test_no_samples_have_no_accuracies() -> None:
    accuracies, samples = group_accuracies(RIGHT[:0], GROUPS[:0], 2)
    assert bool(accuracies.isnan().all())
    assert samples.tolist() == [0, 0]


class FirstPixel(nn.Module):
    """Two classes: is the first pixel above a half?"""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        return torch.stack((1 - first, first), 1)


def split(names: tuple[str, ...] | None) -> Images:
    """All labels are 1, and what is right is as above."""
    images = RIGHT.float().view(-1, 1, 1, 1)
    groups = None if names is None else GROUPS
    return Images(images, torch.ones(6, dtype=torch.long), None, 2, groups=groups, group_names=names)


@pytest.mark.parametrize("batch_size", [500, 4])
def test_the_metric_names_the_worst_group(batch_size: int) -> None:
    names = ("land on land", "land on water", "water on land", "water on water")
    results = measure(FirstPixel(), split(names), EvaluationSettings(batch_size=batch_size))
    assert results.scalars == {"worst_group_accuracy": 0.0}
    assert results.notes == (
        "The worst group is water on water: 0.0% of 2 samples.",
        "The group land on water has no samples here.",
    )
    assert results.tables["groups"] == [
        {"group": names[0], "samples": 3, "accuracy": 2 / 3},
        {"group": names[1], "samples": 0, "accuracy": None},
        {"group": names[2], "samples": 1, "accuracy": 1.0},
        {"group": names[3], "samples": 2, "accuracy": 0.0},
    ]


def test_data_without_groups_have_no_worst_one() -> None:
    results = measure(FirstPixel(), split(None), EvaluationSettings())
    assert results.scalars == {"worst_group_accuracy": None}
    assert results.notes == ("These data have no groups.",)
    assert results.tables == {}


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 3; with 3 groups they must be in \[0, 3\)"):
        group_accuracies(RIGHT, GROUPS, 3)
    with pytest.raises(ValueError, match=r"right has shape \(6,\) and groups \(5,\)"):
        group_accuracies(RIGHT, GROUPS[:5], 4)
