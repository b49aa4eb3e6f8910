"""The Jacobian penalty: exact and estimated, against Jacobians taken row by row in eager float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, gradients, mlp
from torch import Tensor, nn

from bench.counting import Traffic
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.shared import SharedForward


def eager_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """½ Σ_c ‖∇ₓ f_c‖² of each sample, (N,), a row of the Jacobian at a time."""
    logits = model(x)
    rows = [torch.autograd.grad(logits[:, c].sum(), x, create_graph=True)[0].flatten(1) for c in range(CLASSES)]
    return 0.5 * torch.stack(rows).square().sum((0, 2))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_exact(network: str, fast: bool) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    x.requires_grad_()
    truth = eager_jacobian(model, x).mean()
    smoothed = nn.functional.cross_entropy(model(x), y, label_smoothing=0.2)
    expected = gradients(truth, model, x, retain_graph=True)
    expected_total = gradients(smoothed + 0.7 * truth, model, x)
    penalty = JacobianPenalty(projections=None, fast=fast)
    ours = penalty.per_sample(SharedForward(model, x))
    torch.testing.assert_close(ours, eager_jacobian(model, x), rtol=1e-11, atol=0)
    given = penalty.per_sample(SharedForward.of_logits(model(x), x))
    for mean in (ours.mean(), penalty(model, x), given.mean()):
        assert_same_gradients(gradients(mean, model, x), expected)
    total = PenalizedLoss(penalty, 0.7, label_smoothing=0.2)(model, x, y).total
    assert_same_gradients(gradients(total, model, x), expected_total)


@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_projections(network: str, projections: int) -> None:
    """With the directions, of unit length, drawn here in the same order."""
    model, (x, _) = NETWORKS[network](), batch()
    x.requires_grad_()
    generator = torch.Generator().manual_seed(3)
    logits, truth = model(x), torch.zeros((), dtype=x.dtype)
    for _ in range(projections):
        v = torch.randn(len(x), CLASSES, dtype=x.dtype, generator=generator)
        v = v / v.square().sum(1, keepdim=True).sqrt()
        (gradient,) = torch.autograd.grad((v * logits).sum(), x, create_graph=True)
        truth = truth + 0.5 * CLASSES / projections * gradient.flatten(1).square().sum(1).mean()
    expected = gradients(truth, model, x)
    ours = JacobianPenalty(projections=projections, generator=torch.Generator().manual_seed(3))(model, x)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=0)
    assert_same_gradients(gradients(ours, model, x), expected)


def test_the_estimate_is_unbiased() -> None:
    """The mean over 20,000 draws is within 4 standard errors, by the variance that the docstring bounds."""
    model, (x, _) = mlp(), batch(samples=1)
    draws = 20_000
    exact = JacobianPenalty(projections=None)(model, x).item()
    penalty = JacobianPenalty(generator=torch.Generator().manual_seed(0))
    estimates = penalty.per_sample(SharedForward(model, x.expand(draws, *x.shape[1:]))).detach()
    variance = (estimates / exact).var().item()
    assert variance <= 2 * (CLASSES - 1) / (CLASSES + 2) * 1.05
    assert abs(estimates.mean() / exact - 1) < 4 * (variance / draws) ** 0.5
    spread = JacobianPenalty(projections=4, generator=torch.Generator().manual_seed(1))
    fewer = spread.per_sample(SharedForward(model, x.expand(draws // 4, *x.shape[1:]))).detach()
    assert (fewer / exact).var().item() == pytest.approx(variance / 4, rel=0.1)


def test_one_class_needs_no_luck() -> None:
    """v is 1 or −1 then, and the estimate exact."""
    model = nn.Sequential(mlp(), nn.Linear(CLASSES, 1).double())
    x, _ = batch()
    torch.testing.assert_close(JacobianPenalty()(model, x), JacobianPenalty(projections=None)(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """The directions have unit length whatever the logits' precision is."""
    model, (x, y) = mlp(torch.float32), batch(torch.float32, samples=16)
    truth = JacobianPenalty(projections=None)(mlp(), x.double())
    with torch.autocast("cpu", dtype=dtype):
        terms = PenalizedLoss(JacobianPenalty(projections=None))(model, x, y)
        estimate = JacobianPenalty(generator=torch.Generator().manual_seed(0))(model, x)
    assert terms.penalty.dtype == estimate.dtype == torch.float32
    assert terms.penalty.item() == pytest.approx(truth.item(), rel=0.02)
    expected = JacobianPenalty(generator=torch.Generator().manual_seed(0))(model, x)
    assert estimate.item() == pytest.approx(expected.item(), rel=0.02)


def test_cost() -> None:
    """One projection costs what the density penalty does, without the head's part of the double backward.

    v does not depend on the logits, so nothing flows into them; a further one costs an inner pass and its double
    backward.
    """
    head = nn.Linear(64, CLASSES)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Flatten(), head).to("meta")
    x, y = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")

    def flops(run: Callable[[], object]) -> int:
        with Traffic() as traffic:
            run()
        return traffic.total.flops

    def step(penalty: Any) -> int:
        return flops(lambda: PenalizedLoss(penalty)(model, x, y).total.backward())

    into_logits = flops(lambda: head(torch.empty(6, 64, device="meta")))
    density, one, forward = step(DensityPenalty()), step(JacobianPenalty()), flops(lambda: model(x))
    assert density - one == into_logits
    assert step(JacobianPenalty(projections=2)) - one == 3 * forward - into_logits
    assert step(JacobianPenalty(projections=None)) - one == (CLASSES - 1) * (3 * forward - into_logits)
