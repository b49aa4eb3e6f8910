"""Input-gradient and density perturbation, by hand on linear models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation.gradient_perturbation import measure, unit_gradient
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training.data import Images


def linear(weight: list[list[float]]) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), len(weight), bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weight))
    return model


def test_unit_gradient_by_hand() -> None:
    def function(x: Tensor) -> Tensor:
        return x.flatten(1) @ torch.tensor([3.0, 4.0])

    x = torch.zeros(2, 1, 2)
    torch.testing.assert_close(unit_gradient(function, x), torch.tensor([[[0.6, 0.8]]]).expand(2, 1, 2))
    torch.testing.assert_close(unit_gradient(lambda x: 1e-30 * function(x), x)[0], torch.tensor([[0.6, 0.8]]))
    assert torch.equal(unit_gradient(lambda x: 0 * function(x), x), x)
    with torch.no_grad():
        assert unit_gradient(function, x).norm() == pytest.approx(math.sqrt(2))


def test_curves_by_hand() -> None:
    # f = (x₀, 0.6): class 0 where x₀ > 0.6. Of class 0 the gradient of f_y is (1, 0); of class 1 it is zero.
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.0, 0.6]))
    images = torch.tensor([[[[0.85, 0.5]]], [[[0.45, 0.5]]]])  # right, and right
    results = measure(model, Images(images, torch.tensor([0, 1]), None, 2), EvaluationSettings(l2_epsilon=0.5))
    accuracy, change = results.curves["input_perturbation_accuracy"], results.curves["input_perturbation_change"]
    assert accuracy.x == pytest.approx([step * 0.05 for step in range(-10, 11)])
    # Class 0's sample passes 0.6 at t = −0.25, hit to rounding; class 1's does not move.
    beyond = [t < -0.25 - 1e-6 for t in accuracy.x]
    near = [abs(t + 0.25) < 1e-6 for t in accuracy.x]
    for value, wrong, undecided in zip(accuracy.y, beyond, near, strict=True):
        assert undecided or value == (0.5 if wrong else 1.0)
    expected = [(min(0.85 + t, 1.0) - 0.85) / 2 for t in accuracy.x]  # clipped at white
    assert change.y == pytest.approx(expected, abs=1e-6)
    up, down = results.scalars["input_perturbation_up_auc"], results.scalars["input_perturbation_down_auc"]
    assert up == pytest.approx(0.5)
    assert 0.35 < down < 0.4  # 0.25 · 1 + 0.25 · 0.5, up to the cell where it falls


def test_the_density_rises_along_its_gradient() -> None:
    model = linear([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    split = Images(torch.full((3, 1, 1, 3), 0.5), torch.tensor([0, 1, 0]), None, 2)
    results = measure(model, split, EvaluationSettings(l2_epsilon=0.25))
    change = results.curves["density_perturbation_change"].y
    assert change[10] == 0.0
    assert all(one < other for one, other in itertools.pairwise(change))
    # By hand at t = 0.25, without a bound in the way: logits at x are (1.5, 0), all alike.
    share = math.exp(1.5) / (math.exp(1.5) + 1)
    gradient = torch.tensor([[share, 1 - share]]) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    moved = 0.5 + 0.25 * gradient / gradient.norm()
    logits = moved @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]).T
    expected = logits.logsumexp(1).item() - math.log(math.exp(1.5) + 1)
    assert change[-1] == pytest.approx(expected, rel=1e-5)
    assert set(results.scalars) == {
        f"{name}_perturbation_{side}_auc" for name in ("input", "density") for side in ("up", "down")
    }


def test_a_model_without_a_gradient_stays_and_batches_change_nothing() -> None:
    split = Images(torch.rand(5, 1, 1, 2, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 2, None, 2)
    flat = measure(linear([[0.0, 0.0], [0.0, 0.0]]), split, EvaluationSettings())
    assert set(flat.curves["input_perturbation_accuracy"].y) == {0.6}
    model = linear([[1.0, -1.0], [0.5, 2.0]])
    whole = measure(model, split, EvaluationSettings())
    parts = measure(model, split, EvaluationSettings(batch_size=2))
    assert whole.scalars == pytest.approx(parts.scalars)
    assert model[1].weight.grad is None
