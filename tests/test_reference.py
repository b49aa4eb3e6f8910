"""The specification itself, against PyTorch's own functions in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import rds_fast
from rds_fast import fast_double_backward, reference, use_backend


def test_logsumexp_is_torchs_and_accumulates_16_bit_in_float32() -> None:
    x = torch.randn(8, 1000, dtype=torch.float64)
    torch.testing.assert_close(reference.logsumexp(x, 1), torch.logsumexp(x, 1), rtol=0, atol=0)
    half = x.bfloat16()
    assert torch.equal(reference.logsumexp(half, 1), torch.logsumexp(half.float(), 1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_results_under_autocast_have_the_precision_of_the_fused_ones(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    with use_backend("reference"), torch.autocast("cpu", dtype=torch.bfloat16):
        results = [rds_fast.logsumexp(x), rds_fast.gradient_norm(x)]
        results += rds_fast.cross_entropy_with_logsumexp(x, torch.tensor([0, 1, 2]))
    assert {each.dtype for each in results} == {reference.accumulation_dtype(dtype)}


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


def _images(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = torch.randn(3, 4, 5, 2).to(dtype)
    return {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "a view": torch.randn(4, 3, 5, 2).to(dtype).transpose(0, 1),
        "no spatial dimension": torch.randn(6, 4).to(dtype),
        "a sequence": torch.randn(3, 5, 4).to(dtype).transpose(1, 2),
    }


NORMS = {
    "batch norm": lambda x, *p: F.batch_norm(x, *p, training=True, momentum=0.3),
    "batch norm without statistics": lambda x, mean, var, *p: F.batch_norm(x, None, None, *p, training=True),
    "group norm": lambda x, mean, var, *p: F.group_norm(x, 2, *p),
    "instance norm": lambda x, *p: F.instance_norm(x, *p, momentum=0.3) if x.dim() > 2 else x,
    "layer norm": lambda x, *p: F.layer_norm(x, x.shape[1:], eps=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Values, dtypes, strides and running statistics."""
    for kind, x in _images(dtype).items():
        parameters = [torch.randn(4), torch.rand(4) + 0.5, torch.randn(4), torch.randn(4)]
        results = []
        for mode in (use_backend("reference"), nullcontext()):
            copies = [t.clone() if dtype == torch.bfloat16 else t.to(dtype, copy=True) for t in parameters]
            with mode, fast_double_backward() if results == [] else nullcontext():
                y = NORMS[name](x.clone().requires_grad_(), *copies)
            assert y.dtype == dtype
            results.append([y, *copies[:2]])
        assert results[0][0].stride() == results[1][0].stride(), kind
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["batch norm without statistics", "group norm", "instance norm", "layer norm"])
def test_norms_inside_vmap(name: str) -> None:
    batch, *parameters = torch.randn(3, 4, 2, 5, 2), torch.zeros(4), torch.ones(4), torch.randn(4), torch.randn(4)
    if name == "instance norm":
        parameters[:2] = None, None

    def norm(x: torch.Tensor) -> torch.Tensor:
        return NORMS[name](x, *parameters)

    with fast_double_backward():
        batched = torch.vmap(norm, in_dims=2)(batch)
    torch.testing.assert_close(batched, torch.stack([norm(x) for x in batch.unbind(2)]))


def test_running_statistics_inside_transformations() -> None:
    """They are updated, as by PyTorch's own; vmap would have one update a sample, and raises its error."""
    x, statistics = torch.randn(5, 3), (torch.zeros(3), torch.ones(3))

    def loss(x: torch.Tensor) -> torch.Tensor:
        with fast_double_backward():
            return F.batch_norm(x, *statistics, training=True).pow(3).sum()

    torch.func.grad(loss)(x)
    torch.testing.assert_close(statistics[0], 0.1 * x.mean(0))
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):
        torch.vmap(loss)(torch.stack([x, x]))
