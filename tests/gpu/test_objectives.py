"""Partial penalties, adaptive weights, Jacobian and gradient matching on a CUDA device: without one synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rds_fast.penalties.adaptive import AccuracyBudget, PenaltyRatio
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.schedules import LinearWarmup

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
Context = Callable[[], AbstractContextManager[None]]
CLASSES = 10


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 16, 3, stride=2)
    return nn.Sequential(*layers, nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 3, 16, 16, generator=generator), torch.randint(CLASSES, (32,), generator=generator)


PENALTIES = {
    "density": lambda: DensityPenalty(),
    "jacobian": lambda: JacobianPenalty(generator=torch.Generator(DEVICE).manual_seed(0)),
    "matching": lambda: GradientMatchingPenalty(network(seed=4).to(DEVICE)),
}
WEIGHTS = {
    "ratio": lambda: PenaltyRatio(0.1),
    "accuracy": lambda: AccuracyBudget(0.8),
    "cross-entropy": lambda: AccuracyBudget(1.0, of="cross_entropy"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("penalty_name", PENALTIES)
def test_a_step_reads_no_device_value(
    penalty_name: str, weight_name: str, training: bool, without_synchronisation: Context
) -> None:
    """With a subset drawn, the batch cut in two or not, and the weight updated from its terms."""
    model, (x, y) = network().to(DEVICE).train(training), (tensor.to(DEVICE) for tensor in batch())
    weight = WEIGHTS[weight_name]()
    options: dict[str, Any] = {"share": 0.5, "every": 2, "generator": torch.Generator(DEVICE).manual_seed(0)}
    loss = PenalizedLoss(PENALTIES[penalty_name](), LinearWarmup(weight, 3), **options)

    def steps() -> None:
        for step in range(2):
            terms = loss(model, x, y, step=step)
            terms.total.backward()
            weight.update(terms, y)

    steps()  # compiles kernels and chooses algorithms, which may wait; moves the weight's state to the device
    torch.cuda.synchronize()
    with without_synchronisation():
        steps()
        with pytest.raises(RuntimeError):  # the guard is up
            x.sum().item()
    assert weight(2).device.type == "cuda"


def double_on_cpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().cpu()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["jacobian", "matching"])
def test_gradients(name: str, training: bool) -> None:
    """In float64 against the CPU, whose operations the tests beside the penalties check."""
    model, (x, y) = network().double().to(DEVICE).train(training), batch()
    teacher = network(seed=4).double().to(DEVICE)
    if name == "jacobian":
        ours, reference = (JacobianPenalty(projections=None) for _ in range(2))
    else:
        ours, reference = GradientMatchingPenalty(teacher), GradientMatchingPenalty(double_on_cpu(teacher))
    twin = double_on_cpu(model)
    expected = torch.autograd.grad(PenalizedLoss(reference, 0.5)(twin, x.double(), y).total, list(twin.parameters()))
    total = PenalizedLoss(ours, 0.5)(model, x.double().to(DEVICE), y.to(DEVICE)).total
    for gradient, truth in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(gradient.cpu(), truth, rtol=1e-8, atol=1e-10)


def test_a_validation_accuracy_leaves_the_state_on_the_device() -> None:
    weight = AccuracyBudget(0.8, rate=1.0, initial=0.1)
    weight.observe(torch.tensor(0.9, device=DEVICE))
    weight.observe(0.9)
    weight.observe(torch.tensor(0.9))
    assert weight(0).device.type == "cuda"
    assert weight(0).item() == pytest.approx(0.1 * 2.718281828**0.3)
