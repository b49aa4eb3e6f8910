"""The metric of attacked attributions: its figures from its parts, and its degenerate cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation import (
    attribution_attack,
    attributions,
    kendall_tau,
    pixel_scores,
    spearman,
    top_k_intersection,
)
from rds_fast.evaluation.evaluate import evaluate_model
from rds_fast.evaluation.samples import drawn
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training.data import Images

BUDGET = {
    "metrics": ("attribution",),
    "attribution_k": 5,
    "attribution_steps": 4,
    "attribution_restarts": 2,
    "attribution_step_size": 0.05,
    "path_steps": 8,
    "attack_path_steps": 4,
}


def model_and_split() -> tuple[nn.Module, Images]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.rand(30, 2, 3, 3)
    labels = model(x).argmax(1)
    labels[::3] = (labels[::3] + 1) % 3  # every third is classified wrongly
    return model, Images(x, labels, None, 3)


def test_figures_are_those_of_the_parts_on_the_samples_classified_rightly() -> None:
    model, split = model_and_split()
    results = evaluate_model(model, split, EvaluationSettings(**BUDGET, linf_epsilon=0.2, attribution_limit=12, seed=3))
    chosen = drawn(split, 12, 3).take(torch.arange(12))
    right = model(chosen.images).argmax(1) == chosen.labels
    x, y = chosen.images[right], chosen.labels[right]
    generator = torch.Generator().manual_seed(3)
    moved = attribution_attack(
        model,
        x,
        y,
        0.2,
        k=5,
        steps=4,
        restarts=2,
        step_size=0.05,
        path_steps=8,
        attack_path_steps=4,
        generator=generator,
    )
    before, after = (
        pixel_scores(attributions(model, each, y, "integrated_gradients", path_steps=8)) for each in (x, moved)
    )
    assert results.scalars == {
        "top_k_intersection": pytest.approx(top_k_intersection(before, after, 5).mean().item()),
        "kendall_tau": pytest.approx(kendall_tau(before, after).mean().item()),
        "spearman": pytest.approx(spearman(before, after).mean().item()),
    }
    assert results.scalars["top_k_intersection"] < 1
    assert f"the {int(right.sum())} of 12 samples" in results.notes[0]


def test_at_radius_zero_nothing_changes() -> None:
    model, split = model_and_split()
    results = evaluate_model(model, split, EvaluationSettings(**BUDGET, attribution_epsilon=0.0))
    assert results.scalars == {"top_k_intersection": 1.0, "kendall_tau": 1.0, "spearman": pytest.approx(1.0)}


def test_the_seed_decides() -> None:
    model, split = model_and_split()
    settings = EvaluationSettings(**BUDGET, batch_size=20)
    assert evaluate_model(model, split, settings).scalars == evaluate_model(model, split, settings).scalars


class Wrong(nn.Module):
    """Predicts class 2, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.tensor([0.0, 0.0, 10.0])


def test_where_nothing_is_classified_rightly_there_is_no_figure() -> None:
    split = Images(torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.long), None, 3)
    results = evaluate_model(Wrong(), split, EvaluationSettings(**BUDGET))
    assert results.scalars == {"top_k_intersection": None, "kendall_tau": None, "spearman": None}
    assert "the 0 of 4 samples" in results.notes[0]


def test_samples_without_an_attribution_are_counted_in_a_note() -> None:
    model, split = model_and_split()
    x = split.images.clone()
    x[0] = 0  # a black image is the baseline itself
    labels = split.labels.clone()
    labels[0] = model(x[:1]).argmax(1)
    results = evaluate_model(model, Images(x, labels, None, 3), EvaluationSettings(**BUDGET))
    assert "On 1 of them" in results.notes[1]
    assert all(value is not None for value in results.scalars.values())


def test_more_pixels_than_there_are_is_an_error() -> None:
    model, split = model_and_split()
    with pytest.raises(ValueError, match="k is 10"):
        evaluate_model(model, split, EvaluationSettings(**{**BUDGET, "attribution_k": 10}))
