"""The activations' Triton kernels on a GPU: accuracy at both orders against float64, memory formats, and what ran."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from rds_fast.ops import activation
from tests.criteria import assert_accurate
from tests.ops.activations import ALL, SMOOTH, orders, random, smooth_points, true_orders

triton = pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ran")]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 1023, 100_000])  # one value; no vector load divides it; many programs
@pytest.mark.parametrize("name", ALL)
def test_values(name: str, count: int, dtype: torch.dtype, ran: Counter[str]) -> None:
    x, g, v = (random(count, dtype=dtype, seed=seed).cuda() for seed in range(3))
    x = (3 * x + 0.01).clamp(-20, 20) if count > 1 else x
    ours, theirs = orders(ALL[name].ours, x, g, v), orders(ALL[name].theirs, x, g, v)
    for our, their, truth in zip(ours, theirs, true_orders(name, x, g, v), strict=True):
        assert_accurate(our[None], their[None], truth[None])
    expected = {"_backward_kernel": 1, "_double_backward_kernel": 1} if name in SMOOTH else {}
    assert ran == expected


@pytest.mark.parametrize("name", ALL)
def test_channels_last_stays(name: str) -> None:
    x, g, v = (random(2, 6, 4, 3, dtype=torch.float32, seed=seed).cuda() for seed in range(3))
    contiguous = orders(ALL[name].ours, x, g, v)
    ours = orders(ALL[name].ours, x.contiguous(memory_format=torch.channels_last), g, v)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for our, expected in zip(ours, contiguous, strict=True):
        assert torch.equal(our, expected)


@pytest.mark.parametrize("name", SMOOTH)
def test_parameter_gradient_of_a_penalty(name: str) -> None:
    weight, data = random(6, 5, seed=1).cuda(), random(8, 5, seed=3).cuda()

    def gradients(function: object) -> tuple[Tensor, ...]:
        w, x = weight.clone().requires_grad_(), data.clone().requires_grad_()
        y = function(x @ w.T)  # type: ignore[operator]
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + gx.square().sum(), [w, x])

    for our, true in zip(gradients(ALL[name].ours), gradients(ALL[name].truth), strict=True):
        torch.testing.assert_close(our, true, rtol=1e-11, atol=1e-11)


def test_softplus_under_autocast_is_float32_as_pytorchs() -> None:
    x = smooth_points().to(torch.bfloat16).cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y, truth = activation.softplus(x), torch.nn.functional.softplus(x)
    assert y.dtype == truth.dtype
    assert torch.equal(y, truth)
