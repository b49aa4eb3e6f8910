"""Pools under ``fast_double_backward``: right at every order, and no more work than is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_layers import Calls, fast
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional

aten = torch.ops.aten

POOLS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "avg_pool2d": (lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 3, 7, 6)),
    "avg_pool3d": (lambda x: functional.avg_pool3d(x, 2), (2, 2, 4, 5, 4)),
    "avg_pool1d": (lambda x: functional.avg_pool1d(x, 2), (2, 2, 6)),
    "adaptive_avg_pool2d": (lambda x: functional.adaptive_avg_pool2d(x, (2, 3)), (2, 2, 5, 7)),
    "adaptive_avg_pool2d, to one": (lambda x: functional.adaptive_avg_pool2d(x, 1), (2, 2, 5, 7)),
    "adaptive_avg_pool3d": (lambda x: functional.adaptive_avg_pool3d(x, 2), (1, 2, 3, 5, 4)),
    "max_pool1d": (lambda x: functional.max_pool1d(x, 2), (2, 2, 6)),
    # windows that overlap: one value may be the maximum of several
    "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2, 1), (2, 2, 7, 7)),
    "max_pool2d, unbatched": (lambda x: functional.max_pool2d(x, 2, ceil_mode=True), (2, 5, 5)),
    "max_pool2d, dilated": (lambda x: functional.max_pool2d(x, 2, 1, dilation=2), (2, 2, 5, 5)),
    "max_pool2d with places": (lambda x: functional.max_pool2d(x, 2, return_indices=True)[0], (2, 2, 4, 4)),
    "max_pool3d": (lambda x: functional.max_pool3d(x, 2), (1, 2, 4, 4, 5)),
    "adaptive_max_pool2d": (lambda x: functional.adaptive_max_pool2d(x, 2), (2, 2, 5, 5)),
    "adaptive_max_pool3d": (lambda x: functional.adaptive_max_pool3d(x, 2), (1, 2, 3, 3, 5)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str, channels_last: bool) -> None:
    function, shape = POOLS[name]
    if channels_last and len(shape) != 4:
        pytest.skip("the format is one of four dimensions")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # all values differ by at least 0.1, so that no finite difference moves a maximum
    x = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0)).double() / 10
    x = x.reshape(shape).to(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(fast(function)(x), function(x))
    assert torch.autograd.gradcheck(fast(function), x)
    assert torch.autograd.gradgradcheck(fast(function), x)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_the_order_of_memory_is_kept(name: str, memory_format: torch.memory_format, size: int) -> None:
    """At every order: what follows would else be computed across memory, or copied first."""
    function, shape = POOLS[name]
    x = torch.randn(size, *shape[1:]).contiguous(memory_format=memory_format).requires_grad_()
    y = fast(function)(x * 1)
    g = torch.randn_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (dg,) = torch.autograd.grad(gx, g, torch.randn_like(gx))
    for tensor in (y, gx, dg):
        assert tensor.is_contiguous(memory_format=memory_format)
        # by which PyTorch chooses the format of what follows: the stride of a batch of one counts, too
        assert suggest_memory_format(tensor) == memory_format


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", ["max_pool2d", "adaptive_max_pool2d", "max_pool3d"])
def test_a_batch_of_cotangents_at_once(name: str, channels_last: bool) -> None:
    """As in ``torch.autograd.functional.hessian(..., vectorize=True)``."""
    function, shape = POOLS[name]
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    y = fast(function)(x.requires_grad_())
    g = torch.randn_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    several = torch.randn(3, *shape)
    (found,) = torch.autograd.grad(gx, g, several, retain_graph=True, is_grads_batched=True)
    for one, v in zip(found, several, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(gx, g, v, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"])
def test_no_zeros_are_summed_up(name: str) -> None:
    """PyTorch's own double backward sends zeros of x's size into x's gradient."""
    function, shape = POOLS[name]
    leaf = torch.randn(shape, requires_grad=True)
    x = leaf.exp()
    (gradient,) = torch.autograd.grad(fast(function)(x).sin().sum(), x, create_graph=True)
    with Calls() as calls:
        torch.autograd.grad(gradient.square().sum(), leaf)
    assert not [func for func, _ in calls.calls if func in (aten.zeros_like.default, aten.zeros.default)]
