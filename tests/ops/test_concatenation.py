"""Concatenations under ``fast_double_backward``: right at every order, and one pass in the double backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fast_layers import Calls, fast
from torch import Tensor

from rds_fast.ops.concatenation import Concatenation

aten = torch.ops.aten


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def is_ours(result: Tensor) -> bool:
    return result.grad_fn is not None and result.grad_fn.name() == f"{Concatenation.__name__}Backward"


@pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.concatenate])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_derivatives(cat: Callable[..., Tensor], dim: int) -> None:
    shapes = [[2, 3, 4], [2, 3, 4], [2, 3, 4]]
    for size, shape in zip((1, 5, 0), shapes, strict=True):
        shape[dim] = size
    leaves = tensors(*map(tuple, shapes))
    function = fast(lambda *tensors: cat([tensor * 1 for tensor in tensors], dim))
    assert is_ours(function(*leaves))
    assert torch.equal(function(*leaves), cat(leaves, dim))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_third_derivative() -> None:
    x, w = tensors((3, 2), (3, 1))
    results = []
    for wrap in (fast, lambda function: function):
        y = wrap(lambda: torch.cat((x * w, w.exp()), 1))()
        (first,) = torch.autograd.grad(y.pow(4).sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(second.pow(2).sum(), (x, w)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_pass() -> None:
    """PyTorch's own double backward fills a tensor of the whole size for each of those put together."""
    leaves = tensors(*[(2, 3)] * 5)
    joined = [leaf.exp() for leaf in leaves]
    y = fast(lambda: torch.cat(joined, 1))()
    gradients = torch.autograd.grad(y.sin().sum(), joined, create_graph=True)
    with Calls() as calls:
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)
    assert len(calls.of(aten.cat.default)) == 1
    assert not calls.of(aten.slice_backward.default)


def test_a_gradient_that_is_not_wanted() -> None:
    x, constant = torch.randn(2, 3, requires_grad=True), torch.randn(2, 1)
    with torch.no_grad():
        assert fast(lambda: torch.cat((x, x)))().grad_fn is None
    y = fast(lambda: torch.cat((x, constant, -x), dim=1))()
    assert is_ours(y)
    (gradient,) = torch.autograd.grad(y.pow(4).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 24 * x.detach().square())


@pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.concatenate])
def test_numpys_name_of_the_dimension(cat: Callable[..., Tensor]) -> None:
    leaves = tensors((2, 3), (2, 1))
    y = fast(lambda: cat(leaves, axis=-1))()
    assert is_ours(y)
    assert torch.equal(y, cat(leaves, axis=-1))
    assert torch.equal(fast(lambda: cat(tensors=leaves[:1], axis=1))(), leaves[0])


@pytest.mark.parametrize("dim", [1, -2])
def test_gradients_may_be_changed_in_place(dim: int) -> None:
    """Those of leaves, and that of a single tensor with one; PyTorch forbids it of the results of a split."""
    leaves = tensors((2, 1, 3), (2, 4, 3))
    outer, noise = tensors((2, 3, 3)), torch.randn(2, 2, 3, dtype=torch.float64)
    for joined, inputs in (((leaves[0], noise, leaves[1]), leaves), ((outer[0].exp(), noise), outer)):
        seconds = []
        of = [t for t in joined if t.requires_grad]
        for wrap in (fast, lambda function: function):
            y = wrap(lambda joined=joined: torch.cat(joined, dim))()
            gradients = torch.autograd.grad(y.pow(3).sum(), of, create_graph=True)
            for gradient in gradients:
                gradient.mul_(2)
            seconds.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, retain_graph=True))
        for ours, theirs in zip(*seconds, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_channels_last() -> None:
    leaves = [t.contiguous(memory_format=torch.channels_last) for t in tensors((2, 3, 4, 5), (2, 2, 4, 5))]
    y = fast(lambda: torch.cat(leaves, 1))()
    g = torch.randn_like(y).requires_grad_()
    gradients = torch.autograd.grad(y, leaves, g, create_graph=True)
    (dg,) = torch.autograd.grad(gradients, g, [torch.randn_like(gradient) for gradient in gradients])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dg.is_contiguous(memory_format=torch.channels_last)


def test_what_is_left_to_pytorch() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    empty, half = torch.empty(0, requires_grad=True), torch.randn(2, 3, dtype=torch.float16, requires_grad=True)
    for function in (
        lambda: torch.cat((x, empty)),  # which it passes over, whatever the dimensions of the others
        lambda: torch.cat((x, half)),  # which it casts
        lambda: torch.cat((x,)),
        lambda: torch.cat((x, x.detach())),  # of which there is one part to put together again
        lambda: torch.stack((x, x)),
    ):
        ours, theirs = fast(function)(), function()
        assert not is_ours(ours)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    out = torch.empty(4, 3)
    with torch.no_grad():
        assert fast(lambda: torch.cat((x, x), out=out))() is out
    for bad in (lambda: torch.cat((x, torch.zeros(1, 2))), lambda: torch.cat(()), lambda: torch.cat((x, x), 2)):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs_error:
            bad()
        with pytest.raises(theirs_error.type) as ours_error:
            fast(bad)()
        assert str(ours_error.value) == str(theirs_error.value)


def test_autocast() -> None:
    """It casts both to the wider type, which is PyTorch's part; tensors of one type are ours."""
    x, half = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, alike = fast(lambda: torch.cat((x, half)))(), fast(lambda: torch.cat((half, half)))()
    assert mixed.dtype == torch.float32
    assert not is_ours(mixed)
    assert alike.dtype == torch.bfloat16
    assert is_ours(alike)
