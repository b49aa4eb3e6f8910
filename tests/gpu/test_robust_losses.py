"""Adversarial and attribution losses on CUDA: against eager float64 on the CPU, and without one synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rds_fast import AdversarialLoss, AttributionPenalty, RobustAttributionLoss, integrated_gradients
from rds_fast.penalties import attribution

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
COARSE: dict[str, Any] = {"path_steps": 4, "attack_path_steps": 2, "attack_steps": 2}
LOSSES: dict[str, Callable[..., Any]] = {
    "adversarial": AdversarialLoss(0.1),
    "adversarial, L2": AdversarialLoss(1.0, norm="l2"),
    "IG-NORM": AttributionPenalty(0.1, **COARSE),
    "IG-NORM of a layer": AttributionPenalty(0.1, **COARSE, layer="3", size="l2"),
    "IG-SUM-NORM": RobustAttributionLoss(0.5, 0.1, **COARSE),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    hidden = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Softplus(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Softplus(),
    )
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(DEVICE)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(16, 3, 12, 12, generator=generator).to(DEVICE), torch.arange(16, device=DEVICE) % 10


def total_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.total


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_waits_for_nothing(name: str) -> None:
    model, (x, y) = network(), batch()
    total_of(LOSSES[name](model, x, y)).backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        total_of(LOSSES[name](model, x, y)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_ig_sum_norm_at_one_point_against_float64(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    model, (x, y) = network().train(training), batch()
    moved = (x + 0.1 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) - 1)).clamp(0, 1)
    monkeypatch.setattr(attribution, "ascend", lambda *_, **__: moved)
    twin, start, end, labels = copy.deepcopy(model).double().cpu(), x.double().cpu(), moved.double().cpu(), y.cpu()
    ours = torch.autograd.grad(RobustAttributionLoss(0.5, 0.1, **COARSE)(model, x, y).total, list(model.parameters()))
    points = torch.cat([start + k / 4 * (end - start) for k in range(1, 5)]).requires_grad_()
    path_loss = nn.functional.cross_entropy(twin(points), labels.repeat(4), reduction="sum")
    (gradient,) = torch.autograd.grad(path_loss, points, create_graph=True)
    size = ((end - start) * sum(gradient.chunk(4)) / 4).abs().flatten(1).sum(1).mean()
    total = nn.functional.cross_entropy(twin(end), labels) + 0.5 * size
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(twin.parameters()))])
    error = (torch.cat([g.flatten().double().cpu() for g in ours]) - truth).norm() / truth.norm()
    assert error < 1e-4


def test_generators_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the same moves give the same bits
    model, (x, y) = network().eval(), batch()
    generators = [torch.Generator(DEVICE).manual_seed(seed) for seed in (3, 3, 4)]
    losses = [AdversarialLoss(0.1, steps=1, step_size=0.01, generator=generator) for generator in generators]
    totals = [loss(model, x, y).total for loss in losses]
    assert totals[0] == totals[1] != totals[2]


def test_integrated_gradients() -> None:
    model, (x, y) = network().eval(), batch()
    ours = integrated_gradients(model, x, y, 0.0, steps=5)
    truth = integrated_gradients(copy.deepcopy(model).double().cpu(), x.double().cpu(), y.cpu(), 0.0, steps=5)
    assert ((ours.double().cpu() - truth).norm() / truth.norm()) < 1e-4
