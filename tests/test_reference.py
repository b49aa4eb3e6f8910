"""The specification itself, against PyTorch's own functions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rds_fast import reference


def test_logsumexp_is_torchs_and_accumulates_16_bit_in_float32() -> None:
    x = torch.randn(8, 1000, dtype=torch.float64)
    torch.testing.assert_close(reference.logsumexp(x, 1), torch.logsumexp(x, 1), rtol=0, atol=0)
    half = x.bfloat16()
    assert torch.equal(reference.logsumexp(half, 1), torch.logsumexp(half.float(), 1).bfloat16())


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5, 3.0])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_gradient_norm_away_from_zero(p: float, power: float) -> None:
    """Both derivatives against those of torch.linalg.vector_norm, which are right where no coordinate is zero."""
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    c, v = torch.randn(5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    results = []
    for function in (
        lambda x: reference.gradient_norm(x, p, power),
        lambda x: torch.linalg.vector_norm(x, p, dim=1) ** power,
    ):
        norm = function(x)
        (gx,) = torch.autograd.grad((norm * c).sum(), x, create_graph=True)
        dx = torch.autograd.grad((gx * v).sum(), x)[0] if gx.requires_grad else torch.zeros_like(x)
        results.append((norm, gx, dx))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_gradient_norm_at_zero_coordinates_by_finite_differences(p: float) -> None:
    """A zero coordinate of p >= 2 has a second derivative; for 1 < p < 2 there is none and it is 0."""
    x = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(reference.gradient_norm(x, p).sum(), x, create_graph=True)[0]

    y = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(
        torch.autograd.grad(reference.gradient_norm(y, p).sum(), y, create_graph=True)[0][0, 0], y
    )
    if p < 2:
        assert dx[0, 0] == 0
        return
    h = 1e-6
    step = torch.tensor([[h, 0.0, 0.0]], dtype=torch.float64)
    expected = (gradient(x + step)[0, 0] - gradient(x - step)[0, 0]) / (2 * h)
    torch.testing.assert_close(dx[0, 0], expected.detach(), rtol=1e-4, atol=2e-6)
